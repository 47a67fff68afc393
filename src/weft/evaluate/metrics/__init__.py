"""Metrics by their names in a task's file; one file for each family."""

from __future__ import annotations

from collections.abc import Mapping

from weft.evaluate.metrics.base import Figure, Metric, Reply
from weft.evaluate.metrics.choice import Accuracy, AccuracyPerByte, AccuracyPerCharacter
from weft.evaluate.metrics.classes import ClassAccuracy, MacroF1, Mcc
from weft.evaluate.metrics.conduct import (
    KeepsStyle,
    NumbersSupported,
    Refuses,
    RefusesRightly,
    SaysNotInText,
    SaysNotInTextRightly,
    Supported,
)
from weft.evaluate.metrics.instructions import FollowedAll, FollowedAllLoosely, FollowedEach, FollowedEachLoosely
from weft.evaluate.metrics.json_text import FollowsSchema
from weft.evaluate.metrics.likelihood import BitsPerByte, BytePerplexity, Loss, Perplexity, WordPerplexity
from weft.evaluate.metrics.rouge import Rouge1, Rouge2, RougeL
from weft.evaluate.metrics.text import ExactMatch, Length, NumericMatch, TokenF1
from weft.evaluate.metrics.translation import Bleu, ChrF

METRICS: Mapping[str, type[Metric]] = {
    "acc": Accuracy,
    "acc_norm": AccuracyPerCharacter,
    "acc_bytes": AccuracyPerByte,
    "exact_match": ExactMatch,
    "numeric_match": NumericMatch,
    "f1": TokenF1,
    "length": Length,
    "rouge1": Rouge1,
    "rouge2": Rouge2,
    "rougeL": RougeL,
    "bleu": Bleu,
    "chrf": ChrF,
    "json_schema": FollowsSchema,
    "prompt_level_strict_acc": FollowedAll,
    "inst_level_strict_acc": FollowedEach,
    "prompt_level_loose_acc": FollowedAllLoosely,
    "inst_level_loose_acc": FollowedEachLoosely,
    "bits_per_byte": BitsPerByte,
    "loss": Loss,
    "perplexity": Perplexity,
    "byte_perplexity": BytePerplexity,
    "word_perplexity": WordPerplexity,
    "accuracy": ClassAccuracy,
    "macro_f1": MacroF1,
    "mcc": Mcc,
    "refusal": Refuses,
    "refusal_right": RefusesRightly,
    "not_in_text": SaysNotInText,
    "not_in_text_right": SaysNotInTextRightly,
    "supported": Supported,
    "numbers_supported": NumbersSupported,
    "style": KeepsStyle,
}

__all__ = ["METRICS", "Figure", "Metric", "Reply"]
