"""Several processes make samples of records, in the order of the records.

One process reads the file; chunks of records go out, samples come back. A tokenizer is sent to each worker once. The
processes are started afresh (``spawn``), because a copy of a process with threads may stand still for ever.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from weft.errors import UserError
from weft.extensions import load_extension, loaded_files

_CHUNK = 512  # records
_SIZE = 1 << 18  # a chunk of large records has fewer: while it is made, a token takes some 200 bytes
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    items: Iterable[Item],
    make: Callable[[list[Item]], list[Result]],
    workers: int,
    size: Callable[[Item], int] = lambda item: 0,
) -> Iterator[Result]:
    """The results of ``make`` for all items, in order; this process makes them if ``workers`` is 0.

    ``make`` gets some hundred items at once. Each worker is sent it once.

    ``size`` gives the size of an item (in characters, say): large ones go to the workers in smaller chunks. No more
    items are taken ahead than keep the workers busy.

    Raises:
        UserError: A worker dies, or ``workers`` is negative; and whatever ``make`` raises.
    """
    if workers < 0:
        raise UserError(f"data_workers is {workers}; expected 0 (none) or the number of processes.")
    chunks = _chunks(items, size)
    first = list(itertools.islice(chunks, 2)) if workers else []
    if len(first) < 2:  # a single chunk is not worth the seconds that a process takes to start
        for chunk in itertools.chain(first, chunks):
            yield from make(chunk)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(make, loaded_files()))
    waiting: deque[Future[list[Result]]] = deque()
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


def _chunks(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    held = 0
    for item in items:
        chunk.append(item)
        held += size(item)
        if len(chunk) == _CHUNK or held >= _SIZE:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


_worker_make: Callable[[list], list]  # what this worker process does


def _begin(make: Callable[[list], list], extensions: Sequence[Path]) -> None:
    global _worker_make
    _worker_make = make
    for file in extensions:  # those that the user has loaded
        load_extension(file)


def _make(chunk: list) -> list:
    return _worker_make(chunk)
