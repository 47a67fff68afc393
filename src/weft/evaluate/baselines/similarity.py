"""Which texts are most like another one: the cosine of their words, each weighed by how rare it is (tf-idf).

A word counts (1 + log f) log(n / d), for f times in its text and in d of n texts (Salton & Buckley, 1988). Of Chinese
and Japanese every character is a word, and so is every pair of neighbours, for single characters say little.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from weft.evaluate.metrics.words import words


class Similarity:
    """Texts, of which the nearest to another one can be asked for."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(_terms(text)) for text in texts]
        texts_with = Counter(term for own in counts for term in own)
        self._rarity = {term: math.log(len(texts) / number) for term, number in texts_with.items()}
        self._places: dict[str, list[tuple[int, float]]] = defaultdict(list)  # term -> (text, its weight there)
        for place, own in enumerate(counts):
            for term, weight in self._weights(own).items():
                self._places[term].append((place, weight))

    def likeness(self, text: str) -> dict[int, float]:
        """Place of a text -> its cosine with ``text``; of those alone that share a word that not all have."""
        found: dict[int, float] = defaultdict(float)
        for term, weight in self._weights(Counter(_terms(text))).items():
            for place, other in self._places[term]:
                found[place] += weight * other
        return found

    def _weights(self, counts: Mapping[str, int]) -> dict[str, float]:
        """The weights of a text's terms, as a vector of length 1."""
        raw = {
            term: (1 + math.log(count)) * rarity
            for term, count in counts.items()
            if (rarity := self._rarity.get(term, 0.0)) > 0
        }
        length = math.sqrt(sum(weight**2 for weight in raw.values()))
        return {term: weight / length for term, weight in raw.items()}


def _terms(text: str) -> list[str]:
    found = words(text)
    return found + [a + b for a, b in pairwise(found) if len(a) == len(b) == 1 and not (a + b).isascii()]
