"""Work that is cut by hand between the cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")


def one_thread_each(work: Callable[[list[Part]], None], parts: Sequence[Part], threads: int = 0) -> None:
    """Call ``work`` with the parts, dealt to so many threads (0: as many as torch has), in each of which torch has one.

    torch cuts every single operation between the threads. Where one of several cannot be cut, each core reads what
    another has just written: bringing it over took longer than the operations.
    """
    threads = min(threads or torch.get_num_threads(), len(parts))
    if threads < 2:
        work(list(parts))
        return
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, [list(parts[first::threads]) for first in range(threads)]))
    finally:
        # A thread's number is also what threads begin with that come later.
        torch.set_num_threads(before)
