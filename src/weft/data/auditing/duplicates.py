"""Find records that are the same or nearly the same among tens of thousands.

The shingles of a text are all stretches of five characters after ``normalise``. A character of Chinese, Japanese or
Korean counts as two. (It says as much as two or three Latin letters, so a changed word costs about as many shingles in
either script.) Two texts are nearly the same if the Jaccard similarity of their sets of shingles is 0.8 or more.
MinHash (Broder 1997) with banding finds the pairs that are worth a look. Each of them is then measured exactly. So
every reported pair is one, and only a pair without a look can be missed.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.data.auditing.stream import chunks
from weft.data.views import Array

THRESHOLD = 0.8
SHINGLE = 5
# A pair of similarity s shares a band of 5 of 100 minima with probability 1 - (1 - s^5)^20: 0.9996 at 0.8, 6e-6 at
# 0.05.
_BANDS, _ROWS = 20, 5
_MINIMA = _BANDS * _ROWS
# In a bucket a text is compared to this many of the texts after it. Otherwise a template that is filled in 50,000 times
# would be 10^9 pairs.
_NEIGHBOURS = 16
# The standard deviation of the estimate from 100 minima is 0.04 at 0.8. This is five of them.
_MARGIN = 0.2
_PAD = 0
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts by their places (``first < second``), and the Jaccard similarity of their shingles."""

    first: int
    second: int
    similarity: float


def normalise(text: str) -> str:
    """The text without what makes no difference: Unicode's compatibility forms, case, and the kind of white space."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def near(texts: Sequence[str]) -> list[Pair]:
    """Pairs of texts whose similarity is 0.8 or more, the most alike first. Equal texts are among them.

    Of many texts that are all alike, not every pair is given, but every text is in one.
    """
    if len(texts) < 2:
        return []
    shingles = Shingles([normalise(text) for text in texts])
    minima = shingles.minima()
    pairs = _candidates(minima, shingles.counts > 0)
    pairs = pairs[_estimates(minima, pairs) >= THRESHOLD - _MARGIN]
    measured = shingles.similarities(pairs)
    kept = measured >= THRESHOLD
    found = [Pair(int(a), int(b), round(float(s), 4)) for (a, b), s in zip(pairs[kept], measured[kept], strict=True)]
    return sorted(found, key=lambda pair: (-pair.similarity, pair.first, pair.second))


class Shingles:
    """The shingles of texts as 32-bit hashes in the order of the texts. A shingle may come twice."""

    def __init__(self, texts: Sequence[str]) -> None:
        stretches = chunks(np.array([len(text) for text in texts]), _CHUNK)
        hashes, counts = zip(*(_shingled(texts[first:last]) for first, last in stretches), strict=True)
        self.hashes: Array = np.concatenate(hashes)
        self.counts: Array = np.concatenate(counts)
        self.starts: Array = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    def minima(self) -> Array:
        """MinHash signatures [texts, 100]: for each of 100 orders of all hashes, the first that the text has."""
        draw = np.random.default_rng(0)
        factors = draw.integers(0, 1 << 32, _MINIMA, dtype=np.uint32) | np.uint32(1)
        addends = draw.integers(0, 1 << 32, _MINIMA, dtype=np.uint32)
        result = np.full((len(self.counts), _MINIMA), np.iinfo(np.uint32).max, np.uint32)
        filled = np.flatnonzero(self.counts)
        for first, last in chunks(self.counts[filled], 1 << 16):
            places = filled[first:last]
            begin, end = self.starts[places[0]], self.starts[places[-1] + 1]
            block, starts = self.hashes[begin:end], self.starts[places] - begin
            scratch = np.empty_like(block)
            for number in range(_MINIMA):
                np.multiply(block, factors[number], out=scratch)
                scratch += addends[number]
                # The low bits of a product are the least random.
                scratch ^= scratch >> np.uint32(15)
                result[places, number] = np.minimum.reduceat(scratch, starts)
        return result

    def similarities(self, pairs: Array) -> Array:
        """The exact Jaccard similarity of each pair [pairs, 2] of places."""
        result = np.zeros(len(pairs))
        sizes = self.counts[pairs].sum(axis=1) if len(pairs) else np.zeros(0, np.int64)
        for first, last in chunks(sizes, 1 << 22):
            result[first:last] = self._similarities(pairs[first:last])
        return result

    def _similarities(self, pairs: Array) -> Array:
        one, many_one = self._gathered(pairs[:, 0])
        two, many_two = self._gathered(pairs[:, 1])
        # Sorted with the number of the pair in front, a common shingle stands twice in a row.
        both = np.concatenate([np.unique(many_one << np.uint64(32) | one), np.unique(many_two << np.uint64(32) | two)])
        both.sort()
        twice = both[1:][both[1:] == both[:-1]] >> np.uint64(32)
        shared = np.bincount(twice.astype(np.int64), minlength=len(pairs))
        total = np.bincount((both >> np.uint64(32)).astype(np.int64), minlength=len(pairs))
        return shared / np.maximum(total - shared, 1)

    def _gathered(self, places: Array) -> tuple[Array, Array]:
        """The shingles of the texts at ``places``, end to end, and for each the number of its text among them."""
        counts = self.counts[places]
        ends = np.cumsum(counts)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
        values = self.hashes[np.repeat(self.starts[places], counts) + within].astype(np.uint64)
        return values, np.repeat(np.arange(len(places), dtype=np.uint64), counts)


def _shingled(texts: Sequence[str]) -> tuple[Array, Array]:
    """The hashes of the shingles of normalised texts, and the count of each text: 0 if empty, 1 if short."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    twice = 1 + _is_wide(codes)
    codes, owner = np.repeat(codes, twice), np.repeat(owner, twice)
    lengths = np.bincount(owner, minlength=len(texts))
    short = np.flatnonzero((lengths > 0) & (lengths < SHINGLE))
    if len(short):  # padded to one shingle
        missing = np.repeat(short, SHINGLE - lengths[short])
        places = np.searchsorted(owner, missing, side="right")
        codes, owner = np.insert(codes, places, _PAD), np.insert(owner, places, missing)
    if len(codes) < SHINGLE:
        return np.zeros(0, np.uint32), np.zeros(len(texts), np.int64)
    windows = len(codes) - SHINGLE + 1
    inside = owner[:windows] == owner[SHINGLE - 1 :]
    mixed = codes[:windows].copy()
    for step in range(1, SHINGLE):
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed += codes[step : step + windows]
    return _scrambled(mixed[inside]), np.bincount(owner[:windows][inside], minlength=len(texts))


def _scrambled(values: Array) -> Array:
    """32 well-mixed bits of 64, as at the end of MurmurHash3."""
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values.astype(np.uint32)


def _is_wide(codes: Array) -> Array:
    """1 for the characters of Chinese, Japanese and Korean."""
    return (((codes >= 0x2E80) & (codes < 0xFB00)) | ((codes >= 0x20000) & (codes < 0x40000))).astype(np.int64)


def _candidates(minima: Array, filled: Array) -> Array:
    """Pairs [pairs, 2] of texts that agree in a whole band, ``first < second``, each once."""
    count = len(minima)
    keys = []
    for band in range(_BANDS):
        part = minima[:, band * _ROWS : (band + 1) * _ROWS].astype(np.uint64)
        key = part[:, 0]
        for row in range(1, _ROWS):
            key = key * np.uint64(0x9E3779B97F4A7C15) + part[:, row]
        order = np.argsort(key, kind="stable")
        order = order[filled[order]]
        ranked = key[order]
        for step in range(1, _NEIGHBOURS + 1):
            alike = np.flatnonzero(ranked[step:] == ranked[:-step])
            if not len(alike):
                break
            keys.append(order[alike].astype(np.int64) * count + order[alike + step])
    unique = np.unique(np.concatenate(keys)) if keys else np.zeros(0, np.int64)
    return np.stack([unique // count, unique % count], axis=1)


def _estimates(minima: Array, pairs: Array) -> Array:
    """The share of minima in which the texts of each pair agree."""
    result = np.zeros(len(pairs))
    for first in range(0, len(pairs), 1 << 16):
        part = pairs[first : first + (1 << 16)]
        result[first : first + len(part)] = (minima[part[:, 0]] == minima[part[:, 1]]).mean(axis=1)
    return result
