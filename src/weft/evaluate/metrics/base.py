"""What a metric is: a value of each reply alone, and a figure with its error over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict

from weft.complaints import Worded
from weft.evaluate.metrics.errors import weighted_mean
from weft.evaluate.results import TaskKind


@dataclass(frozen=True)
class Reply:
    """What was answered to one exercise, and what was expected.

    Attributes:
        text: of a generation what was extracted of the answer, None: nothing was found; of a classification the class;
            of a perplexity the text itself.
        references: what was expected; any of them is right.
        fields: the record of the exercise.
        choices, right: of multiple choice the texts, and the place of the right one.
        logprobs: log p of each choice, or of the text.
        tokens: how many the text has.
    """

    text: str | None
    references: Sequence[str] = ()
    _: KW_ONLY
    fields: Mapping[str, object]
    choices: Sequence[str] = ()
    right: int = -1
    logprobs: Sequence[float] = ()
    tokens: int = 0


@dataclass(frozen=True)
class Figure:
    """A value over all replies, and its standard error; None where none is defined."""

    value: float
    stderr: float | None


class Metric(Worded):
    """A metric with its settings: a mean over the replies, unless it says otherwise.

    Attributes:
        kinds: of tasks that it fits.
        needs_reference: whether a reply is nothing without one.
        fields: of a record that it reads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kinds: ClassVar[frozenset[TaskKind]] = frozenset({"generation"})
    higher_is_better: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    fields: ClassVar[tuple[str, ...]] = ()

    def score(self, reply: Reply) -> float:
        """The value of one reply alone."""
        raise NotImplementedError

    def weight(self, reply: Reply) -> float:
        """What the reply counts in the mean."""
        return 1.0

    def figure(self, replies: Sequence[Reply], scores: Sequence[float], seed: int) -> Figure:
        """The figure over all ``replies``, whose ``scores`` are known; ``seed`` is for a bootstrap."""
        return Figure(*weighted_mean(scores, [self.weight(reply) for reply in replies]))

    def details(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """What else there is to tell of the replies, as JSON holds it."""
        return {}


def is_cjk(text: str) -> bool:
    """Whether a text is mostly written without spaces between words: Chinese or Japanese."""
    letters = [character for character in text if character.isalpha()]
    return 2 * sum("\u3040" <= c <= "\u30ff" or "\u3400" <= c <= "\u9fff" for c in letters) > len(letters)
