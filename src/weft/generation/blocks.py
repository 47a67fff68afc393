"""The blocks of a cache: which are free, who uses which, and which hold the beginning of a text that comes again.

A text's keys and values lie in blocks of some tokens each, in any order. A full block may serve every text that begins
with the same tokens under the same adapter. It is found by what it holds and by the block before it (a chain, so that
equal tokens at other places are another block): tokens are compared, never a hash of them.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from weft.errors import UserError

# What a block is found by: the chain of the block before it (at the root: whose text it is), and its own tokens.
Key = tuple[Hashable, tuple[int, ...]]


class Block:
    """One block in use: ``number`` is its place in the pool, ``uses`` says how many texts hold it.

    ``chain`` stands for everything up to its end. ``ready`` says whether its keys and values are there.
    """

    __slots__ = ("chain", "key", "number", "ready", "uses")

    def __init__(self, number: int, chain: int) -> None:
        self.number, self.chain = number, chain
        self.uses = 1
        self.key: Key | None = None
        self.ready = False


class Blocks:
    """All blocks of a pool. Blocks that nobody uses keep what they hold until they are needed: the oldest go first."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise UserError("the cache has no room for a single block of tokens; give it more bytes.")
        self.count = count
        self._unused = list(range(count - 1, -1, -1))
        self._known: dict[Key, Block] = {}
        self._idle: OrderedDict[int, Block] = OrderedDict()  # by number
        self._chains = itertools.count()

    @property
    def free(self) -> int:
        """How many blocks could be taken now."""
        return len(self._unused) + len(self._idle)

    @property
    def used(self) -> int:
        """How many blocks texts hold."""
        return self.count - self.free

    def take(self) -> Block | None:
        """A block for new tokens; None if all are in use."""
        if self._unused:
            return Block(self._unused.pop(), next(self._chains))
        if not self._idle:
            return None
        number, oldest = self._idle.popitem(last=False)
        if oldest.key is not None:
            del self._known[oldest.key]
        return Block(number, next(self._chains))

    def find(self, root: Hashable, tokens: Sequence[int], size: int, most: int) -> list[Block]:
        """The blocks that hold the beginning of ``tokens``, ``most`` at most; the caller uses them from now on."""
        found: list[Block] = []
        before = root
        for index in range(min(most, len(tokens) // size)):
            block = self._known.get((before, tuple(tokens[index * size : (index + 1) * size])))
            if block is None:
                break
            found.append(block)
            before = block.chain
        for block in found:
            block.uses += 1
            self._idle.pop(block.number, None)
        return found

    def name(self, block: Block, before: Hashable, tokens: Sequence[int]) -> None:
        """Let ``block`` be found by the tokens that it holds, or will hold, after ``before``; the first one stays."""
        key = (before, tuple(tokens))
        if block.key is None and key not in self._known:
            block.key = key
            self._known[key] = block

    def release(self, blocks: Sequence[Block]) -> None:
        """One text lets go of its blocks. The last ones are the first to be given away: beginnings come again."""
        for block in reversed(blocks):
            block.uses -= 1
            if block.uses:
                continue
            if block.key is not None and block.ready:
                self._idle[block.number] = block
                continue
            if block.key is not None:
                del self._known[block.key]
            self._unused.append(block.number)

    def forget(self) -> None:
        """Let no block be found again; blocks in use stay."""
        for block in self._known.values():
            block.key = None
        self._known.clear()
        self._unused.extend(self._idle)
        self._idle.clear()
