"""Classes: accuracy, macro-F1, Matthews' correlation, and the confusion of classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from weft.evaluate.metrics.base import Figure, Metric, Reply
from weft.evaluate.metrics.errors import bootstrap_error
from weft.evaluate.results import TaskKind
from weft.objectives.classification import class_metrics


class ClassAccuracy(Metric):
    """1 for the right class."""

    kinds: ClassVar[frozenset[TaskKind]] = frozenset({"classification", "generation"})

    def score(self, reply: Reply) -> float:
        return float(reply.text == reply.references[0])

    def details(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """How often each class (a row) was called what (a column)."""
        classes = _classes(replies)
        counts = Counter((reply.references[0], reply.text or "") for reply in replies)
        return {"confusion": {"classes": classes, "counts": [[counts[a, b] for b in classes] for a in classes]}}


class _OfAll(ClassAccuracy):
    """A figure of ``class_metrics``, with a bootstrap; that of one reply alone is whether it is right."""

    key: ClassVar[str]

    def figure(self, replies: Sequence[Reply], scores: Sequence[float], seed: int) -> Figure:
        number = {name: place for place, name in enumerate(_classes(replies))}
        said = [number[reply.text or ""] for reply in replies]
        true = [number[reply.references[0]] for reply in replies]

        def over(places: Sequence[int]) -> float:
            return class_metrics([said[i] for i in places], [true[i] for i in places])[self.key]

        return Figure(over(range(len(replies))), bootstrap_error(over, len(replies), seed=seed))

    def details(self, replies: Sequence[Reply]) -> dict[str, Any]:
        return {}


class MacroF1(_OfAll):
    """The mean F1 of the classes that occur."""

    key = "macro_f1"


class Mcc(_OfAll):
    """Matthews' correlation (Gorodkin 2004 for more than two classes)."""

    key = "mcc"


def _classes(replies: Sequence[Reply]) -> list[str]:
    return sorted({one for reply in replies for one in (reply.references[0], reply.text or "")})
