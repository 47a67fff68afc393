"""What is learned: functions from hidden states and a batch to a loss per sequence."""

from weft.objectives.classification import classification
from weft.objectives.likelihood import Head, Supervised, likelihood, likelihood_of_logits

__all__ = ["Head", "Supervised", "classification", "likelihood", "likelihood_of_logits"]
