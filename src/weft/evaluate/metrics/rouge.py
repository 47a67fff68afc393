"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), as F1, without stemming.

Words are letters and digits side by side; of Chinese and Japanese every character is one. On English text the values
are those of the package rouge-score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from weft.evaluate.metrics.base import Metric, Reply
from weft.evaluate.metrics.words import words


class _Rouge(Metric):
    """The best F1 over the references."""

    def score(self, reply: Reply) -> float:
        said = words(reply.text or "")
        return max((self.f1(said, words(one)) for one in reply.references), default=0.0)

    def f1(self, said: Sequence[str], expected: Sequence[str]) -> float:
        """F1 of the words of an answer and of a reference."""
        raise NotImplementedError


class Rouge1(_Rouge):
    """F1 of single words."""

    def f1(self, said: Sequence[str], expected: Sequence[str]) -> float:
        return _of_runs(said, expected, 1)


class Rouge2(_Rouge):
    """F1 of two words in a row."""

    def f1(self, said: Sequence[str], expected: Sequence[str]) -> float:
        return _of_runs(said, expected, 2)


class RougeL(_Rouge):
    """F1 of the longest common subsequence."""

    def f1(self, said: Sequence[str], expected: Sequence[str]) -> float:
        return _f1(common_subsequence(said, expected), len(said), len(expected))


def _of_runs(said: Sequence[str], expected: Sequence[str], n: int) -> float:
    mine, theirs = (Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1)) for text in (said, expected))
    return _f1(sum((mine & theirs).values()), mine.total(), theirs.total())


def _f1(common: int, said: int, expected: int) -> float:
    return 2 * common / (said + expected) if common else 0.0


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, with a bit for each word of ``a`` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    all_bits = (1 << len(a)) - 1
    open_bits = all_bits
    for word in b:
        matched = open_bits & places.get(word, 0)
        open_bits = ((open_bits + matched) | (open_bits - matched)) & all_bits
    return len(a) - open_bits.bit_count()
