"""Tasks by name or file, with their data: what stands behind ``--tasks``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

from weft.assets import ROOT
from weft.errors import UserError, nearest
from weft.evaluate.tasks.exercises import Exercise, Reader
from weft.evaluate.tasks.places import opened
from weft.evaluate.tasks.settings import TaskSettings
from weft.evaluate.tasks.task import Task
from weft.paths import local_path

FOLDER = ROOT / "tasks"
SAME = "same"


@lru_cache(maxsize=1)
def task_names() -> tuple[str, ...]:
    """The names of the tasks that Weft brings along."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@dataclass(frozen=True)
class Named:
    """A task that was named, before its data is read.

    Attributes:
        path: its file.
        data: where its data lies, if it was said; ``fewshot_data``: that of its examples.
    """

    settings: TaskSettings
    path: Path
    _: KW_ONLY
    data: str | None = None
    fewshot_data: str | None = None

    @property
    def place(self) -> Path | None:
        """Where its data lies; None: nobody says it."""
        if self.data is not None:
            return local_path(self.data)
        return None if self.settings.data is None else self.path.parent / self.settings.data

    def changed(self, *, apply_chat_template: bool | None = None, max_new_tokens: int | None = None) -> Self:
        """The task with other settings, where they mean something in it.

        Raises:
            UserError: Its system message needs the chat template.
        """
        updates: dict[str, object] = {}
        if apply_chat_template is not None and self.settings.kind in ("generation", "multiple_choice"):
            if not apply_chat_template and self.settings.system is not None:
                raise UserError(f"task {self.settings.name} has a system message, which needs the chat template.")
            updates["apply_chat_template"] = apply_chat_template
        if max_new_tokens is not None and self.settings.kind == "generation":
            updates["max_new_tokens"] = max_new_tokens
        return replace(self, settings=self.settings.model_copy(update=updates)) if updates else self

    def check(self) -> None:
        """Refuse a task without data, or whose data is not there.

        Raises:
            UserError: It is such a task.
        """
        name, place = self.settings.name, self.place
        if place is None:
            what = f": {self.settings.description}" if self.settings.description else "."
            raise UserError(f"task {name} has no data of its own{what} Say --tasks {name}=PATH or --data PATH.")
        beside = None if self.fewshot_data in (None, SAME) else local_path(str(self.fewshot_data))
        for path in (place, beside):
            if path is not None and not path.exists():
                raise UserError(f"task {name}: there is no file or folder {path}.")

    def load(self, *, num_fewshot: int | None = None, seed: int = 0) -> Task:
        """The task with its exercises.

        Args:
            num_fewshot: examples before each question, instead of what its file says.
            seed: of examples that are drawn.

        Raises:
            UserError: Its data cannot be read, a record has no answer, or there are too few examples.
        """
        self.check()
        where, given = f"task {self.settings.name}", self.place
        assert given is not None
        shots = self.settings.few_shot.count if num_fewshot is None else num_fewshot
        if shots and self.settings.kind in ("perplexity", "classification"):
            shots = 0  # a text has no examples before it
        if shots and self.settings.turns is not None:
            raise UserError(f"{where}: its questions have turns, so that no examples can stand before them.")
        reader, few = Reader(self.settings, where), self.settings.few_shot
        patterns = [one for one in (self.settings.files, few.data) if one is not None and one != SAME]
        with ExitStack() as stack:
            place = stack.enter_context(opened(given, patterns, where))
            exercises = reader.read(place, self.settings.files)
            pool: Sequence[Exercise] = ()
            if shots:
                source = self.fewshot_data or few.data
                if source is None or (self.fewshot_data is None and source != SAME and place.root.is_file()):
                    raise UserError(
                        f"{where}: {shots} examples are to stand before each question, and {place.shown} has none "
                        "beside its questions. Give --fewshot-data FILE, --fewshot-data same (other questions of the "
                        "same file), or --num-fewshot 0."
                    )
                if source == SAME:
                    pool = exercises
                elif self.fewshot_data is None:
                    pool = reader.read(place, source)
                else:
                    beside = stack.enter_context(opened(self.fewshot_data, patterns, where))
                    pool = reader.read(beside, few.data)
        return Task(settings=self.settings, exercises=exercises, pool=pool, shots=shots, seed=seed, source=str(given))


def find_tasks(words: Sequence[str], *, data: str | None = None, fewshot_data: Sequence[str] = ()) -> list[Named]:
    """The tasks that words name: a built-in one, a YAML file, each also with ``=PATH`` for its data.

    Args:
        data: the data of the one task that has none.
        fewshot_data: where examples lie: a path, or ``TASK=PATH``.

    Raises:
        UserError: There is no such task, two have one name, or it is not clear whose ``data`` it is.
    """
    named = [_named(word) for word in words]
    if not named:
        raise UserError(f"--tasks names no task. Built in are {', '.join(task_names())}; or give a YAML file.")
    names = [one.settings.name for one in named]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--tasks has two tasks called '{name}'; results would be mixed. Give one another name.")
    if data is not None:
        lacking = [one for one in named if one.data is None]
        lacking = lacking if len(lacking) == 1 else [one for one in lacking if one.settings.data is None]
        if len(lacking) != 1:
            raise UserError(
                f"--data {data}: it is not clear which task it is for ({', '.join(names)}). Say --tasks TASK={data}."
            )
        named = [replace(one, data=data) if one is lacking[0] else one for one in named]
    examples = _by_task(fewshot_data, names)
    return [replace(one, fewshot_data=examples.get(one.settings.name)) for one in named]


def _by_task(given: Sequence[str], names: Sequence[str]) -> Mapping[str, str]:
    found = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals:
            if len(names) > 1:
                raise UserError(f"--fewshot-data {one}: there are several tasks; say TASK={one}.")
            name, path = names[0], one
        if name not in names:
            raise UserError(f"--fewshot-data {one}: --tasks names no task '{name}'.{nearest(name, names)}")
        found[name] = path
    return found


def _named(word: str) -> Named:
    name, equals, data = word.partition("=")
    if equals and not data:
        raise UserError(f"--tasks {word}: a path is missing behind '='.")
    if name in task_names():
        path = FOLDER / f"{name}.yaml"
    elif name.endswith((".yaml", ".yml")):
        path = local_path(name)
        if not path.is_file():
            raise UserError(f"there is no task file {path}.")
    else:
        raise UserError(
            f"there is no task '{name}'.{nearest(name, task_names())} Built in are {', '.join(task_names())}; your own "
            "is a file that ends in .yaml (docs/evaluation.md)."
        )
    return Named(TaskSettings.load(path), path, data=data or None)
