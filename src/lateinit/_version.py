"""The version. Every file that is written names it, and the metadata of the package takes it."""

__version__ = "0.2.0"
