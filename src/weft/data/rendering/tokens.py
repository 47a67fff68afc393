"""Tokenise text piece by piece, so that ids depend neither on what follows a seam nor on commands in the data.

A rendering holds text of two kinds. In the text of the template, control tokens and soft-prompt markers count. In the
text of the data, the same characters are only characters. ``guard`` marks the latter before rendering.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from weft.errors import UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

SOFT = "<|soft|>"  # in a chat template: the place of the virtual tokens of a soft prompt

# Two of Unicode's noncharacters enclose the number of a piece of text that must not become a control token.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_GUARDED = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_ANCHOR = "\n"

# The ids of a batch of texts, by (text, whether its control tokens are only characters).
KnownIds = Mapping[tuple[str, bool], list[int]]


class Encoder:
    """One tokenizer, for pieces of a sequence. Its state never changes.

    ``head`` and ``tail`` are the special tokens that the tokenizer itself puts around a text (Llama: BOS; T5: an EOS
    after it; BERT: one on either side). ``bos`` is ``head`` if that is the BOS alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from transformers import PreTrainedTokenizerFast

        if not hasattr(tokenizer, "bos_token_id"):
            raise UserError(
                f"a renderer takes a tokenizer (weft.load_base(...).tokenizer), not {type(tokenizer).__name__}."
            )
        self.tokenizer = tokenizer
        usual_call = getattr(type(tokenizer), "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus
        self._backend = tokenizer.backend_tokenizer if usual_call else None
        self._literals = special_texts(tokenizer, _OPEN, SOFT)
        self._numbers = {text: number for number, text in enumerate(self._literals)}
        self._control = re.compile("|".join(map(re.escape, self._literals)))
        bare, usual = self._tokens("a"), list(tokenizer("a", verbose=False)["input_ids"])
        # Found by a trial: `add_bos_token` is False on fast tokenizers whose post-processor adds one nevertheless.
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
        """Replace texts of control tokens and markers, at any depth, by a mark that templates pass through."""
        if isinstance(value, str):
            return self._control.sub(lambda found: f"{_OPEN}{self._numbers[found[0]]}{_CLOSE}", value)
        if isinstance(value, dict):
            return {self.guard(key): self.guard(item) for key, item in value.items()}
        return [self.guard(item) for item in value] if isinstance(value, list) else value

    def encode(self, text: str, *, first: bool, known: KnownIds | None = None) -> tuple[list[int], list[int]]:
        """``(ids, slots)`` of one piece of a rendering; ``first`` if it begins the sequence.

        Guarded text becomes ordinary tokens again. SOFT becomes no token but a slot, which is the place in the ids that
        it precedes. ``known`` (from ``learn``) saves calls of the tokenizer and changes no result.
        """
        ids: list[int] = []
        slots: list[int] = []
        for piece, literal in self._pieces(text):
            if piece is None:
                slots.append(len(ids))
            else:
                ids += self._piece(piece, literal, known, first=first and not ids)
        return ids, slots

    def spell(self, text: str, *, first: bool) -> list[tuple[str, int]]:
        """For each id of ``encode``: the characters that it adds to those before it, and where in ``text`` it begins.

        With a tokenizer that has no offsets, a token has the text that it decodes to, and begins where its piece does.
        """
        found: list[tuple[str, int]] = []
        at = 0
        for part in re.split(f"({re.escape(SOFT)}|{_GUARDED.pattern.replace('(', '(?:')})", text):
            mark = _GUARDED.fullmatch(part)
            if part and part != SOFT:
                piece = self._literals[int(mark[1])] if mark else part
                for start, shown in self._shown(piece, mark is not None, first=first and not found):
                    found.append((shown, at if mark else at + start))
            at += len(part)
        return found

    def _shown(self, piece: str, literal: bool, *, first: bool) -> list[tuple[int, str]]:
        ids = self._piece(piece, literal, first=first)
        if not self.tokenizer.is_fast:
            return [(0, str(self.tokenizer.decode([token]))) for token in ids]
        anchored = not first and self._tokens(_ANCHOR + piece, literal)[len(self._anchor) :] == ids and self._anchor
        before = _ANCHOR if anchored else ""
        encoded = self._call(before + piece, literal, return_offsets_mapping=True)
        shown, told = [], 0
        offsets = encoded["offset_mapping"][len(encoded["input_ids"]) - len(ids) :]
        for number, (start, end) in enumerate(offsets):
            start, end = max(start - len(before), 0), max(end - len(before), 0)
            # A character is shown at its last token, and all that is left at the last token of all.
            last = number + 1 == len(offsets)
            shared = not last and offsets[number + 1][0] - len(before) < end
            stop = len(piece) if last else told if shared else end
            shown.append((start, piece[told:stop]))
            told = max(told, stop)
        return shown

    def learn(self, texts: Iterable[tuple[str, bool]]) -> KnownIds:
        """Tokenise ``(text, first)`` of many samples at once, for ``encode``: a tenth of the time of single calls."""
        wanted: dict[
            tuple[str, bool], None
        ] = {}  # a dict, because its order is the same in every process; that of a set is not
        for text, first in texts:
            for piece, literal in self._pieces(text):
                if piece is not None:
                    wanted[piece if first or not self._anchor else _ANCHOR + piece, literal] = None
                    first = False
        known: dict[tuple[str, bool], list[int]] = {}
        for literal in (False, True):
            batch = [text for text, kind in wanted if kind is literal]
            if batch:
                found = self._batch(batch, literal)
                known.update(zip(((text, literal) for text in batch), found, strict=True))
        return known

    def _batch(self, texts: list[str], literal: bool) -> list[list[int]]:
        if self._backend is None:
            return list(self._call(texts, literal)["input_ids"])
        # A call of the tokenizer sets the same each time, but also computes offsets and throws them away.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = literal or self.tokenizer.split_special_tokens
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def spells(self, text: str) -> bool:
        """Whether ``text`` is one token of this tokenizer."""
        return len(self._tokens(text)) == 1

    def _pieces(self, text: str) -> Iterator[tuple[str | None, bool]]:
        """The pieces to tokenise apart, each with whether its control tokens are only characters; None for a slot."""
        for part_number, part in enumerate(text.split(SOFT)):
            if part_number:
                yield None, False
            if _OPEN not in part:
                if part:
                    yield part, False
                continue
            for number, piece in enumerate(_GUARDED.split(part)):
                if piece:
                    yield (self._literals[int(piece)], True) if number % 2 else (piece, False)

    def missing_head(self, ids: list[int], *, bos_only: bool = True) -> list[int]:
        """The special tokens to put before ``ids``, or none if the template has written them."""
        head = self.bos if bos_only else self.head
        return [] if ids[: len(head)] == head else head

    def missing_tail(self, ids: list[int]) -> list[int]:
        """The special tokens to put after ``ids``, or none if the template has written them."""
        return [] if ids[len(ids) - len(self.tail) :] == self.tail else self.tail

    def _piece(self, text: str, literal: bool, known: KnownIds | None = None, *, first: bool) -> list[int]:
        if self._anchor and not first:
            ids = self._tokens(_ANCHOR + text, literal, known)
            if ids[: len(self._anchor)] == self._anchor:
                return ids[len(self._anchor) :]
        return self._tokens(text, literal, known)

    def _tokens(self, text: str, literal: bool = False, known: KnownIds | None = None) -> list[int]:
        if known is not None and (ids := known.get((text, literal))) is not None:
            return ids
        return list(self._call(text, literal)["input_ids"])

    def _call(self, text: str | list[str], literal: bool, **options: bool) -> BatchEncoding:
        if literal:
            options["split_special_tokens"] = True
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)


def special_texts(tokenizer: PreTrainedTokenizerBase, *more: str) -> list[str]:
    """The texts of all special tokens, and ``more``; longest first, so that no prefix wins."""
    texts = {str(text) for text in tokenizer.all_special_tokens} | set(more)
    texts |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(filter(None, texts), key=lambda text: (-len(text), text))
