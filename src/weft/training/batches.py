"""The samples of each optimizer step and their packing into passes: a function of seed and step alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from weft.core import head
from weft.data import Mixture, Sample
from weft.data.pack import pack, pack_in_order
from weft.data.views import sizes
from weft.errors import UserError
from weft.training.settings import JobConfig


class Batches:
    """The batches of one job. Each optimizer step has a list of packs; a pack goes through the model at once.

    Without ``batch_tokens`` a step is ``batch_size`` × ``gradient_accumulation_steps`` samples, packed by best fit into
    passes of at most ``capacity`` tokens. How they are packed changes the number of passes and no result, for a step's
    loss is the mean over its own learned tokens. With ``batch_tokens`` a step is ``gradient_accumulation_steps`` packs
    of up to that many tokens, made of the epoch's order by ``pack_in_order``. An epoch then may have some packs more or
    fewer than the one before, so what a step holds is found by going through the epochs before it (a tenth of a second
    each, for 40,000 samples).

    Args:
        virtual: learned tokens that the job's adapter puts into every sequence; they count as tokens of it.
        mixture: how much of each source an epoch has; default: every sample once.
        apart: judged answers of a record do not have the rows of their prompt in common.

    Attributes:
        capacity: ``batch_tokens``, ``pack_tokens``, or without them the tokens of the fullest ``batch_size`` samples in
            the first epoch's order: no pass is ever larger than what not packing would have come to in that epoch.

    Raises:
        UserError: a sample is longer than ``batch_tokens`` or ``pack_tokens``; it is named.
    """

    def __init__(
        self, config: JobConfig, samples: Sequence[Sample], *, virtual: int = 0, mixture: Mixture | None = None,
        apart: bool = False,
    ) -> None:
        self.config, self.mixture = config, mixture or Mixture((len(samples),))
        self.lengths: list[int] = (
            [rows_of(sample, virtual, apart=True) for sample in samples]
            if apart
            else (sizes(samples) + virtual).tolist()
        )
        for key in ("batch_tokens", "pack_tokens"):
            if (limit := getattr(config, key)) is not None:
                self._check_lengths(samples, key, limit, virtual)
        self._steps: dict[int, int] = {}
        self._latest: tuple[int, list[list[int]]] = (-1, [])
        self.capacity = config.batch_tokens or config.pack_tokens or self._fullest()
        self.total_steps = config.steps or max(1, self._planned()) * config.iterations

    def __getitem__(self, step: int) -> list[list[int]]:
        """The indices of step ``step``, one list per pack."""
        epoch, within = self.locate(step)
        count = self.config.gradient_accumulation_steps
        batches = self.unpacked(epoch)[within * count : (within + 1) * count]
        return batches if self.config.batch_tokens is not None else self._packed(batches)

    def in_order(self, step: int) -> list[int]:
        """The indices of a step in the epoch's order, however they are packed."""
        epoch, within = self.locate(step)
        count = self.config.gradient_accumulation_steps
        return [index for batch in self.unpacked(epoch)[within * count : (within + 1) * count] for index in batch]

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the step's number within it."""
        if self.config.batch_tokens is None:
            return divmod(step, self.steps_in(0))
        for epoch in itertools.count():
            if step < self.steps_in(epoch):
                return epoch, step
            step -= self.steps_in(epoch)
        raise AssertionError

    def steps_in(self, epoch: int) -> int:
        """The number of optimizer steps in an epoch."""
        if self.config.batch_tokens is None:
            return self.config.planned_steps(self.mixture.per_epoch)[0]
        if epoch not in self._steps:
            self._steps[epoch] = math.ceil(len(self.unpacked(epoch)) / self.config.gradient_accumulation_steps)
        return self._steps[epoch]

    def tokens(self, indices: Sequence[int]) -> int:
        """The number of tokens that samples take of a pack, with their virtual tokens."""
        return sum(self.lengths[index] for index in indices)

    def _planned(self) -> int:
        if self.config.batch_tokens is None:
            return self.config.planned_steps(self.mixture.per_epoch)[1]
        whole = int(self.config.epochs)
        rest = self.config.epochs - whole
        return sum(map(self.steps_in, range(whole))) + (math.ceil(rest * self.steps_in(whole) - 1e-9) if rest else 0)

    def unpacked(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch in order: ``batch_size`` samples each, or packs of up to ``batch_tokens`` tokens."""
        if self._latest[0] != epoch:
            order = self.mixture.order(self.config.seed, epoch)
            if self.config.batch_tokens is None:
                found = [order[i : i + self.config.batch_size] for i in range(0, len(order), self.config.batch_size)]
            else:
                packs = pack_in_order([self.lengths[i] for i in order], self.config.batch_tokens)
                found = [[order[place] for place in one] for one in packs]
            self._latest = (epoch, found)
        return self._latest[1]

    def _fullest(self) -> int:
        return max(itertools.chain(map(self.tokens, self.unpacked(0)), self.lengths), default=1)

    def _packed(self, batches: list[list[int]]) -> list[list[int]]:
        """Pack a step's samples into as few passes as best fit finds, each in the step's order."""
        order = [index for batch in batches for index in batch]
        if self.tokens(order) <= self.capacity:
            return [order]
        packs = [[order[i] for i in sorted(one)] for one in pack([self.lengths[i] for i in order], self.capacity)]
        # Best fit does not always find the fewest packs. If the batches are as few already, they stay as they are.
        as_they_come = len(batches) <= len(packs) and all(self.tokens(batch) <= self.capacity for batch in batches)
        return batches if as_they_come else packs

    def _check_lengths(self, samples: Sequence[Sample], key: str, limit: int, virtual: int) -> None:
        longest = max(range(len(samples)), key=self.lengths.__getitem__, default=None)
        if longest is not None and self.lengths[longest] > limit:
            learned = f" and the {virtual} learned ones of its adapter" * bool(virtual)
            raise UserError(
                f"{samples[longest].source}: job '{self.config.name}': {samples[longest].size} tokens{learned} do not "
                f"fit into {key}: {limit}; sequences are never cut to fit. Set {key} to {self.lengths[longest]} or "
                f"more, or a max_length (and truncation) of {limit - virtual} or less."
            )


def rows_of(sample: head.Sample, virtual: int, *, apart: bool) -> int:
    """The rows that a sample takes of a batch with so many virtual tokens; ``apart`` as of ``Batches``."""
    each = sample.each if apart else ()
    return sum(one.size + virtual for one in each) if len(each) > 1 else sample.size + virtual
