"""The embedded default: two tiny pre-trained bases, their tokenizer, and an instruction set with exact answers.

Everything here was made by ``python tools/build_bases.py`` from the made-up world of `weft.assets.world`.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent
EMBEDDED_MODELS = ("tiny-llama", "tiny-bloom")
SPLITS = ("train", "eval")


def model_path(name: str) -> Path:
    """The folder of an embedded base, for ``from_pretrained``."""
    if name not in EMBEDDED_MODELS:
        raise ValueError(f"no embedded model {name!r}; there are: {', '.join(EMBEDDED_MODELS)}")
    return ROOT / name


def instructions_path(split: str) -> Path:
    """The instruction set as JSON lines: ``train``, or ``eval`` with questions about other things."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are: {', '.join(SPLITS)}")
    return ROOT / "instructions" / f"{split}.jsonl"


def base_text_path() -> Path:
    """Documents of the pre-training distribution, one per line, that pre-training has not seen: to measure forgetting.

    A line break inside a document is written as ``\\n``.
    """
    return ROOT / "base_text.txt"
