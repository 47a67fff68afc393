"""Forgetting: text of the kind that a base was pre-trained on, for its loss before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weft.data import PlainText, Renderer, Sample


def read_documents(path: str | Path) -> list[str]:
    """One document per line; a line break inside one is written as ``\\n``."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line.replace("\\n", "\n") for line in lines if line.strip()]


def text_samples(renderer: Renderer, documents: Sequence[str]) -> list[Sample]:
    """Plain-text samples in which every token counts."""
    return [renderer.sample(PlainText(text, f"document {i + 1}")) for i, text in enumerate(documents)]
