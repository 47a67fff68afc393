"""Prompts that a policy is to answer: the question of a record, and all that the record says for the rewards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weft.data.formats.detect import to_example
from weft.data.formats.examples import Conversation
from weft.data.pipeline import TOO_LONG, Acceptance, Omission, Outcome
from weft.data.queries import QueryRecipe
from weft.data.reading.rows import Record
from weft.data.rendering.sample import TooLongError
from weft.data.sources import number_of
from weft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PromptRecipe(QueryRecipe):
    """The recipe for prompts. The ``facts`` of a sample are the fields of its record; ``answer`` is the right answer,
    if the record has one."""

    def of(self, records: Sequence[Record]) -> list[Outcome]:
        """The outcomes of records, one for each."""
        found = []
        for record in records:
            outcome = self._outcome(record)
            if isinstance(outcome, Acceptance):
                outcome = self._with_facts(record, outcome)
            found.append(outcome)
        return found

    def _with_facts(self, record: Record, outcome: Acceptance) -> Outcome:
        (sample,) = outcome.samples
        head, settings = len(self.renderer.encoder.bos), self.renderer.settings
        try:
            start, stop = settings.cut_ids(sample.input_ids, record.source, "the prompt", head=head)
            if stop > start and settings.truncation != "left":
                raise TooLongError(f"{record.source}: the prompt is {len(sample.input_ids)} tokens long, max_length is "
                                   f"{settings.max_length}. A prompt that is to be answered is cut by truncation: left "
                                   "alone, for the answer follows its end.")  # fmt: skip
        except TooLongError as error:
            if self.renderer.truncation == "drop":
                return Omission(source=record.source, why=TOO_LONG)
            return self.refused(error, "render", record)
        if stop > start:
            ids = sample.input_ids[:start] + sample.input_ids[stop:]
            slots = tuple(slot if slot <= start else slot - (stop - start) for slot in sample.slots
                          if not start < slot < stop)  # fmt: skip
            sample = replace(sample, input_ids=ids, weights=[0.0] * len(ids), slots=slots, cut=stop - start)
        facts = {"answer": self._answer(record), **_plain(record.fields)}
        text = json.dumps(facts, ensure_ascii=False, default=str)
        key = number_of(hashlib.sha256(repr(sample.input_ids).encode()).hexdigest()) if self.keyed else 0
        return Acceptance(source=record.source, samples=(replace(sample, facts=text),), key=key)

    def _answer(self, record: Record) -> str | None:
        """The last answer of a record that has one."""
        own = self.settings
        try:
            example = to_example(record, format=own.data_format, columns=own.columns, purpose="any")
        except UserError:
            return None
        if isinstance(example, Conversation) and example.messages[-1].role == "assistant":
            return example.messages[-1].content
        return None


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that hold something."""
    return {key: value for key, value in fields.items() if value is not None}
