"""Which samples make the micro-batches of each optimizer step: a function of the job's seed and the step alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from weft.data import Mixture, Sample
from weft.data.pack import pack_in_order
from weft.data.views import sizes
from weft.errors import UserError
from weft.train.settings import JobConfig


def size(sample: Sample) -> int:
    """Tokens of a sample that the model reads."""
    return len(sample.input_ids) + len(sample.target_ids)


class Batches:
    """The batches of one job.

    Without ``batch_tokens`` a micro-batch is ``batch_size`` samples; with it, a pack of up to that many tokens, made of
    the epoch's order by ``pack_in_order``. An epoch then may have some packs more or fewer than the one before, so what
    a step holds is found by going through the epochs before it (a tenth of a second each, for 40,000 samples).

    Args:
        virtual: learned tokens that the job's adapter puts into every sequence; they count towards ``batch_tokens``.
        mixture: how much of each source an epoch has; default: every sample once.

    Raises:
        UserError: a sample is longer than ``batch_tokens``; it is named.
    """

    def __init__(
        self, config: JobConfig, samples: Sequence[Sample], *, virtual: int = 0, mixture: Mixture | None = None
    ) -> None:
        self.config, self.mixture = config, mixture or Mixture((len(samples),))
        self.lengths: list[int] | None = None
        if config.batch_tokens is not None:
            self.lengths = (sizes(samples) + virtual).tolist()
            self._check_lengths(samples, config.batch_tokens, virtual)
        self._steps: dict[int, int] = {}
        self._latest: tuple[int, list[list[int]]] = (-1, [])
        self.total_steps = config.steps or max(1, self._planned())

    def __getitem__(self, step: int) -> list[list[int]]:
        """The indices of step ``step``, one list per micro-batch."""
        epoch, within = self.locate(step)
        count = self.config.gradient_accumulation_steps
        return self._batches(epoch)[within * count : (within + 1) * count]

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it)."""
        if self.lengths is None:
            return divmod(step, self.steps_in(0))
        for epoch in itertools.count():
            if step < self.steps_in(epoch):
                return epoch, step
            step -= self.steps_in(epoch)
        raise AssertionError

    def steps_in(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        if self.lengths is None:
            return self.config.planned_steps(self.mixture.per_epoch)[0]
        if epoch not in self._steps:
            self._steps[epoch] = math.ceil(len(self._batches(epoch)) / self.config.gradient_accumulation_steps)
        return self._steps[epoch]

    def _planned(self) -> int:
        if self.lengths is None:
            return self.config.planned_steps(self.mixture.per_epoch)[1]
        whole = int(self.config.epochs)
        rest = self.config.epochs - whole
        return sum(map(self.steps_in, range(whole))) + (round(rest * self.steps_in(whole)) if rest else 0)

    def _batches(self, epoch: int) -> list[list[int]]:
        if self._latest[0] != epoch:
            order = self.mixture.order(self.config.seed, epoch)
            if self.lengths is None or self.config.batch_tokens is None:
                found = [order[i : i + self.config.batch_size] for i in range(0, len(order), self.config.batch_size)]
            else:
                packs = pack_in_order([self.lengths[i] for i in order], self.config.batch_tokens)
                found = [[order[place] for place in one] for one in packs]
            self._latest = (epoch, found)
        return self._latest[1]

    def _check_lengths(self, samples: Sequence[Sample], capacity: int, virtual: int) -> None:
        assert self.lengths is not None
        longest = max(range(len(samples)), key=self.lengths.__getitem__, default=None)
        if longest is not None and self.lengths[longest] > capacity:
            learned = f" and the {virtual} learned ones of its adapter" * bool(virtual)
            raise UserError(
                f"{samples[longest].source}: job '{self.config.name}': {size(samples[longest])} tokens{learned} do not "
                f"fit into batch_tokens: {capacity}; sequences are never cut to fit. Set batch_tokens to "
                f"{self.lengths[longest]} or more, or a max_length (and truncate) of {capacity - virtual} or less."
            )
