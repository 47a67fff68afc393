"""Queries: records of which an adapter is asked the question. What they hold of an answer is left out.

They go the way of all data, read as the adapter's training read its own, so that every file that it learned from or was
evaluated on can be asked: bad records are left out where training left them out. Files of prompts alone can be asked as
well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from weft.data.formats.examples import Conversation, Message
from weft.data.formats.labels import label_name, texts_of
from weft.data.formats.questions import question_of
from weft.data.labelled import ClassRecipe, columns_of, missing_header, unlabelled_sample
from weft.data.pipeline import Acceptance, DataPath, Outcome, Recipe, Refusal, outcomes, read_all
from weft.data.problems import BadRecordError, Problems
from weft.data.reading.rows import Record
from weft.data.reading.texts import TextUnit
from weft.data.rendering.render import Task
from weft.data.rendering.sample import Prompt, Sample
from weft.data.settings import DataSettings, ReadSettings
from weft.data.sources import parse_sets, parse_sources
from weft.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Query(Acceptance):
    """A record of which the question is asked. ``said`` is the question for people, as JSON holds it.

    ``number`` is the record's place in its file, from 0.
    """

    said: str | list[dict[str, str]]
    number: int = 0

    @property
    def prompt(self) -> Sample:
        """The ids and slots of the question."""
        return self.samples[0]


def read_queries(path: DataPath, recipe: Recipe, problems: Problems | None = None) -> list[Query]:
    """The queries of a path. Records that cannot be asked go to ``problems``.

    Raises:
        UserError: Without ``problems``, for the first of them; or there are no others.
    """
    if problems is not None:
        problems.begin()
    asked = list(_asked(outcomes(path, recipe), problems))
    if not asked and problems is not None:
        raise problems.error()
    return asked


def given_queries(texts: Sequence[str] | Sequence[Record], recipe: Recipe, source: str) -> list[Query]:
    """The queries that these texts, or records, are. Raises UserError for the first that cannot be asked; a text's
    place is ``source``."""
    records = [Record({"prompt": one}, source) if isinstance(one, str) else one for one in texts]
    return list(_asked(recipe.begun(records).make(records)))


def check_readable(path: DataPath) -> None:
    """Read a path and keep nothing of it. Raises UserError for the first record that cannot be read."""
    read_all(path, lambda record: None, header=lambda rows: missing_header(rows()))


def _asked(found: Iterable[Outcome], problems: Problems | None = None) -> Iterator[Query]:
    for number, one in enumerate(found):
        if isinstance(one, Query):
            yield replace(one, number=number)
        elif isinstance(one, Refusal) and problems is not None:
            problems.add(one.problem)
        else:
            assert isinstance(one, Refusal)
            raise BadRecordError(one.problem)


def settings_of(settings: Mapping[str, object]) -> DataSettings:
    """The settings of data in an adapter's folder.

    Raises:
        UserError: They are damaged.
    """
    try:
        return DataSettings.model_validate({key: settings[key] for key in settings if key in DataSettings.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"the adapter's settings of data: {first['loc'][0]}: {first['msg']}.") from None


def reading_of(path: DataPath, settings: DataSettings) -> ReadSettings:
    """How training read the file at ``path``; of another file, how it read all of its own if it read them alike."""
    named = list(parse_sources(settings.data)) if settings.data is not None else []
    named += [one for sources in parse_sets(settings.eval_data).values() for one in sources]
    same = [one for one in named if Path(one.path).name == Path(path).name]
    ways = [settings.of(one) for one in same or named]
    return ways[0] if ways and all(way == ways[0] for way in ways) else settings


@dataclass(frozen=True, kw_only=True)
class QueryRecipe(Recipe):
    """The recipe for questions to adapters that write. ``system``: a message before them. ``raw``: no template."""

    settings: ReadSettings
    task: Task = "causal_lm"
    system: str | None = None
    raw: bool = False

    @property
    def text_unit(self) -> TextUnit | None:
        """Every line of a text is a prompt."""
        return "line"

    def of(self, records: Sequence[Record]) -> list[Outcome]:
        """The outcomes of records, one for each."""
        return list(map(self._outcome, records))

    def _outcome(self, record: Record) -> Outcome:
        kind = "format"
        try:
            found = question_of(record, format=self.settings.data_format, columns=self.settings.columns)
            kind = "render"
            if isinstance(found, Conversation):
                return self._query(record, found)
            sample = self.renderer.sample(found)
            start = max(place for place, weight in enumerate(sample.weights) if weight)
            while sample.weights[start - 1]:
                start -= 1
            ids = sample.input_ids[:start]
            said = str(self.renderer.tokenizer.decode(ids))
            return Query(source=record.source, samples=(_sample(Prompt(ids), record.source),), said=said)
        except UserError as error:
            return self.refused(error, kind, record)

    def _query(self, record: Record, found: Conversation) -> Query:
        messages, source = list(found.messages), record.source
        text = messages[0].content if len(messages) == 1 and messages[0].role == "user" else None
        listed = any(isinstance(value, list) for value in record.fields.values())
        said = [{"role": one.role, "content": one.content} for one in messages] if text is None or listed else text
        if self.raw:
            if text is None:
                raise UserError(f"{source}: a conversation needs the chat template; --raw continues texts only.")
            prompt = Prompt(list(self.renderer.tokenizer(text, verbose=False)["input_ids"]))
        else:
            if self.system:
                messages = [Message("system", self.system), *(one for one in messages if one.role != "system")]
            prompt = self.renderer.prompt(messages, tools=found.tools, task=self.task, source=source)
        if not prompt.ids:
            raise UserError(f"{source}: a prompt without a single token cannot be continued.")
        return Query(source=source, samples=(_sample(prompt, source),), said=said)


def _sample(prompt: Prompt, source: str) -> Sample:
    return Sample(prompt.ids, [0.0] * len(prompt.ids), source, slots=prompt.slots)


@dataclass(frozen=True, kw_only=True)
class ClassQueryRecipe(ClassRecipe):
    """The recipe for texts of which an adapter names the class. They may come without a label, and as prompts."""

    @property
    def text_unit(self) -> TextUnit | None:
        """Every line of a text is a prompt."""
        return "line"

    def begun(self, head: Sequence[Record]) -> Self:
        """The recipe with the columns of these records, as far as they have such."""
        texts, label = columns_of(head, self.text_columns, self.label_column, asked=True)
        return replace(self, text_columns=texts, label_column=label)

    def _outcome(self, record: Record) -> Outcome:
        source, label, kind = record.source, self.label_column, "label"
        try:
            name = label_name(record, label) if label and record.fields.get(label) not in (None, "") else None
            if name is not None and name not in (self.labels or ()):
                raise UserError(f"{source}: the adapter has no class '{name}'. It has {', '.join(self.labels or ())}.")
            kind = "format"
            texts = texts_of(record, self.text_columns) if self.text_columns else _text(record)
            if not label and len(texts) == 1:  # a pair in one prompt
                texts = tuple(texts[0].split("\t"))
            if self.encodes and len(texts) > 2:
                raise UserError(f"{source}: {len(texts)} texts with tabs between them; an encoder takes one or a pair.")
            kind = "render"
            sample = unlabelled_sample(self.renderer, texts, source, encoder=self.encodes)
        except UserError as error:
            return self.refused(error, kind, record)
        return Query(source=source, label=name, samples=(sample,), said="\t".join(texts))


def _text(record: Record) -> tuple[str, ...]:
    """The text of a record without a column of texts, which is a prompt."""
    found = question_of(record)
    if not isinstance(found, Conversation) or len(found.messages) > 1:
        raise UserError(f"{record.source}: the adapter classifies texts; this is a conversation.")
    return (found.messages[0].content,)
