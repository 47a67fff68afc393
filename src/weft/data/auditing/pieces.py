"""A sample token by token: which text each stands for, made fit to be shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from weft.data.rendering.render import Sample

_BYTES = 4  # of UTF-8, and so tokens, that one character may be spread over


@dataclass(frozen=True, slots=True)
class Piece:
    """One token. ``text`` is what it adds to the decoded text: nothing, if a later token ends its character."""

    position: int
    id: int
    token: str
    _: KW_ONLY
    text: str
    weight: float
    special: bool
    part: bool  # of a character that is spread over several tokens


def pieces(tokenizer: Any, sample: Sample) -> list[Piece]:
    """The tokens of a sample with the texts they stand for; of a sequence-to-sequence sample also the targets'."""
    found = _pieces(tokenizer, sample.input_ids, sample.weights)
    if sample.target_ids:
        found += _pieces(tokenizer, sample.target_ids, [1.0] * len(sample.target_ids))
    return found


def _pieces(tokenizer: Any, ids: Sequence[int], weights: Sequence[float]) -> list[Piece]:
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = tokenizer.convert_ids_to_tokens([int(number) for number in ids])
    texts = decoded(tokenizer, ids)
    return [
        Piece(
            place, int(number), str(token), text=text or "", weight=float(weight), special=number in special, part=part
        )
        for place, (number, token, weight, (text, part)) in enumerate(zip(ids, tokens, weights, texts, strict=True))
    ]


def decoded(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, bool]]:
    """For each token the text it adds, and whether it is only a part of a character (the last part has its text)."""

    def decode(some: Sequence[int]) -> str:
        return str(tokenizer.decode([int(number) for number in some], clean_up_tokenization_spaces=False))

    result: list[tuple[str, bool]] = []
    # The token before tells a sentencepiece decoder that the text does not begin here.
    start = begin = 0
    before = ""
    for place in range(len(ids)):
        text = decode(ids[start : place + 1])
        if text.endswith("\ufffd"):
            # Bytes that are no character yet, or text that holds this very character: what comes next tells.
            ahead = range(place + 2, min(place + 1 + _BYTES, len(ids) + 1))
            if any(not decode(ids[start:end]).startswith(text) for end in ahead):
                result.append(("", True))
                continue
        added = text[len(before) :] if text.startswith(before) else decode(ids[begin : place + 1])
        result.append((added, place > begin))
        if added:
            start, begin = begin, place + 1
            before = decode(ids[start:begin])
    return result


def visible(text: str) -> str:
    """Text in which nothing is hidden: line ends, tabs, control characters and invisible ones as signs."""
    return "".join(_SIGNS.get(letter) or _shown(letter) for letter in text)


_HIDDEN = {"Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp", "Zs"}
_SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def _shown(letter: str) -> str:
    hidden = letter not in " \u3000" and unicodedata.category(letter) in _HIDDEN
    return f"⟨{ord(letter):04X}⟩" if hidden else letter
