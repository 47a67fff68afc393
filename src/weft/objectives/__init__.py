"""Objectives: functions from hidden states and a batch to a loss per sequence."""

from weft.core.head import Supervised
from weft.objectives.answers import AnswerObjective
from weft.objectives.classification import class_metrics
from weft.objectives.likelihood import likelihood
from weft.objectives.registry import OBJECTIVES, Objective, make_objective, register_objective

__all__ = [
    "OBJECTIVES",
    "AnswerObjective",
    "Objective",
    "Supervised",
    "class_metrics",
    "likelihood",
    "make_objective",
    "register_objective",
]
