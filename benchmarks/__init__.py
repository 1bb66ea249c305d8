"""What lateinit costs and saves, measured against the alternatives in one run."""
