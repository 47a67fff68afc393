"""The version, which runs, folders and files name."""

__version__ = "0.1.0"
