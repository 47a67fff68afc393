"""The view of one data set, for the terminal, a page and JSON alike."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from weft.data.auditing.audit import findings_json
from weft.data.auditing.base import Finding, Item
from weft.data.auditing.pieces import pieces
from weft.data.rendering.sample import Sample
from weft.preview.data_sets import DataSet
from weft.preview.packing import Place


class View:
    """All that a preview shows of one data set."""

    def __init__(
        self, data_set: DataSet, findings: Sequence[Finding], figures: dict[str, Any], shown: Sequence[Item]
    ) -> None:
        self.data_set, self.findings, self.figures, self.shown = data_set, list(findings), figures, list(shown)
        self.packings = [packing.figures() for packing in data_set.packings]

    @functools.cached_property
    def _numbers(self) -> dict[int, int]:
        """The number of every training sample, by its identity."""
        items = self.data_set.windows or [item for item in self.data_set.items if item.split == "train"]
        return {id(sample): number for number, sample in enumerate(sample for item in items for sample in item.samples)}

    @functools.cached_property
    def _lines(self) -> Counter[str]:
        """How many records stand on each line."""
        return Counter(source for source, _ in {(item.source, item.number) for item in self.data_set.items})

    def line(self, finding: Finding) -> str:
        """The line that the finding is about, with the record's number if several stand there; "" for all the data."""
        return f"{finding.source} (record {finding.number:,})" if self._lines[finding.source] > 1 else finding.source

    def place(self, sample: Sample) -> Place | None:
        """The place of a sample in the first jobs' first epoch; None if it is held out, or a mixture has it later."""
        packings = self.data_set.packings
        number = self._numbers.get(id(sample)) if packings else None
        return None if number is None else packings[0].places.get(number)

    def json(self) -> dict[str, Any]:
        """The view as JSON holds it."""
        return {
            "jobs": list(self.data_set.names),
            "statistics": self.figures,
            "packing": self.packings,
            "not_reached": {name: missed.json() for name, missed in self.data_set.not_reached.items()},
            "notes": self.data_set.notes,
            "findings": findings_json(self.findings),
            "samples": [self._sample(item) for item in self.shown],
        }

    def _sample(self, item: Item) -> dict[str, Any]:
        tokenizer = self.data_set.facts.tokenizer
        found = [pieces(tokenizer, sample) for sample in item.samples]
        keys = ("position", "id", "token", "text", "weight")
        return {
            "source": item.source,
            "split": item.part,
            "label": item.label,
            "length": item.length,
            "problem": item.problem[1] if item.problem else None,
            "places": [dataclasses.asdict(place) if place else None for place in map(self.place, item.samples)],
            "sequences": [[{key: getattr(piece, key) for key in keys} for piece in one] for one in found],
        }
