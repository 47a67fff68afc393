"""The text of token ids while they come: a character that takes several tokens appears when it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Decoding gives this for bytes that are no character, or not yet.
_BROKEN = "�"


class TextStream:
    """Collects one answer's tokens; ``push`` gives the text that has become certain."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """Take one more token; returns the new text, which may be empty."""
        self.ids.append(token)
        text = decode(self.tokenizer, self.ids)
        # Some decoders change their last characters when the next token comes (a space, a joined sign): hold them back.
        if text.endswith(_BROKEN) or not text.startswith(self._shown):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new

    def flush(self) -> str:
        """What is left at the end, without a character that was cut off in the middle."""
        text = decode(self.tokenizer, self.ids).rstrip(_BROKEN)
        return text[len(self._shown) :] if text.startswith(self._shown) else ""


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer, without control tokens and with every space as the model wrote it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
