"""Evaluation: exact answers, classes, forgetting, and the demo."""

from weft.evaluate.classify import Predictions, predict
from weft.evaluate.exact_match import Answer, Question, answer_questions, exact_match, read_questions

__all__ = [
    "Answer",
    "Predictions",
    "Question",
    "answer_questions",
    "exact_match",
    "predict",
    "read_questions",
]
