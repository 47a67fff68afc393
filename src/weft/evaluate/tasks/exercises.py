"""Exercises: what a task asks, one for each record of its data, with the right answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from weft.data.labelled import missing_header
from weft.data.pipeline import read_all
from weft.data.reading.rows import Record
from weft.errors import UserError
from weft.evaluate.ifeval import CHECKS, unknown_instruction
from weft.evaluate.metrics import METRICS
from weft.evaluate.metrics.instructions import instructions
from weft.evaluate.tasks.places import Place
from weft.evaluate.tasks.settings import TaskSettings
from weft.evaluate.tasks.templates import Template, templates, with_small_names

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Exercise:
    """One thing that a task asks.

    Attributes:
        item: which one it is, the same in every evaluation of the same files.
        prompts: the question; where it has turns, one for each.
        group: whose examples stand before it.
        references: the right answers, as texts; any of them is right.
        choices, right: of multiple choice the texts, and the place of the right one.
        instruction, system: what stands before the examples, and the system message; "": nothing.
        record: what the data says, ``source``: where.
    """

    item: str
    prompts: tuple[str, ...]
    _: KW_ONLY
    record: Record
    source: str
    group: str = ""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    right: int = -1
    instruction: str = ""
    system: str = ""

    @property
    def answer(self) -> str:
        """The answer that an example shows."""
        return self.choices[self.right] if self.choices else next(iter(self.references), "")

    def content(self) -> list[object]:
        """All that makes it what it is, as JSON holds it."""
        return [self.prompts, self.group, self.references, self.choices, self.right, self.instruction, self.system]


@dataclass(frozen=True)
class Reader:
    """Makes exercises of the records of a task; ``where`` is the task's place in errors."""

    settings: TaskSettings
    where: str
    _made: dict[str, list[Template]] = field(default_factory=dict, init=False)

    def read(self, place: Place, pattern: str | None) -> list[Exercise]:
        """The exercises of a place.

        Raises:
            UserError: A record cannot be asked, or has no answer; it is about the first one.
        """
        files = place.files(pattern, self.where)
        several = len(files) > 1
        found = [(self._item(record, several), record, file) for file in files for record in self._records(file)]
        if not found:
            raise UserError(f"{self.where}: {place.shown} holds no records.")
        known = {name for _, record, _ in found for name in record.fields}
        self._check(known, place.shown)
        exercises = [self._exercise(item, record, file, place) for item, record, file in found]
        self._check_counts(exercises)
        return exercises

    def _records(self, file: Path) -> list[Record]:
        columns, classes = self.settings.columns, self.settings.kind == "classification"

        def header(rows: Callable[[], list[list[str]]]) -> Sequence[str] | None:
            return columns or (missing_header(rows()) if classes else None)

        return read_all(file, lambda record: record, header=header, text_unit=self.settings.text_unit)

    def _item(self, record: Record, several: bool) -> str:
        path, _, line = record.source.rpartition(":")
        return f"{Path(path).stem}:{line}" if several else line

    # What a record says.

    @cached_property
    def _prompts(self) -> list[Template]:
        key = {"perplexity": "text", "classification": ""}.get(self.settings.kind, "prompt")
        return self._of(key) if key else []

    def _of(self, key: str) -> list[Template]:
        if key not in self._made:
            given = getattr(self.settings, key)
            self._made[key] = templates(given, f"{self.where}: {key}")
        return self._made[key]

    @cached_property
    def _choices(self) -> list[Template] | None:
        """The templates of the choices; None: a field of the record holds them."""
        return self._of("choices") if isinstance(self.settings.choices, list) else None

    def _check(self, known: set[str], shown: str) -> None:
        checked = [*self._prompts, *(self._choices or [])]
        for key in ("reference", "instruction", "system", "group"):
            checked += self._of(key)
        for template in checked:
            template.check(known, shown)
        named = [one for one in (self.settings.turns, self.settings.choices) if isinstance(one, str)]
        named += [one for entry in self.settings.metrics for one in METRICS[entry.metric].fields]
        for name in named:
            if name not in known:
                raise UserError(
                    f"{self.where}: no record of {shown} has a field '{name}'. Fields: {', '.join(sorted(known)[:20])}."
                )

    def _exercise(self, item: str, record: Record, file: Path, place: Place) -> Exercise:
        source = place.source(record.source)
        fields = {**with_small_names(record.fields), "file": file.stem}
        group = "".join(one.render(fields, source) for one in self._of("group"))
        fields["group"] = group
        said = {key: "".join(one.render(fields, source) for one in self._of(key)) for key in ("instruction", "system")}
        prompts = self._turns(record, source) or tuple(one.render(fields, source) for one in self._prompts)
        references = tuple(one.render(fields, source) for one in self._of("reference"))
        choices, right = self._chosen(fields, references, source)
        self._check_answer(references, source)
        for entry in self.settings.metrics:
            if METRICS[entry.metric].fields:
                _check_instructions(record.fields, source)
        if any(not prompt.strip() for prompt in prompts):
            raise UserError(f"{source}: the {'text' if self.settings.kind == 'perplexity' else 'question'} is empty.")
        return Exercise(
            item, prompts, record=Record(record.fields, source), source=source, group=group,
            references=references, choices=choices, right=right, **said,
        )  # fmt: skip

    def _turns(self, record: Record, source: str) -> tuple[str, ...]:
        if self.settings.turns is None:
            return ()
        found = record.fields.get(self.settings.turns)
        if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
            raise UserError(f"{source}: the field '{self.settings.turns}' must be a list of questions.")
        return tuple(found)

    def _check_answer(self, references: Sequence[str], source: str) -> None:
        if self.settings.reference is not None and not any(one.strip() for one in references):
            raise UserError(
                f"{source}: the record has no answer: {self.where} makes it of {self.settings.reference!r}, and that "
                "is empty. Give the part of the data that has answers, or leave the record out."
            )

    def _chosen(self, fields: Mapping[str, Any], references: Sequence[str], source: str) -> tuple[tuple[str, ...], int]:
        """The choices of a record, and the place of the right one."""
        if self.settings.choices is None:
            return (), -1
        if self._choices is None:
            found = fields.get(str(self.settings.choices))
            if not isinstance(found, list) or not all(isinstance(one, (str, int, float)) for one in found):
                raise UserError(f"{source}: the field '{self.settings.choices}' must be a list of choices.")
            choices = tuple(map(str, found))
        else:
            choices = tuple(one.render(fields, source) for one in self._choices)
            if self.settings.different_counts:
                choices = tuple(one for one in choices if one.strip())
        if len(choices) < 2 or any(not one.strip() for one in choices):
            number = next((i + 1 for i, one in enumerate(choices) if not one.strip()), len(choices) + 1)
            raise UserError(
                f"{source}: choice {number} is empty or missing; a question has at least two. With different_counts: "
                "true empty ones are left out."
            )
        right = _place_of(references[0].strip(), choices) if references[0].strip() else 0
        if right is None:
            raise UserError(
                f"{source}: the answer {references[0].strip()!r} is none of the choices: neither the text of one, nor "
                f"its number (0 to {len(choices) - 1}), nor its letter (A to {_LETTERS[len(choices) - 1]})."
            )
        return choices, right

    def _check_counts(self, exercises: Sequence[Exercise]) -> None:
        counts = {len(exercise.choices): exercise for exercise in reversed(exercises)}
        if len(counts) > 1 and not self.settings.different_counts:
            (few, one), (many, other) = sorted(counts.items())[:: len(counts) - 1]
            raise UserError(
                f"{self.where}: questions have different numbers of choices: {few} at {one.source}, {many} at "
                f"{other.source}. If that is meant, say different_counts: true."
            )


def _place_of(answer: str, choices: Sequence[str]) -> int | None:
    """The place of the choice that an answer names: by its text, by its number from 0, by its letter."""
    texts = [choice.strip() for choice in choices]
    if answer in texts:
        return texts.index(answer)
    if answer.isdecimal() and int(answer) < len(choices):
        return int(answer)
    letter = answer.rstrip(".)").lstrip("(").upper()
    if len(letter) == 1 and letter in _LETTERS[: len(choices)]:
        return _LETTERS.index(letter)
    return None


def _check_instructions(fields: Mapping[str, object], source: str) -> None:
    try:
        for name, _ in instructions(fields):
            if name not in CHECKS:
                raise unknown_instruction(name)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
