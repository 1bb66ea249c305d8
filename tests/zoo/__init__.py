"""Every architecture of `transformers`, made small, against its eager twin."""
