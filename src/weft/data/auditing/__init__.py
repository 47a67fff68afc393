"""Checks of data, duplicates, and figures."""
