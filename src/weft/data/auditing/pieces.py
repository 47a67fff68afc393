"""A sample token by token, with the text of each token made fit to be shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from weft.data.rendering.render import Sample

_BYTES = 4  # and so tokens, of one character in UTF-8


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token. ``text`` is what it adds to the decoded text: nothing, if a later token ends its character."""

    position: int
    id: int
    token: str
    _: KW_ONLY
    text: str
    weight: float
    special: bool
    part: bool  # of a character that takes several tokens


def pieces(tokenizer: Any, sample: Sample) -> list[TokenText]:
    """The tokens of a sample with their texts; those of the targets follow in a sequence-to-sequence sample."""
    found = _pieces(tokenizer, sample.input_ids, sample.weights)
    if sample.target_ids:
        found += _pieces(tokenizer, sample.target_ids, [1.0] * len(sample.target_ids))
    return found


def _pieces(tokenizer: Any, ids: Sequence[int], weights: Sequence[float]) -> list[TokenText]:
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = tokenizer.convert_ids_to_tokens([int(number) for number in ids])
    texts = decoded(tokenizer, ids)
    return [
        TokenText(
            place, int(number), str(token), text=text or "", weight=float(weight), special=number in special, part=part
        )
        for place, (number, token, weight, (text, part)) in enumerate(zip(ids, tokens, weights, texts, strict=True))
    ]


def decode(tokenizer: Any, ids: Iterable[int]) -> str:
    """Tokens as text, special ones included."""
    return str(tokenizer.decode([int(number) for number in ids], clean_up_tokenization_spaces=False))


def decoded(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, bool]]:
    """For each token the text that it adds, and whether it is a part of a character. The last part has the text."""
    result: list[tuple[str, bool]] = []
    # The token before tells a sentencepiece decoder that the text does not begin here.
    start = begin = 0
    before = ""
    for place in range(len(ids)):
        text = decode(tokenizer, ids[start : place + 1])
        if text.endswith("\ufffd"):
            # Either the bytes are no character yet, or the text holds this very character. The next tokens tell.
            ahead = range(place + 2, min(place + 1 + _BYTES, len(ids) + 1))
            if any(not decode(tokenizer, ids[start:end]).startswith(text) for end in ahead):
                result.append(("", True))
                continue
        added = text[len(before) :] if text.startswith(before) else decode(tokenizer, ids[begin : place + 1])
        result.append((added, place > begin))
        if added:
            start, begin = begin, place + 1
            before = decode(tokenizer, ids[start:begin])
    return result


def visible(text: str) -> str:
    """Text without anything hidden: line ends, tabs, control characters and invisible ones become signs."""
    return "".join(_SIGNS.get(letter) or _shown(letter) for letter in text)


_HIDDEN = {"Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp", "Zs"}
_SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def _shown(letter: str) -> str:
    hidden = letter not in " \u3000" and unicodedata.category(letter) in _HIDDEN
    return f"⟨{ord(letter):04X}⟩" if hidden else letter
