"""The text of token ids while they come: a character that takes several tokens appears when it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from weft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Decoding gives this for bytes that are no character, or not yet.
_BROKEN = "�"
# A character has four bytes at most. Behind so many tokens it is known that no character will come of them.
_PATIENCE = 16


class TextStream:
    """Collects one answer's tokens; ``push`` gives the text that has become certain.

    A decoder looks at a token's neighbours (a first space goes, bytes join into a character). So new tokens are decoded
    behind those that were shown last, and no others: what a token costs does not depend on the length of the answer.
    The pieces together are the text of the whole answer. They differ where byte tokens (``<0xE4>``) make a character
    and others that are none follow at once: a decoder then takes back the character, and the stream does not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._before: list[int] = []  # the tokens that were shown last
        self._new: list[int] = []  # those that were not shown yet
        self._anchor: list[int] = []  # one token that was text by itself, to stand before new ones

    def push(self, token: int) -> str:
        """Take one more token; returns the new text, which may be empty."""
        self.ids.append(token)
        if self._is_silent(token):
            return ""
        self._new.append(token)
        text = decode(self.tokenizer, [*self._before, *self._new])
        if text.endswith(_BROKEN) and len(self._new) <= _PATIENCE:
            return ""
        text = self._behind(text)
        if len(self._new) == 1 and text:
            self._anchor = self._new
        self._before, self._new = self._new, []
        return text

    def flush(self) -> str:
        """What is left at the end, without a character that was cut off in the middle."""
        if not self._new:
            return ""
        text = self._behind(decode(self.tokenizer, [*self._before, *self._new])).rstrip(_BROKEN)
        self._before, self._new = self._new, []
        return text

    def _is_silent(self, token: int) -> bool:
        """Whether the token is a control token or none at all: decoders never see it."""
        if decode(self.tokenizer, [token]):
            return False
        return bool(self.tokenizer.decode([token])) or self.tokenizer.convert_ids_to_tokens(token) is None

    def _behind(self, text: str) -> str:
        """What the new tokens add to what was shown, where ``text`` is that of both."""
        for before in (self._before, self._anchor):
            shown = decode(self.tokenizer, before)
            if before is not self._before:
                text = decode(self.tokenizer, [*before, *self._new])
            if text.startswith(shown):
                return text[len(shown) :]
        return decode(self.tokenizer, self._new)


class StopStrings:
    """Lets text through up to the first stop string, and holds back what could become the beginning of one.

    The answer ends as soon as a stop string is whole; of two that are whole at once, the longer one ended it. How the
    text is cut into pieces plays no part.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """``stops``: may be none.

        Raises:
            UserError: one is empty, or is no string.
        """
        for stop in [stops] if isinstance(stops, str) else stops:
            if not isinstance(stop, str) or not stop:
                raise UserError(f"stop has {stop!r}; expected strings that are not empty.")
        self.stops = (stops,) if isinstance(stops, str) else tuple(stops)
        self.found: str | None = None  # the stop string that ended the answer
        self._held = ""

    def push(self, text: str) -> str:
        """Take more text; returns what is certain to be the answer's. Behind a stop string nothing is."""
        if self.found is not None or not text:
            return ""
        text = self._held + text
        places = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self.stops if stop in text]
        if places:
            end, _, self.found = min(places)
            self._held = ""
            return text[: end - len(self.found)]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of an answer without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[len(text) - n :])), 0)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer, without control tokens and with every space as the model wrote it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
