"""What answers, by its contents: answers of one target are not those of another under the same name."""

from __future__ import annotations

from collections.abc import Sequence

from weft.generation.identity import content_hash
from weft.generation.target import Target
from weft.methods.dense import how_kept
from weft.training.same_run import base_fingerprint


def contents(opened: Target, who: Sequence[str | None]) -> dict[str, object]:
    """What answers, by its contents: the base, and each of these adapters."""
    print_of = {key: value for key, value in base_fingerprint(opened.base).items() if key != "model"}
    base = {**print_of, **how_kept(opened.base.model, opened.adapters.dtype)}
    hashes = {f"adapter '{name}'": content_hash(opened.adapters[name]) for name in who if name is not None}
    return {"the base": base, **hashes}
