"""The version of the package; a record names it."""

__version__ = "0.2.0"
