"""Forgetting: the loss of an adapted base on text of the kind it was pre-trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weft.core.adapters import Adapters
from weft.data import PlainText, Renderer, Sample
from weft.objectives.passes import evaluate_loss


def read_documents(path: str | Path) -> list[str]:
    """One document per line; a line break inside one is written as ``\\n``."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line.replace("\\n", "\n") for line in lines if line.strip()]


def text_samples(renderer: Renderer, documents: Sequence[str]) -> list[Sample]:
    """Plain-text samples in which every token counts."""
    return [renderer.sample(PlainText(text, f"document {i + 1}")) for i, text in enumerate(documents)]


def text_loss(adapters: Adapters, name: str | None, samples: Sequence[Sample]) -> float:
    """The mean negative log-likelihood per token under adapter ``name`` (None: the plain base)."""
    return evaluate_loss(adapters, name, samples)
