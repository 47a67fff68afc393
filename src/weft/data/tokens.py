"""Tokenise text piece by piece, so that ids depend neither on what follows a seam nor on what data seems to command.

A rendering holds text of two kinds: what the template wrote, whose control tokens and soft-prompt markers count, and
what came from the data, where the same characters are only characters. ``guard`` tells them apart before rendering.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOFT = "<|soft|>"  # written in a chat template: the virtual tokens of a soft prompt stand here

# Two of Unicode's noncharacters enclose the number of a piece of text that must not become a control token.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_GUARDED = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_ANCHOR = "\n"


class Encoder:
    """One tokenizer, used on pieces of a sequence. Holds no state that changes.

    ``head`` and ``tail`` are the special tokens that the tokenizer itself puts around a text (Llama: BOS; T5: an EOS
    after it; BERT: one on either side); ``bos`` is ``head`` where that is the BOS and nothing else.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._controls = _control_texts(tokenizer)
        self._control = re.compile("|".join(re.escape(text) for text in self._controls))
        bare, usual = self._tokens("a"), list(tokenizer("a", verbose=False)["input_ids"])
        # Measured, for `add_bos_token` is False on fast tokenizers whose post-processor adds it all the same.
        bos = tokenizer.bos_token_id
        self.bos = [bos] if isinstance(bos, int) and usual[: 1 + len(bare)] == [bos, *bare] else []
        starts = range(len(usual) - len(bare) + 1)
        start = next((i for i in starts if usual[i : i + len(bare)] == bare), None)
        self.head = self.bos if start is None else usual[:start]
        self.tail = [] if start is None else usual[start + len(bare) :]
        # Sentencepiece-like tokenizers put a space before whatever they are given, which is wrong in mid-text.
        anchor, anchored = self._tokens(_ANCHOR), self._tokens(_ANCHOR + "a")
        prefixes = bool(anchor) and anchored[: len(anchor)] == anchor and anchored[len(anchor) :] != bare
        self._anchor = anchor if prefixes else []

    def guard(self, value: Any) -> Any:
        """Replace what reads like a control token or a marker, at any depth, by a mark that templates pass through."""
        if isinstance(value, str):
            return self._control.sub(lambda found: f"{_OPEN}{self._controls[found[0]]}{_CLOSE}", value)
        if isinstance(value, dict):
            return {self.guard(key): self.guard(item) for key, item in value.items()}
        return [self.guard(item) for item in value] if isinstance(value, list) else value

    def encode(self, text: str, *, first: bool) -> tuple[list[int], list[int]]:
        """``(ids, slots)`` of one piece of a rendering; ``first`` if it begins the sequence.

        Guarded text becomes ordinary tokens again; SOFT becomes no token but a slot: the place in ids that it precedes.
        """
        ids: list[int] = []
        slots: list[int] = []
        texts = list(self._controls)
        for part_number, part in enumerate(text.split(SOFT)):
            if part_number:
                slots.append(len(ids))
            for number, piece in enumerate(_GUARDED.split(part)):
                literal = number % 2 == 1
                if piece:
                    ids += self._piece(texts[int(piece)] if literal else piece, literal, first=first and not ids)
        return ids, slots

    def missing_head(self, ids: list[int], *, bos_only: bool = True) -> list[int]:
        """The special tokens to put before ``ids``: none if the template has written them already."""
        head = self.bos if bos_only else self.head
        return [] if ids[: len(head)] == head else head

    def missing_tail(self, ids: list[int]) -> list[int]:
        """The special tokens to put after ``ids``, likewise."""
        return [] if ids[len(ids) - len(self.tail) :] == self.tail else self.tail

    def _piece(self, text: str, literal: bool, *, first: bool) -> list[int]:
        if self._anchor and not first:
            ids = self._tokens(_ANCHOR + text, literal)
            if ids[: len(self._anchor)] == self._anchor:
                return ids[len(self._anchor) :]
        return self._tokens(text, literal)

    def _tokens(self, text: str, literal: bool = False) -> list[int]:
        options = {"split_special_tokens": True} if literal else {}
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])


def _control_texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Texts that only a template may command with, numbered, longest first (so that no prefix wins)."""
    texts = {str(text) for text in tokenizer.all_special_tokens}
    texts |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = {text for text in texts if text} | {_OPEN, SOFT}
    return {text: number for number, text in enumerate(sorted(texts, key=lambda text: (-len(text), text)))}
