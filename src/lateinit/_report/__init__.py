"""What a person reads: summary tables, the parity check, the verification of a checkpoint."""
