"""Data whose answers were judged: pairs, rankings and verdicts become samples with their answers side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from weft.data.formats.detect import to_example
from weft.data.formats.examples import Conversation, Judged, LabelledAnswer, ScoredAnswer
from weft.data.formats.fields import short
from weft.data.formats.judged import parted
from weft.data.formats.turns import EmptyAnswerError
from weft.data.pipeline import EMPTY, TOO_LONG, Acceptance, Omission, Outcome, Recipe
from weft.data.reading.rows import Record
from weft.data.rendering.judged import beside, conversations
from weft.data.rendering.render import Renderer
from weft.data.rendering.sample import Sample, TooLongError
from weft.data.settings import ReadSettings
from weft.data.sources import content_key, number_of
from weft.errors import UserError

Judgement = Literal["preference", "kto", "scores"]
_SCORE = "score"
_MEANT = {"margin": "by how much the better answer is better", _SCORE: "how good the answer is"}


@dataclass(frozen=True, kw_only=True)
class JudgedRecipe(Recipe):
    """The recipe for judged answers: ``preference`` reads pairs and rankings, ``kto`` answers with a verdict.

    ``scores`` reads a conversation of any format beside a field ``score``. The label of a sample with a verdict is 1
    (good) or 0 (bad). A record's ``margin`` is by how much the better answer is better: of a pair, and of every pair of
    a ranking.
    """

    settings: ReadSettings = field(default_factory=ReadSettings)
    judgement: Judgement = "preference"

    @cached_property
    def _whole(self) -> Renderer:
        """A renderer of the same settings that cuts nothing."""
        own = self.renderer.settings
        if own.train_on == "all":
            raise UserError("train_on: all is for texts that are learned whole; of judged answers only the answers "
                            "are. Leave it out.")  # fmt: skip
        return Renderer(self.renderer.tokenizer, own.model_copy(update={"max_length": None, "documents": "separate"}))

    def of(self, records: Sequence[Record]) -> list[Outcome]:
        """The outcomes of records, one for each."""
        found = [self._recognised(record) for record in records]
        read = [one for one in found if not isinstance(one, Outcome)]
        rendered = self._whole.outcomes(talk for _, example in read for talk in conversations(example))
        outcomes: list[Outcome] = []
        for one in found:
            if isinstance(one, Outcome):
                outcomes.append(one)
                continue
            made = [next(rendered) for _ in conversations(one[1])]
            outcomes.append(self._made(*one, made))
        return outcomes

    def _recognised(self, record: Record) -> tuple[Record, Judged] | Outcome:
        own = self.settings
        try:
            if self.judgement == "scores":
                return record, self._scored(record)
            example = to_example(record, format=own.data_format, columns=own.columns, purpose=self.judgement)
        except EmptyAnswerError as error:
            if own.empty_answers == "skip":
                return Omission(source=record.source, why=EMPTY)
            return self.refused(error, "empty_answer", record)
        except UserError as error:
            return self.refused(error, "format", record)
        assert isinstance(example, Judged)
        return record, example

    def _scored(self, record: Record) -> ScoredAnswer:
        own, name = self.settings, _SCORE
        score = _number(record, name)
        if score is None:
            there = ", ".join(record.fields)
            raise UserError(f"{record.source}: an answer with its score was expected: the fields of a conversation and "
                            f"'{name}', a number. It has {there}.")  # fmt: skip
        rest = Record({key: value for key, value in record.fields.items() if key != name}, record.source)
        read = to_example(rest, format=own.data_format, columns=own.columns, purpose="sft")
        if not isinstance(read, Conversation):
            raise UserError(f"{record.source}: a question and its answer were expected beside '{name}'.")
        at = parted(read, record, name)
        return ScoredAnswer(read.messages[:at], read.messages[at:], score, source=record.source, tools=read.tools)

    def _made(self, record: Record, example: Judged, made: Sequence[tuple[Sample, ...] | UserError]) -> Outcome:
        try:
            for one in made:
                if isinstance(one, UserError):
                    raise one
            samples = [sample for one in made if not isinstance(one, UserError) for sample in one]
            whole = beside(samples, self.renderer.settings, head=len(self.renderer.encoder.bos))
            label = int(example.label) if isinstance(example, LabelledAnswer) else None
            given = example.score if isinstance(example, ScoredAnswer) else _number(record, "margin") or 0.0
            whole = replace(whole, label=label, given=given)
        except UserError as error:
            if isinstance(error, TooLongError) and self.renderer.truncation == "drop":
                return Omission(source=record.source, why=TOO_LONG)
            return self.refused(error, "render", record, example)
        key = number_of(content_key(example)) if self.keyed else 0
        return Acceptance(source=record.source, samples=(whole,), key=key, example=example if self.watched else None)


def _number(record: Record, name: str) -> float | None:
    """The number that a record's field gives; None: it has no such field.

    Raises:
        UserError: It is no finite number.
    """
    value: Any = record.fields.get(name)
    if value is None:
        return None
    try:
        found = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{record.source}: '{name}' must be a number, {_MEANT[name]}; found {short(value)}.")
    return found
