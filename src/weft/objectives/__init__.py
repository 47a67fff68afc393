"""Objectives: functions from hidden states and a batch to a loss per sequence."""

from weft.objectives.classification import class_metrics, classification
from weft.objectives.likelihood import Head, Supervised, likelihood, likelihood_of_logits
from weft.objectives.registry import OBJECTIVES, Objective, make_objective, register_objective

__all__ = [
    "OBJECTIVES",
    "Head",
    "Objective",
    "Supervised",
    "class_metrics",
    "classification",
    "likelihood",
    "likelihood_of_logits",
    "make_objective",
    "register_objective",
]
