"""The language of a text by its letters: quick, and enough to see the languages of a data set."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

# The first code point of each script, and the first behind it. What lies between scripts belongs to none.
_RANGES: tuple[tuple[int, int, str], ...] = (
    (0x41, 0x5B, "Latin"), (0x61, 0x7B, "Latin"), (0xC0, 0x250, "Latin"), (0x370, 0x400, "Greek"),
    (0x400, 0x530, "Cyrillic"), (0x590, 0x600, "Hebrew"), (0x600, 0x780, "Arabic"), (0x900, 0x980, "Devanagari"),
    (0x980, 0x0E00, "other Indic"), (0x0E00, 0x0E80, "Thai"), (0x1100, 0x1200, "Korean"), (0x1E00, 0x1F00, "Latin"),
    (0x3040, 0x3100, "Japanese"), (0x3400, 0x4DC0, "Chinese"), (0x4E00, 0xA000, "Chinese"), (0xAC00, 0xD7B0, "Korean"),
    (0xF900, 0xFB00, "Chinese"), (0x20000, 0x32000, "Chinese"),
)  # fmt: skip
_NAMES = tuple(dict.fromkeys(name for _, _, name in _RANGES))
_EDGES = np.array([edge for begin, end, _ in _RANGES for edge in (begin, end)], np.uint32)
_CLASSES = np.zeros(2 * len(_RANGES) + 1, np.int64)
for _number, (_begin, _end, _name) in enumerate(_RANGES):
    _CLASSES[2 * _number + 1] = 1 + _NAMES.index(_name)
_CODE = re.compile(
    r"```|^\s*(?:def \w+\(|class \w+[(:]|import \w+|from \w+ import |#include|public (?:static |class )|function \w*\(|"
    r"(?:const|let|var) \w+ = |SELECT .+ FROM |<(?:html|div|table|body|script)\b|return\b.*;$)",
    re.MULTILINE,
)
# The share of letters that makes a text one of the script. (Japanese is written with Chinese characters as well.)
_JAPANESE, _OTHERS = 0.05, 0.3


def languages(texts: Sequence[str]) -> list[str]:
    """For each text the script of most of its letters, ``code`` for a program, or ``none`` without letters."""
    counts = np.zeros((len(texts), len(_NAMES) + 1), np.int64)
    for first in range(0, len(texts), 1024):
        part = texts[first : first + 1024]
        codes: Any = np.frombuffer("".join(part).encode("utf-32-le", "surrogatepass"), np.uint32)
        owner = np.repeat(np.arange(len(part)), [len(text) for text in part])
        classes = _CLASSES[np.searchsorted(_EDGES, codes, side="right")]
        flat = np.bincount(owner * counts.shape[1] + classes, minlength=len(part) * counts.shape[1])
        counts[first : first + len(part)] = flat.reshape(len(part), -1)
    return [_language(text, row) for text, row in zip(texts, counts[:, 1:].tolist(), strict=True)]


def looks_like_code(text: str) -> bool:
    """Whether the text holds a program, or a part of one."""
    return bool(_CODE.search(text))


def _language(text: str, counts: list[int]) -> str:
    letters = sum(counts)
    if not letters:
        return "none"
    if looks_like_code(text):
        return "code"
    found = Counter(dict(zip(_NAMES, counts, strict=True)))
    if found["Japanese"] >= _JAPANESE * letters:
        return "Japanese"
    # A Chinese character says as much as a word, and Latin names occur in any text.
    other = max((name for name in _NAMES if name != "Latin"), key=lambda name: found[name])
    return other if found[other] >= _OTHERS * letters else "Latin"
