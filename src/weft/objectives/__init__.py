"""Objectives, one file each: functions from hidden states and a batch to per-sequence losses."""

from weft.objectives.likelihood import Head, Supervised, likelihood

__all__ = ["Head", "Supervised", "likelihood"]
