"""The one way from data files to samples: read, recognise, render. Every record has one outcome.

A ``Recipe`` says what becomes of records of one kind; ``outcomes`` reads them. Training folds the outcomes (``Fold``);
preview and audit collect them. Nothing else reads records, and a test says so.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any, Self, TypeVar, get_args

from weft.data.formats.detect import to_example
from weft.data.formats.examples import SFT, Judged
from weft.data.formats.labels import ordered
from weft.data.formats.turns import EmptyAnswerError
from weft.data.problems import OnBadRecord, Problem, Problems, about_record
from weft.data.reading.records import first_rows, iter_items, iter_records
from weft.data.reading.rows import Record
from weft.data.reading.texts import TextUnit
from weft.data.rendering.render import Renderer, RenderResult, Task
from weft.data.rendering.sample import Sample, TooLongError
from weft.data.settings import EmptyAnswers, ReadSettings
from weft.data.sources import content_key, number_of
from weft.data.workers import in_order
from weft.errors import UserError, check_word
from weft.models.token_rows import check_rows

T = TypeVar("T")
DataPath = str | os.PathLike[str]
# Takes what gives the first rows of a table; gives the columns, if those rows do not name them.
Header = Callable[[Callable[[], list[list[str]]]], Sequence[str] | None]
EMPTY, TOO_LONG = "left out for an empty answer", "left out for their length"
BEHIND = "behind the limit"
_PEEK = 50  # records that a recipe sees before it makes any
logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------ outcomes


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the record at ``source``.

    ``label`` is the name of its class, if it has one. Of a ``watched`` recipe ``example`` is what it says, and
    ``fields`` are those of a record that became samples or was refused.
    """

    source: str
    label: str | None = None
    example: SFT | Judged | None = None
    fields: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance(Outcome):
    """The record became samples (a long text several). ``key`` hashes what it says, if the recipe is ``keyed``."""

    samples: tuple[Sample, ...] = ()
    key: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Omission(Outcome):
    """The record is left out: it is EMPTY, TOO_LONG, or BEHIND (only its class counts)."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal(Outcome):
    """The record cannot be used."""

    problem: Problem
    too_long: bool = False


class RecordBehindLimit(Record):
    """A record behind the limit, of which only the class counts."""

    __slots__ = ()


# ------------------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What becomes of records of one kind.

    ``labels`` names the classes, if they are known beforehand. A ``keyed`` recipe also hashes what each record says.
    The outcomes of a ``watched`` recipe carry what was read. ``token_rows``: how many tokens the model has a row for.
    """

    renderer: Renderer
    token_rows: int | None = None
    labels: tuple[str, ...] | None = None
    keyed: bool = False
    watched: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.renderer, Renderer):
            given = type(self.renderer).__name__
            raise UserError(f"data is rendered by a weft.Renderer, weft.Renderer(tokenizer), and not by {given}.")

    @property
    def whole(self) -> bool:
        """Whether records behind the limit count too."""
        return False

    @property
    def text_unit(self) -> TextUnit | None:
        """What of a file of text is one record."""
        return None

    def header(self, rows: Callable[[], list[list[str]]]) -> Sequence[str] | None:
        """The columns of a table, if its first ``rows`` do not name them."""
        return None

    def begun(self, head: Sequence[Record]) -> Self:
        """The recipe for a file that begins with these records. Raises UserError for settings that do not fit it."""
        return self

    def make(self, items: Sequence[Record | Problem]) -> list[Outcome]:
        """The outcomes of items, one for each. Raises UserError for settings that are wrong."""
        records = [item for item in items if isinstance(item, Record)]
        found = iter([self._embedded(*pair) for pair in zip(records, self.of(records), strict=True)])
        return [_unread(item) if isinstance(item, Problem) else next(found) for item in items]

    def of(self, records: Sequence[Record]) -> list[Outcome]:
        """The outcomes of records, one for each. Raises UserError for settings that are wrong."""
        raise NotImplementedError

    def _embedded(self, record: Record, outcome: Outcome) -> Outcome:
        """The outcome; a refusal, if it holds a token that the model has no row for."""
        if not isinstance(outcome, Acceptance):
            return outcome
        if self.watched:
            outcome = replace(outcome, fields=record.fields)
        if self.token_rows is None:
            return outcome
        ids = (number for sample in outcome.samples for number in (*sample.input_ids, *sample.target_ids))
        try:
            check_rows(ids, self.token_rows, self.renderer.tokenizer, record.source)
        except UserError as error:
            return self.refused(error, "no_row", record, outcome.example)
        return outcome

    def end(self, fold: Fold) -> None:
        """Log how many records were left out or cut.

        Raises:
            UserError: No sample is left.
        """
        long, empty, limit = fold.left_out[TOO_LONG], fold.left_out[EMPTY], self.renderer.max_length
        read, path = fold.kept + long, fold.path
        if empty:
            first = fold.first[EMPTY]
            logger.warning("%s: left out %d records with an empty answer (the first: %s)", path, empty, first)
        if long:
            logger.warning("%s: left out %d of %d records: longer than max_length %s", path, long, read, limit)
        if fold.cut:
            told = (path, fold.cut, read, limit, self.renderer.truncation)
            logger.warning("%s: %d of %d records cut to max_length %s (%s)", *told)
        if not fold.kept:
            if fold.problems.count:
                raise fold.problems.error()
            reason = f"longer than max_length {limit}" if long else "without an answer"
            raise UserError(f"{path}: every record is {reason}, so there is {fold.nothing}.")

    def refused(self, error: UserError, kind: str, record: Record, example: SFT | Judged | None = None) -> Refusal:
        """The outcome of a record that ``error`` is about. Raises ``error`` itself if that is about the settings."""
        problem = about_record(error, record.source, kind)
        if problem is None:
            raise error
        seen: dict[str, Any] = {"fields": record.fields, "example": example} if self.watched else {}
        return Refusal(source=record.source, problem=problem, too_long=isinstance(error, TooLongError), **seen)


def outcomes(path: DataPath, recipe: Recipe, *, limit: int | None = None, workers: int = 0) -> Iterator[Outcome]:
    """The outcomes of all records of a path, in order; ``workers`` processes make them.

    Raises:
        UserError: A file cannot be read, or a setting is wrong.
    """
    header = recipe.header(partial(first_rows, path, _PEEK))
    items = iter_items(path, limit=None if recipe.whole else limit, header=header, text_unit=recipe.text_unit)
    for item in items:
        if isinstance(item, Problem):
            yield _unread(item)
            continue
        head = [item, *islice(items, _PEEK - 1)]
        begun = recipe.begun([one for one in head if isinstance(one, Record)])
        yield from in_order(_marked(chain(head, items), limit), begun.make, workers, _characters)


def _unread(problem: Problem) -> Refusal:
    """The outcome of a record that could not be read."""
    return Refusal(source=problem.place, problem=problem)


def _marked(items: Iterable[Record | Problem], limit: int | None) -> Iterator[Record | Problem]:
    """The items, with each record behind the limit as a RecordBehindLimit."""
    number = 0
    for item in items:
        if isinstance(item, Record):
            number += 1
            item = RecordBehindLimit(item.fields, item.source) if limit is not None and number > limit else item
        yield item


def _characters(value: Any) -> int:
    """Roughly how much text a record, or a field of it, holds."""
    if isinstance(value, Record):
        return sum(map(_characters, value.fields.values()))
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list):
        return 4 * len(value) if value and isinstance(value[0], int) else sum(map(_characters, value))
    return 0


@dataclass(frozen=True, kw_only=True)
class TextRecipe(Recipe):
    """The recipe for conversations and texts, of which a model learns what they say."""

    settings: ReadSettings = field(default_factory=ReadSettings)
    task: Task = "causal_lm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word("empty_answers", self.settings.empty_answers, get_args(EmptyAnswers))
        check_word("task", self.task, get_args(Task))

    @property
    def text_unit(self) -> TextUnit | None:
        """What of a file of text is one record."""
        return self.settings.text_unit

    def of(self, records: Sequence[Record]) -> list[Outcome]:
        """The outcomes of records, one for each."""
        found = [self._recognised(record) for record in records]
        read = [one for one in found if not isinstance(one, Outcome)]
        rendered = self.renderer.outcomes((example for _, example in read), self.task)
        return [one if isinstance(one, Outcome) else self._rendered(*one, next(rendered)) for one in found]

    def _recognised(self, record: Record) -> tuple[Record, SFT] | Outcome:
        try:
            return record, to_example(record, format=self.settings.data_format, columns=self.settings.columns)
        except EmptyAnswerError as error:
            if self.settings.empty_answers == "skip":
                return Omission(source=record.source, why=EMPTY)
            return self.refused(error, "empty_answer", record)
        except UserError as error:
            return self.refused(error, "format", record)

    def _rendered(self, record: Record, example: SFT, made: RenderResult) -> Outcome:
        if isinstance(made, UserError):
            return self.refused(made, "render", record, example)
        if not made:
            return Omission(source=record.source, why=TOO_LONG)
        key = number_of(content_key(example)) if self.keyed else 0
        return Acceptance(source=record.source, samples=made, key=key, example=example if self.watched else None)


# ---------------------------------------------------------------------------------------------------------------- fold


class Fold:
    """Training folds the outcomes of one path: it takes the samples, counts the rest and hands problems on.

    The caller checks ``problems``. ``left_out`` counts reasons, and ``first`` has the first place of each. ``classes``
    has the first place of every class. ``nothing`` says what there is if no sample is left.
    """

    def __init__(
        self, path: DataPath, recipe: Recipe, problems: Problems, *, nothing: str = "nothing to learn"
    ) -> None:
        self.path, self.recipe, self.problems, self.nothing = path, recipe, problems, nothing
        self.kept = self.cut = self.refused = 0
        self.left_out, self.first = Counter[str](), dict[str, str]()
        self.classes: dict[str, str] = {}
        self._numbers = {name: number for number, name in enumerate(recipe.labels or ())}

    def samples(self, found: Iterable[Outcome]) -> Iterator[tuple[Sample, int]]:
        """The samples that were kept, each with its record's key; ``numbered`` gives them their final classes.

        Raises:
            UserError: There are too many problems.
        """
        for one in found:
            if isinstance(one, Refusal):
                self.refused += 1
                self.problems.add(one.problem)
                continue
            if one.label is not None:
                self.classes.setdefault(one.label, one.source)
                self._numbers.setdefault(one.label, len(self._numbers))
            if isinstance(one, Omission):
                self.left_out[one.why] += 1
                self.first.setdefault(one.why, one.source)
            elif isinstance(one, Acceptance):
                self.kept += 1
                self.cut += any(sample.cut for sample in one.samples)
                for sample in one.samples:
                    yield sample if one.label is None else replace(sample, label=self._numbers[one.label]), one.key

    @property
    def names(self) -> tuple[str, ...]:
        """The classes of the recipe, or else those that were met, in order."""
        return self.recipe.labels or ordered(self.classes)

    @property
    def settled(self) -> bool:
        """Whether all classes had their final numbers from the start."""
        return tuple(self._numbers) == self.names

    def numbered(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The labelled ``samples`` of this fold with the numbers that their classes have in ``names``."""
        final = [self.names.index(name) for name in self._numbers]
        return (replace(sample, label=final[sample.label or 0]) for sample in samples)


def load_samples(
    path: DataPath,
    renderer: Renderer,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    empty_answers: EmptyAnswers = "error",
    task: Task = "causal_lm",
    on_bad_record: OnBadRecord = "error",
    bad_records_file: DataPath | None = None,
    data_workers: int = 0,
    text_unit: TextUnit | None = None,
) -> list[Sample]:
    """Read the first ``limit`` records of a path (see ``iter_records``, ``to_example``) and render each, in order.

    ``task`` chooses ``renderer.sample`` or ``renderer.seq2seq``; for classes see ``load_labelled``.
    ``empty_answers="skip"`` leaves records with an empty answer out, and logs how many and the first's place.
    ``on_bad_record`` says what becomes of other records that cannot be used (see ``Problems``); with ``report`` all of
    them are written to ``bad_records_file``. ``text_unit`` is for files of text. ``data_workers``
    processes render; the samples are the same.

    Raises:
        UserError: Records cannot be used; lists up to 20, each at its file and line.
    """
    problems = Problems(on_bad_record, errors={"empty_answer": EmptyAnswerError})
    if bad_records_file is not None and on_bad_record != "report":
        raise UserError("bad_records_file is for on_bad_record: report; nothing else writes it.")
    given = dict(columns) if columns else None
    settings = ReadSettings.model_construct(
        data_format=format, columns=given, empty_answers=empty_answers, text_unit=text_unit
    )
    recipe = TextRecipe(renderer=renderer, settings=settings, task=task)
    fold = Fold(path, recipe, problems)
    found = [sample for sample, _ in fold.samples(outcomes(path, recipe, limit=limit, workers=data_workers))]
    recipe.end(fold)
    problems.check(str(path))
    if bad_records_file is not None:
        problems.write(bad_records_file)
    return list(renderer.join(found))


def read_all(
    path: DataPath,
    read: Callable[[Record], T],
    *,
    limit: int | None = None,
    header: Header = lambda rows: None,
    text_unit: TextUnit = "line",
) -> list[T]:
    """Apply ``read`` to every record of data that is not learned (prompts, questions, documents).

    ``header`` is as that of a ``Recipe``; ``text_unit`` says what of a text is a record.

    Raises:
        UserError: A record cannot be used; it is about the first one.
    """
    columns = header(partial(first_rows, path, _PEEK))
    return [read(record) for record in iter_records(path, limit=limit, header=columns, text_unit=text_unit)]
