"""Evaluation: exact answers, classes, and the base's forgetting."""

from weft.evaluate.classify import Predictions, predict
from weft.evaluate.exact_match import Answer, Question, answer_questions, exact_match, read_questions
from weft.evaluate.forgetting import text_loss

__all__ = [
    "Answer",
    "Predictions",
    "Question",
    "answer_questions",
    "exact_match",
    "predict",
    "read_questions",
    "text_loss",
]
