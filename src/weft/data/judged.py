"""Data whose answers were judged: pairs, rankings and verdicts become samples with their answers side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from weft.data.formats.detect import to_example
from weft.data.formats.examples import Judged, LabelledAnswer, Preference, Ranking
from weft.data.formats.fields import short
from weft.data.formats.turns import EmptyAnswerError
from weft.data.pipeline import EMPTY, TOO_LONG, Acceptance, Omission, Outcome, Recipe
from weft.data.reading.rows import Record
from weft.data.rendering.judged import beside, conversations
from weft.data.rendering.render import Renderer
from weft.data.rendering.sample import Sample, TooLongError
from weft.data.settings import ReadSettings
from weft.data.sources import content_key, number_of
from weft.errors import UserError

Judgement = Literal["preference", "kto"]


@dataclass(frozen=True, kw_only=True)
class JudgedRecipe(Recipe):
    """The recipe for judged answers: ``preference`` reads pairs and rankings, ``kto`` answers with a verdict.

    The label of a sample with a verdict is 1 (good) or 0 (bad). A record's ``margin`` is by how much the better answer
    is better: of a pair, and of every pair of a ranking.
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
            example = to_example(record, format=own.data_format, columns=own.columns, purpose=self.judgement)
        except EmptyAnswerError as error:
            if own.empty_answers == "skip":
                return Omission(source=record.source, why=EMPTY)
            return self.refused(error, "empty_answer", record)
        except UserError as error:
            return self.refused(error, "format", record)
        assert isinstance(example, (Preference, Ranking, LabelledAnswer))
        return record, example

    def _made(self, record: Record, example: Judged, made: Sequence[tuple[Sample, ...] | UserError]) -> Outcome:
        try:
            for one in made:
                if isinstance(one, UserError):
                    raise one
            samples = [sample for one in made if not isinstance(one, UserError) for sample in one]
            whole = beside(samples, self.renderer.settings, head=len(self.renderer.encoder.bos))
            label = int(example.label) if isinstance(example, LabelledAnswer) else None
            whole = replace(whole, label=label, margin=_margin(record))
        except UserError as error:
            if isinstance(error, TooLongError) and self.renderer.truncation == "drop":
                return Omission(source=record.source, why=TOO_LONG)
            return self.refused(error, "render", record, example)
        key = number_of(content_key(example)) if self.keyed else 0
        return Acceptance(source=record.source, samples=(whole,), key=key, example=example if self.watched else None)


def _margin(record: Record) -> float:
    """The margin that a record gives, or 0.

    Raises:
        UserError: It is no finite number.
    """
    value: Any = record.fields.get("margin")
    if value is None:
        return 0.0
    try:
        found = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{record.source}: 'margin' must be a number, by how much the better answer is better; found "
                        f"{short(value)}.")  # fmt: skip
    return found
