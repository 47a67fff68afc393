"""What is learned: functions from hidden states and a batch to a loss per sequence."""

from weft.objectives.classification import class_metrics
from weft.objectives.likelihood import likelihood

__all__ = ["class_metrics", "likelihood"]
