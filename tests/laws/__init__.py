"""The laws, one file each, over every model."""
