"""Adapters into a base: the merged weights, the folder that holds them, and the proof that it answers as before."""
