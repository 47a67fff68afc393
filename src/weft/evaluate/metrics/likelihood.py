"""How well a text is predicted: perplexity and bits per byte. Less is better.

Documents count by their length: a figure is that of all texts as one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import ClassVar

from weft.evaluate.metrics.base import Figure, Metric, Reply
from weft.evaluate.metrics.errors import bootstrap_error
from weft.evaluate.results import TaskKind

_SPACE = re.compile(r"\s+")


class BitsPerByte(Metric):
    """-log2 p of the text over its UTF-8 bytes: it compares models of any tokenizer."""

    kinds: ClassVar[frozenset[TaskKind]] = frozenset({"perplexity"})
    higher_is_better = False
    needs_reference = False

    def weight(self, reply: Reply) -> float:
        return float(len((reply.text or "").encode()))

    def score(self, reply: Reply) -> float:
        return -reply.logprobs[0] / (math.log(2) * self.weight(reply))


class Loss(BitsPerByte):
    """The cross-entropy of a token, in nats."""

    def weight(self, reply: Reply) -> float:
        return float(reply.tokens)

    def score(self, reply: Reply) -> float:
        return -reply.logprobs[0] / self.weight(reply)


class Perplexity(Loss):
    """exp of the cross-entropy of a token; its error comes from a bootstrap over the documents."""

    def score(self, reply: Reply) -> float:
        return _exp(-reply.logprobs[0] / self.weight(reply))

    def figure(self, replies: Sequence[Reply], scores: Sequence[float], seed: int) -> Figure:
        weights = [self.weight(reply) for reply in replies]
        losses = [-reply.logprobs[0] for reply in replies]

        def over(places: Sequence[int]) -> float:
            return _exp(math.fsum(losses[i] for i in places) / math.fsum(weights[i] for i in places))

        return Figure(over(range(len(replies))), bootstrap_error(over, len(replies), seed=seed))


class BytePerplexity(Perplexity):
    """exp of the cross-entropy of a UTF-8 byte."""

    def weight(self, reply: Reply) -> float:
        return float(len((reply.text or "").encode()))


class WordPerplexity(Perplexity):
    """exp of the cross-entropy of a word. As in lm_eval a text has one word more than it has runs of white space."""

    def weight(self, reply: Reply) -> float:
        return float(len(_SPACE.split(reply.text or "")))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
