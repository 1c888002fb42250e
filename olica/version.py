"""The version of this program, in a module that imports nothing, so that every other one may say it."""

__version__ = "0.2.0"
