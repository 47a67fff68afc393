"""Figures of a data set: lengths of records, learned tokens, languages."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from weft.data.auditing.base import Finding, Item
from weft.data.auditing.scripts import languages
from weft.data.auditing.stream import Tokens
from weft.data.views import Array, samples_of

_BARS = 12


def statistics(items: Sequence[Item], *, findings: Iterable[Finding] = ()) -> dict[str, Any]:
    """Figures of the records of one split, as JSON holds them.

    ``duplicates`` are counted from ``findings``.
    """
    usable = [item for item in items if item.samples]
    samples = [sample for item in usable for sample in item.samples]
    tokens = Tokens(samples_of(samples))
    learned = int(tokens.learned.sum())
    lengths = np.array([item.length for item in usable], np.int64)
    total = sum(sample.size for sample in samples)
    mine = {item.number for item in items}
    copies = Counter(finding.code for finding in findings if finding.number in mine)
    result: dict[str, Any] = {
        "records": len(items),
        "usable": len(usable),
        "unusable": len(items) - len(usable),
        "samples": len(samples),
        "lengths": _lengths(lengths),
        "histogram": _histogram(lengths),
        "tokens": total,
        "learned_tokens": learned,
        "learned_share": round(learned / total, 4) if total else 0.0,
        "weights": _weights(tokens),
        "truncated": sum(any(sample.cut for sample in item.samples) for item in usable),
        "duplicates": copies["duplicate"],
        "near_duplicates": copies["near-duplicate"],
        "languages": dict(Counter(languages([item.text for item in items if item.text])).most_common()),
        "sources": _sources(items),
    }
    labels = Counter(item.label for item in items if item.label is not None)
    if labels:
        result["labels"] = dict(labels.most_common())
    return result


def _lengths(lengths: Array) -> dict[str, int]:
    """Lengths in tokens, before anything was cut."""
    if not len(lengths):
        return {}
    marks = {"median": 50, "p95": 95, "p99": 99}
    # The smallest length that this share of records does not exceed. So it is a length that occurs.
    found = {name: int(np.percentile(lengths, share, method="inverted_cdf")) for name, share in marks.items()}
    return {"min": int(lengths.min()), **found, "max": int(lengths.max())}


def _histogram(lengths: Array) -> list[dict[str, int]]:
    """Counts of lengths, in steps of equal width up to the 99th percentile. The last step holds all longer ones."""
    if not len(lengths):
        return []
    width = max(1, math.ceil(float(np.percentile(lengths, 99)) / _BARS))
    step = max(1, 10 ** (len(str(width)) - 1) // 2)
    width = math.ceil(width / step) * step
    places = np.minimum(lengths // width, _BARS)
    counts = np.bincount(places, minlength=1)
    bars = [{"from": i * width, "to": (i + 1) * width - 1, "count": int(count)} for i, count in enumerate(counts)]
    bars[-1]["to"] = max(bars[-1]["to"], int(lengths.max()))
    return bars


def _weights(tokens: Tokens) -> dict[str, int]:
    """The number of tokens with each loss weight."""
    values, counts = np.unique(tokens.weights, return_counts=True)
    return {f"{value:g}": int(count) for value, count in zip(values.tolist(), counts.tolist(), strict=True)}


def _sources(items: Iterable[Item]) -> dict[str, dict[str, int]]:
    """Per file: records, tokens (after cutting), learned tokens."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"records": 0, "tokens": 0, "learned_tokens": 0})
    for item in items:
        file = item.source.rpartition(":")[0] or item.source
        entry = found[file]
        entry["records"] += 1
        for sample in item.samples:
            entry["tokens"] += sample.size
            entry["learned_tokens"] += sample.learned
    return dict(found)
