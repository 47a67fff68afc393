"""Weft fine-tunes one frozen language model into many."""

__version__ = "0.1.0"
