"""What an evaluation found: who answered, what was asked, every single answer with its scores, and the figures.

A folder of results has two files. ``items.jsonl`` holds one line for each contestant and item, in any order; it only
grows while an evaluation runs, so that a run that was cut goes on. ``summary.json`` is written at the end and holds the
rest. A report and a comparison read nothing else of an evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from weft.errors import UserError
from weft.files.whole import write_whole
from weft.foreign import JSON_LIMIT, entry, expect, json_lines, read_json

ITEMS, SUMMARY = "items.jsonl", "summary.json"
_FORMAT = 1  # of the two files; another one is refused by name

# Of the fields of all entries.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "kind", "metric", "contestant", "task", "item", "output", "reference", "asked"), (str,)),
    **dict.fromkeys(("facts", "scores"), (dict,)),
    **dict.fromkeys(("n", "prompt_tokens", "answer_tokens"), (int,)),
    "higher_is_better": (bool,),
    "value": (int, float),
    "stderr": (int, float, type(None)),
}

Kind = Literal["base", "adapter", "prompt", "checkpoint", "model"]
# What a task asks for: a choice by likelihood, a text, the loss of a text, a class of a head.
TaskKind = Literal["multiple_choice", "generation", "perplexity", "classification"]


@dataclass(frozen=True)
class Contestant:
    """One who answers: the base, an adapter, a way to prompt, a checkpoint, another model.

    Attributes:
        name: by which its items name it; no two have the same.
        facts: what is known of it, by these keys where it is: ``method``, ``trainable_parameters``, ``bytes`` (of its
            file), ``seconds`` (of training), ``tokens_per_second``, ``peak_bytes``, ``template`` and ``stops`` (hash or
            text of what it was asked with), ``largest_change`` (of a logit beside the base's; 0: it changes nothing).
    """

    name: str
    kind: Kind
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskRecord:
    """What was asked: ``metric`` names the figure that counts first; ``facts`` say where the items came from, how many
    examples stood before each, the template and the settings."""

    name: str
    kind: TaskKind
    metric: str
    _: KW_ONLY
    higher_is_better: bool = True
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One answer of one contestant.

    Attributes:
        item: which one of the task's, the same for every contestant.
        scores: metric -> value of this answer alone: 1 or 0 for right or wrong, a share, a loss.
        output: what was answered; ``asked``: the end of the prompt, for a reader; ``reference``: what was expected.
        prompt_tokens, answer_tokens: what the answer cost.
    """

    contestant: str
    task: str
    item: str
    _: KW_ONLY
    scores: Mapping[str, float]
    output: str = ""
    reference: str = ""
    asked: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def line(self) -> str:
        """It as a line of ``items.jsonl``, with its end."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Score:
    """One figure of one contestant over ``n`` items; ``stderr`` is None where none is defined."""

    contestant: str
    task: str
    metric: str
    _: KW_ONLY
    value: float
    stderr: float | None
    n: int


_Entry = TypeVar("_Entry", Contestant, TaskRecord, Item, Score)


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that one evaluation found. ``facts`` are those of the whole: base, versions, time, command."""

    contestants: Sequence[Contestant]
    tasks: Sequence[TaskRecord]
    items: Sequence[Item]
    scores: Sequence[Score]
    facts: Mapping[str, object] = field(default_factory=dict)

    def summary(self) -> dict[str, object]:
        """All but the items, as ``summary.json`` and ``--json`` show it."""
        return {
            "format": _FORMAT,
            "facts": dict(self.facts),
            "contestants": [asdict(one) for one in self.contestants],
            "tasks": [asdict(one) for one in self.tasks],
            "scores": [asdict(one) for one in self.scores],
        }

    def write(self, folder: Path) -> None:
        """Write both files, each whole.

        Raises:
            WriteError: The machine refuses.
        """
        write_whole(folder / ITEMS, "".join(item.line() for item in self.items).encode())
        write_whole(folder / SUMMARY, (json.dumps(self.summary(), ensure_ascii=False, indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The results in a folder.

        Raises:
            UserError: A file is missing or damaged, or of another format.
        """
        path = folder / SUMMARY
        if not path.is_file():
            raise UserError(f"{folder} holds no results: {SUMMARY} is not there. `weft eval` writes it.")
        found = read_json(path, limit=JSON_LIMIT)
        if found.get("format") != _FORMAT:
            raise UserError(f"{path}: format {found.get('format')!r} is not known, only {_FORMAT}. Evaluate again.")
        where = str(path)
        return cls(
            contestants=_entries(Contestant, found, "contestants", where),
            tasks=_entries(TaskRecord, found, "tasks", where),
            items=read_items(folder / ITEMS),
            scores=_entries(Score, found, "scores", where),
            facts=entry(found, "facts", dict, where),
        )


def read_items(path: Path) -> list[Item]:
    """The items of a file of lines.

    Raises:
        UserError: A line is no item.
    """
    return [_made(Item, line, f"{path}:{number}") for number, line in enumerate(json_lines(path), 1)]


def _entries(kind: type[_Entry], found: Mapping[str, object], key: str, where: str) -> list[_Entry]:
    entries = [(one, f"{where}: {key}[{number}]") for number, one in enumerate(entry(found, key, list, where))]
    return [_made(kind, expect(one, dict, place), place) for one, place in entries]


def _made(kind: type[_Entry], values: Mapping[str, Any], where: str) -> _Entry:
    """The entry of these values, each of the type that its field has.

    Raises:
        UserError: A value is missing, unknown or of another type.
    """
    try:
        made = kind(**values)
    except TypeError as error:
        raise UserError(f"{where}: this is no {kind.__name__} of an evaluation ({error}).") from None
    for key, types in _TYPES.items():
        if hasattr(made, key):
            expect(getattr(made, key), types, f"{where}: {key}")
    for key, value in made.scores.items() if isinstance(made, Item) else ():
        expect(value, (int, float), f"{where}: scores.{key}")
    return made
