"""Log-probabilities in the forms of chats and of completions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from weft.generation.request import Token
from weft.generation.text import decode
from weft.serve.answers import OldLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOWEST = -9999.0  # OpenAI's figure for what is impossible; JSON has no infinity
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BROKEN = "�"
_BLANK = "▁"  # a blank, in sentencepiece's vocabularies


class TokenTexts:
    """The text and the bytes of single tokens, also of those that are a part of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def of(self, token: int) -> tuple[str, bytes]:
        """The text of a token, with a sign for bytes that are no character, and its bytes."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        piece = piece if isinstance(piece, str) else ""
        if found := _BYTE.fullmatch(piece):
            raw = bytes([int(found[1], 16)])
            return raw.decode("utf-8", errors="replace"), raw
        text = decode(self.tokenizer, [token])
        if not text:  # a control token, or a blank that the decoder drops at the head of a text
            text = piece.replace(_BLANK, " ")
            return text, text.encode()
        letters = _letters()
        if _BROKEN in text and all(letter in letters for letter in piece):
            raw = bytes(letters[letter] for letter in piece)
            return raw.decode("utf-8", errors="replace"), raw
        if piece.startswith(_BLANK) and not text.startswith(" "):
            text = f" {text}"
        return text, text.encode("utf-8", errors="replace")

    def top(self, token: int, logprob: float) -> TopLogprob:
        """A token that could have stood there."""
        text, raw = self.of(token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}

    def entry(self, token: Token) -> TokenLogprob:
        """A token that stands there."""
        chosen = self.top(token.id, token.logprob if token.logprob is not None else _LOWEST)
        return {**chosen, "top_logprobs": [self.top(*one) for one in token.top]}

    def old(self, tokens: Sequence[Token], offset: int, wanted: int) -> OldLogprobs:
        """The four lists of a completion; ``offset``: where the first token begins in the text."""
        texts = [self.of(token.id)[0] for token in tokens]
        starts = [offset]
        for text in texts:
            starts.append(starts[-1] + len(text))
        tops = [{self.of(other)[0]: finite(value) for other, value in token.top} for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [finite(token.logprob if token.logprob is not None else _LOWEST) for token in tokens],
            "top_logprobs": tops if wanted else None,
            "text_offset": starts[:-1],
        }


def finite(value: float) -> float:
    """A log-probability as JSON can hold it."""
    return max(value, _LOWEST)


@cache
def _letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes: printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
