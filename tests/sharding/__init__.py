"""Law 3: every model, sharded in every way, against its eager twin sharded in the same way."""
