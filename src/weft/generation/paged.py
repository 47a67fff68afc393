"""Continuous batching over the packed stream: in every pass each text brings the tokens that have no keys yet.

A text that is being written brings one, a new prompt a piece of itself. So rows join and leave at every step, and a
long prompt never stops the others. Which blocks of the cache a text has, is a matter of ``weft.generation.blocks``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain, groupby
from typing import final

import torch
from torch import Tensor

from weft.core.adapters import Adapters
from weft.core.route import Segment, StreamRoute
from weft.core.stream import Stream
from weft.generation.blocks import Block, Blocks
from weft.generation.identity import Identities
from weft.generation.pool import Pass, Piece, Pool
from weft.generation.request import Request
from weft.generation.row import Row, sorted_rows, virtual_number
from weft.generation.together import Together
from weft.generation.way import Way
from weft.ops.sequence_layout import SequenceLayout


@final
class Paged(Way):
    """Rows of any length in the stream, with their keys and values in blocks."""

    def __init__(
        self,
        adapters: Adapters,
        shares: Callable[[Request], bool],
        *,
        blocks: int,
        block_tokens: int,
        prefill_tokens: int,
    ) -> None:
        """``shares``: whether others may use the keys and values of a request's text, and it may use theirs."""
        self.adapters, self.prefill_tokens = adapters, prefill_tokens
        self._identities = Identities(adapters)
        self._together, self._shares = Together(adapters, self._identities), shares
        self.blocks, self.pool = Blocks(blocks), Pool(blocks, block_tokens)
        self.rows: list[Row] = []
        self._pushed: list[Row] = []

    def add(self, row: Row) -> bool:
        size = self.pool.block_tokens
        # Not when it was asked: a step of training may have come since.
        row.root = self._identities.of(row.adapter) if self._shares(row.request) else None
        if (twin := self._twin_of(row)) is not None:
            return self._follow(row, twin)
        # The last symbol is always computed: what it gives, chooses the next token.
        found = (
            [] if row.root is None else self.blocks.find(row.root, row.symbols, size, (len(row.symbols) - 1) // size)
        )
        need = -(-len(row.symbols) // size) - len(found)
        taken: list[Block] = []
        # One more stays free for every row that is being written: else they would push this one out at once.
        if self.blocks.free >= need + len(self.rows):
            taken = [block for block in (self.blocks.take() for _ in range(need)) if block is not None]
        if len(taken) < need:
            self.blocks.release(found)
            return False
        row.blocks, row.shared = [*found, *taken], len(found)
        row.done = size * len(found)
        if row.cached is None:
            row.cached = sum(symbol >= 0 for symbol in row.symbols[: row.done])
        for index in range(len(found), len(row.symbols) // size):
            self._name(row, index)
        self.rows.append(row)
        return True

    def _twin_of(self, row: Row) -> Row | None:
        """A row that is computing the same text now."""
        if row.root is None:
            return None
        same = (other for other in self.rows if other.root == row.root and other.twin is None and not other.ids)
        return next((other for other in same if other.left and other.symbols == row.symbols), None)

    def _follow(self, row: Row, twin: Row) -> bool:
        """Let a row take over what its twin computes: full blocks are shared, of the last one it gets a copy."""
        full = len(row.symbols) // self.pool.block_tokens
        open_block = self.blocks.take() if len(row.symbols) % self.pool.block_tokens else None
        if open_block is None and len(row.symbols) % self.pool.block_tokens:
            return False
        for block in twin.blocks[:full]:
            block.uses += 1
        row.blocks = [*twin.blocks[:full], *([] if open_block is None else [open_block])]
        row.shared, row.done, row.twin = full, 0, twin
        if row.cached is None:
            row.cached = sum(symbol >= 0 for symbol in row.symbols)
        self.rows.append(row)
        return True

    def drop(self, row: Row) -> None:
        self.rows.remove(row)
        for other in [o for o in self.rows if o.twin is row]:
            self._push_out(other)
        broken = {id(block) for block in row.blocks[row.shared :] if not block.ready and block.uses > 1}
        self.blocks.release(row.blocks)
        row.blocks, row.done, row.shared, row.twin = [], 0, 0, None
        # Others wait for what this row will not compute: they begin again.
        for other in [o for o in self.rows if broken and any(id(b) in broken for b in o.blocks[: o.shared])]:
            self._push_out(other)

    def pushed_out(self) -> list[Row]:
        pushed, self._pushed = self._pushed, []
        return pushed

    def step(self) -> list[tuple[list[Row], Tensor]]:
        chosen = self._choose()
        if not chosen:
            return []
        rows = sorted_rows(list(chosen))
        hidden = self._forward(rows, [chosen[row] for row in rows])
        ends = list(accumulate(chosen[row] for row in rows))
        for row in rows:
            self._count(row, chosen[row])
        whole = [
            (each, end - 1)
            for row, end in zip(rows, ends, strict=True)
            if row.left == 0
            for each in (row, *self._followers(row))
        ]
        if not whole:
            return []
        places = torch.tensor([place for _, place in whole], device=hidden.device)
        return [([row for row, _ in whole], hidden[places])]

    def _followers(self, row: Row) -> list[Row]:
        """The rows for which this one has computed; from now on they go on by themselves."""
        followers = [other for other in self.rows if other.twin is row]
        for other in followers:
            other.twin, other.done = None, row.done
            if other.blocks[-1] is not row.blocks[len(other.blocks) - 1]:
                self.pool.copy_block(row.blocks[len(other.blocks) - 1].number, other.blocks[-1].number)
        return followers

    def _choose(self) -> dict[Row, int]:
        """How many symbols of which rows go through the next pass."""
        for row in list(self.rows):
            if row.blocks and row.left == 1 and row.twin is None:
                self._grow(row)
        chosen: dict[Row, int] = {}
        budget = self.prefill_tokens
        for row in self.rows:
            if row.twin is not None or (row.shared and not row.blocks[row.shared - 1].ready):
                continue  # another row computes what it begins with
            self._begin(row)
            count = row.left
            if count > 1 and row.root is not None:
                count = min(count, budget)
            if count > 1 and budget <= 0:
                continue
            if count > 0:
                chosen[row] = count
                budget -= count if row.left > 1 else 0
        return chosen

    def _begin(self, row: Row) -> None:
        """Put the adapter's learned keys at the head of a row, where no other row has."""
        adapter = None if row.adapter is None else self.adapters[row.adapter]
        if adapter is not None and row.done < adapter.num_prefix_tokens:
            numbers = [block.number for block in row.blocks]
            self.pool.store_prefix(adapter.prefix_states(), numbers, self.adapters.dtype)
            self._count(row, adapter.num_prefix_tokens - row.done)

    def _count(self, row: Row, count: int) -> None:
        """``count`` more symbols of the row have their keys and values."""
        size, before = self.pool.block_tokens, row.done
        row.done += count
        for index in range(before // size, row.done // size):
            self._name(row, index)
            row.blocks[index].ready = True

    def _name(self, row: Row, index: int) -> None:
        if row.root is not None:
            size = self.pool.block_tokens
            before = row.blocks[index - 1].chain if index else row.root
            self.blocks.name(row.blocks[index], before, row.symbols[index * size : (index + 1) * size])

    def _grow(self, row: Row) -> None:
        """Give the row room for its next token; the newest rows leave if there is none."""
        while len(row.symbols) > len(row.blocks) * self.pool.block_tokens and row.blocks:
            block = self.blocks.take()
            if block is not None:
                row.blocks.append(block)
                continue
            self._push_out(self.rows[-1])

    def _push_out(self, row: Row) -> None:
        if row in self.rows:
            self.drop(row)
            self._pushed.insert(0, row)

    def _forward(self, rows: Sequence[Row], counts: Sequence[int]) -> Tensor:
        """Last hidden states [N, d] of these rows' next ``counts`` symbols."""
        device, shape = self.adapters.device, self.adapters.architecture
        pieces = [Piece([b.number for b in row.blocks], row.done, n) for row, n in zip(rows, counts, strict=True)]
        symbols = [row.symbols[row.done : row.done + n] for row, n in zip(rows, counts, strict=True)]
        positions = [shape.first_position + p for piece in pieces for p in range(piece.past, piece.past + piece.count)]
        segments: list[Segment] = []
        virtual: dict[int, tuple[list[int], list[int]]] = {}
        start = 0
        for name, found in groupby(zip(rows, symbols, strict=True), key=lambda pair: pair[0].adapter):
            texts = [own for _, own in found]
            own_lengths = tuple(map(len, texts))
            for place, symbol in enumerate(chain.from_iterable(texts), start):
                if (number := virtual_number(symbol)) is not None:
                    at, numbers = virtual.setdefault(len(segments), ([], []))
                    at.append(place)
                    numbers.append(number)
            segments.append(Segment(name, sum(own_lengths), len(texts), lengths=own_lengths))
            start += sum(own_lengths)
        lengths = tuple(counts)
        # Only tables of positions that look at a whole sequence ask where each one ends.
        layout = SequenceLayout.build(lengths, device=device) if shape.install_tables and max(lengths) > 1 else None
        together = None if self.adapters.exact else self._together.of(segments)
        # The same objects: a function may keep something for a segment between two modules of a block.
        kept = segments if together is None else together.segments
        stream = Stream(
            input_ids=torch.tensor([max(symbol, 0) for own in symbols for symbol in own], device=device),
            position_ids=torch.tensor(positions, device=device),
            lengths=lengths,
            rows=tuple(range(end - n, end) for n, end in zip(lengths, accumulate(lengths), strict=True)),
            virtual_rows={group: torch.tensor(at, device=device) for group, (at, _) in virtual.items()},
            virtual_numbers={group: torch.tensor(which, device=device) for group, (_, which) in virtual.items()},
            prefix_length=(0,) * len(rows),
            route=StreamRoute(
                tuple(kept),
                layout,
                cache=Pass(self.pool, pieces, device),
                exact=self.adapters.exact,
                together=together,
            ),
            standing=tuple(end - 1 for end in accumulate(lengths)),
        )
        return self.adapters.forward(stream)
