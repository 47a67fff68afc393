"""A hash of a job's data, by which a resumed run knows its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from weft.data import Sample


def data_fingerprint(samples: Iterable[Sample], labels: Sequence[str], sizes: Mapping[str, int]) -> str:
    """SHA-256 of the tokenized samples in order, of the names of classes, and of named sets with their sizes."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.input_ids, sample.weights)).encode())
        if sample.target_ids:
            digest.update(repr(sample.target_ids).encode())
        if sample.label is not None:
            digest.update(repr((sample.label, sample.token_types)).encode())
        if sample.branches:
            digest.update(repr((sample.branches, sample.given)).encode())
        if sample.facts:
            digest.update(sample.facts.encode("utf-8", "surrogatepass"))
    if labels:
        digest.update(repr(tuple(labels)).encode())
    if sizes:
        digest.update(repr(list(sizes.items())).encode())
    return digest.hexdigest()
