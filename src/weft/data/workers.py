"""Records to samples in several processes, in the order of the records.

The file is read in the one process; chunks of records go out, samples come back. A tokenizer is sent to each worker
once. The processes are started afresh (``spawn``): a copy of a process with threads may stand still for ever.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Protocol, TypeVar

from weft.errors import UserError
from weft.extensions import load_extension, loaded_files

_CHUNK = 512  # records
_SIZE = 1 << 18  # or fewer, if they are large: a token of a chunk in the making takes some 200 bytes
Item = TypeVar("Item", contravariant=True)
Made = TypeVar("Made")
I = TypeVar("I")  # noqa: E741
M = TypeVar("M")


class Maker(Protocol[Item, Made]):
    """What is done to items, some hundred at once; it is sent to the workers once."""

    def make(self, items: Sequence[Item], /) -> list[Made]: ...


def in_order(
    items: Iterable[I], maker: Maker[I, M], workers: int, size: Callable[[I], int] = lambda item: 0
) -> Iterator[M]:
    """The results of ``maker.make`` for every item, in order; made in this process if ``workers`` is 0.

    ``size`` gives the size of an item (in characters, say): large ones go to the workers in smaller chunks. No more
    items are taken ahead than keep the workers busy.

    Raises:
        UserError: A worker dies, or ``workers`` is negative; also all that ``make`` raises.
    """
    if workers < 0:
        raise UserError(f"data_workers is {workers}; expected 0 (none) or the number of processes.")
    chunks = _chunks(items, size)
    if not workers:
        for chunk in chunks:
            yield from maker.make(chunk)
        return
    first = list(itertools.islice(chunks, 2))
    if len(first) < 2:  # not worth the seconds that a process takes to start
        for chunk in first:
            yield from maker.make(chunk)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(maker, loaded_files()))
    waiting: deque[Future[list[M]]] = deque()
    try:
        for chunk in itertools.chain(first, chunks):
            waiting.append(pool.submit(_make, chunk))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a data worker ended before its work was done (out of memory, or a script without "
            '`if __name__ == "__main__":`). Set data_workers: 0 to read in one process.'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(items: Iterable[I], size: Callable[[I], int]) -> Iterator[list[I]]:
    chunk: list[I] = []
    held = 0
    for item in items:
        chunk.append(item)
        held += size(item)
        if len(chunk) == _CHUNK or held >= _SIZE:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


_maker: Maker


def _begin(maker: Maker, extensions: Sequence[Path]) -> None:
    global _maker
    _maker = maker
    for file in extensions:  # those that the user has loaded
        load_extension(file)


def _make(chunk: list) -> list:
    return list(_maker.make(chunk))
