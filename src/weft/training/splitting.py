"""Passes that are too large for the memory are made again as smaller ones, whose gradients add up to the same."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from weft.core.adapters import Adapters
from weft.errors import UserError
from weft.objectives.passes import Work
from weft.ops.seeds import stable_seed
from weft.training.batches import rows_of

# How torch says on a CPU that there is no memory.
_WORDS = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a computation ended because memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@dataclass
class Splitting:
    """The most tokens that a pass may have, once one had too many; None: none had.

    A checkpoint keeps ``limit``, for what shares a pass decides how sums are rounded. ``tell`` hears of every new one.
    """

    limit: int | None = None
    tell: Callable[[str], None] = lambda text: None
    _running: list[Work] = field(default_factory=list, repr=False)

    def pieces(self, adapters: Adapters, work: Sequence[Work]) -> list[list[Work]]:
        """The passes in which ``work`` is done, in its order. Where they can, they end between two jobs."""
        if self.limit is None:
            return [list(work)]
        found: list[list[Work]] = [[]]
        room = self.limit
        for one in work:
            size = _tokens(adapters, one)
            if size <= self.limit:
                if size > room:
                    found.append([])
                    room = self.limit
                found[-1].append(one)
                room -= size
                continue
            found += [[part] for part in self._cut(adapters, one)]
            room = 0
        return [passed for passed in found if passed]

    def _cut(self, adapters: Adapters, work: Work) -> list[Work]:
        """One job's samples in order, in parts of at most ``limit`` tokens or one sample."""
        assert self.limit is not None
        groups: list[list[int]] = []
        room = 0
        for index, sample in enumerate(work.samples):
            size = _tokens(adapters, replace(work, samples=[sample]))
            if not groups or size > room:
                groups.append([])
                room = self.limit
            groups[-1].append(index)
            room -= size
        # A seed fixes the numbers of a part by their place in it: the second part shall not draw those of the first.
        return [
            replace(
                work,
                samples=[work.samples[i] for i in group],
                seed=work.seed if work.seed is None or group[0] == 0 else stable_seed(work.seed, "part", group[0]),
            )
            for group in groups
        ]

    def begin(self, work: list[Work]) -> None:
        """Note what runs now."""
        self._running = work

    def halve(self, adapters: Adapters) -> None:
        """Let no pass be larger than half of the one that runs now, for which memory has run out.

        Raises:
            UserError: It is a single sequence.
        """
        total = sum(_tokens(adapters, work) for work in self._running)
        if sum(len(work.samples) for work in self._running) <= 1:
            name = self._running[0].adapter if self._running else None
            raise UserError(
                f"out of memory in a pass of one sequence of {total:,} tokens (job '{name}'), which cannot be split. "
                "Take gradient_checkpointing: true, offload_activations, a smaller max_length, or a quantised base."
            )
        self.limit = max(1, min(-(-total // 2), (self.limit or total) - 1))
        self.tell(
            f"memory ran out in a pass of {total:,} tokens; from here on passes have at most {self.limit:,}. The steps "
            "stay the same and take longer; only dropout and noise, where a job has some, are drawn anew within a "
            "part. A smaller pack_tokens avoids this."
        )


def _tokens(adapters: Adapters, work: Work) -> int:
    """The rows of a pass that one job's samples take."""
    virtual = 0 if work.adapter is None else adapters[work.adapter].num_virtual_tokens
    apart = work.judging is not None and not adapters.layout.can_share(work.part())
    return sum(rows_of(sample, virtual, apart=apart) for sample in work.samples)


def give_back(device: torch.device) -> None:
    """Free what a failed pass has left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
