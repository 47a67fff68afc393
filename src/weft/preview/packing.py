"""The packs that the model sees, step by step, as figures and as places: for previews."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from weft.data import Sample
from weft.training.batches import Batches


@dataclass(frozen=True)
class Place:
    """Where a sample lies in the first epoch: optimizer step, pack of that step (both from 1), rows of the pack."""

    step: int
    pack: int
    begin: int
    end: int


@dataclass(frozen=True)
class Packing:
    """The packs of some jobs (``names``) that read the same ``samples`` and batch them alike."""

    names: tuple[str, ...]
    samples: Sequence[Sample]
    batches: Batches

    @functools.cached_property
    def epoch(self) -> list[list[list[int]]]:
        """The first epoch: the packs of every step, each a list of samples."""
        return [self.batches[step] for step in range(self.batches.steps_in(0))]

    @functools.cached_property
    def places(self) -> dict[int, Place]:
        """The place of every sample of the first epoch. (A mixture leaves some out.)"""
        found = {}
        for step, packs in enumerate(self.epoch, start=1):
            for number, pack in enumerate(packs, start=1):
                begin = 0
                for index in pack:
                    end = begin + self.batches.lengths[index]
                    found[index] = Place(step, number, begin, end)
                    begin = end
        return found

    def figures(self) -> dict[str, object]:
        """The figures as JSON holds them. ``padding`` counts the pad tokens of batches padded to their longest."""
        packs = [pack for step in self.epoch for pack in step]
        largest = max(map(self.batches.tokens, packs))
        padded, held = self._padded()
        config = self.batches.config
        return {
            "jobs": list(self.names),
            "batch_size": None if config.batch_tokens else config.batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "capacity": self.batches.capacity,
            "steps": len(self.epoch),
            "packs": len(packs),
            "largest": largest,
            "fill": round(sum(map(self.batches.tokens, packs)) / (len(packs) * largest), 4),
            "padding": {"tokens": padded - held, "share": round((padded - held) / padded, 4) if padded else 0.0},
            "first_step": [[self._entry(index) for index in pack] for pack in self.epoch[0]],
        }

    def _entry(self, index: int) -> dict[str, object]:
        place = self.places[index]
        sample = self.samples[index]
        return {"source": sample.source, "tokens": sample.size, "begin": place.begin, "end": place.end}

    def _padded(self) -> tuple[int, int]:
        """The size in tokens of padded batches, and of the samples in them."""
        lengths = self.batches.lengths
        groups = [[lengths[index] for index in group] for group in self.batches.unpacked(0)]
        return sum(max(group) * len(group) for group in groups), sum(map(sum, groups))
