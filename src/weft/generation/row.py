"""One text that is being written: a request on its way through the engine."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from weft.core.adapters import Adapters
from weft.generation.blocks import Block
from weft.generation.request import Request
from weft.layouts.end_to_end import interleave

# Symbols of a text beside token ids: virtual token j is -1 - j, learned key j is _KEYS - j.
_KEYS = -(1 << 40)


class Row:
    """A request, and how far its text has come.

    Attributes:
        symbols: the text as the base sees it: token ids, virtual tokens and learned keys (negative), and the answer.
        owner: the adapter that was asked; None: the base.
        root: whose text it is: equal symbols under equal roots have equal keys and values. None: they are not shared.
        ids: the answer so far.
        blocks: where its keys and values lie.
        done: how many symbols have theirs there.
        shared: how many blocks at its head others have, or will have, computed.
        cached: how many of its prompt's tokens were there when it began; None: it has not begun.
        twin: a row with the same text, which computes for both.
    """

    def __init__(self, request: Request, adapters: Adapters) -> None:
        self.request = request
        self.root: Hashable = None
        self.owner = None if request.adapter is None else adapters[request.adapter]
        self.symbols = text_symbols(adapters, request)
        self.ids: list[int] = []
        self.blocks: list[Block] = []
        self.done = self.shared = 0
        self.cached: int | None = None
        self.twin: Row | None = None

    @property
    def adapter(self) -> str | None:
        """Who answers."""
        return self.request.adapter

    @property
    def left(self) -> int:
        """How many symbols have no keys and values yet."""
        return len(self.symbols) - self.done

    def take(self, token: int) -> None:
        """Let the answer go on with a token."""
        self.ids.append(token)
        self.symbols.append(token)


def text_symbols(adapters: Adapters, request: Request) -> list[int]:
    """The prompt's symbols, with what the adapter has learned among them."""
    tokens = list(request.prompt)
    if request.adapter is None:
        return tokens
    adapter = adapters[request.adapter]
    keys = [_KEYS - j for j in range(adapter.num_prefix_tokens)]
    if not adapter.num_virtual_tokens:
        return [*keys, *tokens]
    runs = adapter.places(len(tokens), adapter.head.answer(len(tokens), len(tokens)), request.slots)
    own, virtual = interleave(len(tokens), runs, 0)
    found = [0] * (len(own) + len(virtual))
    for place, token in zip(own, tokens, strict=True):
        found[place] = token
    for number, place in enumerate(virtual):
        found[place] = -1 - number
    return [*keys, *found]


def virtual_number(symbol: int) -> int | None:
    """Which virtual token a symbol is; None: it is a token."""
    return -1 - symbol if _KEYS < symbol < 0 else None


def sorted_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of the base first, then those of each adapter side by side."""
    return sorted(rows, key=lambda row: row.adapter or "")
