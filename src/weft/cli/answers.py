"""The file of ``weft generate --output``: answers go into it as they come, and the same command goes on with it.

Beside ``answers.jsonl`` lies ``.answers.jsonl.run``, which says of which run the answers are: its settings, its base
and adapters by their contents, its prompts. A run goes on with answers of its own and with no others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from weft.cli import common
from weft.errors import UserError

# An answer of an adapter to a prompt, as JSON holds it; and its prompt's place, its adapter, the number of its sample.
Row = dict[str, Any]
Key = tuple[int, str, int]

# A line with the log-probabilities of a long answer is longer than a record may be.
_LINE_LIMIT = 256 << 20


def key_of(row: Row) -> Key:
    """What tells the row from the others of its run."""
    return row["index"], row["adapter"], row.get("sample", 0)


class AnswerFile:
    """The file of one run's answers.

    Attributes:
        path: where it is.
        rows: the answers that it holds.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], *, overwrite: bool) -> None:
        """Look at the file, and change nothing.

        Args:
            path: A file that is there or not, or a device.
            settings: Options by which the answers are written, as JSON holds them.
            overwrite: Whether to begin anew over what is there.

        Raises:
            UserError: There is a file that this run cannot go on with.
        """
        self.path, self.settings = path, dict(settings)
        self.rows: dict[Key, Row] = {}
        self._order: list[Key] = []  # of the lines
        self._run: dict[str, object] = {}
        self._replaced: str | None = None
        if path.is_dir():
            raise UserError(f"--output {path} is a folder, not a file.")
        self._beside = path.with_name(f".{path.name}.run")
        if not path.absolute().parent.is_dir():
            raise UserError(f"there is no folder {path.absolute().parent} for {path.name}.")
        self._device = path.exists() and not path.is_file()
        self._continues = not (overwrite or self._device) and path.exists() and path.stat().st_size > 0
        if self._continues:
            self._check_settings(self._begun())

    def open(self, target: Mapping[str, object], prompts: str) -> None:
        """Take the answers that are there, or make ready for the first one.

        Args:
            target: What answers, by name: a hash or a description of each part.
            prompts: A hash of all prompts as they are asked.

        Raises:
            UserError: The file holds answers of another run, or is damaged.
        """
        from weft.files.whole import drop_torn_line
        from weft.foreign import json_lines

        self._run = {"settings": self.settings, "target": dict(target), "prompts": prompts}
        if not self._continues:
            return
        self._check_run(self._begun(), self._run)
        drop_torn_line(self.path)
        for row in json_lines(self.path, limit=_LINE_LIMIT):
            key = key_of(row) if {"index", "adapter"} <= row.keys() else None
            if key is None or [type(part) for part in key] != [int, str, int]:
                self._refuse("not all of its lines are answers of this run")
            self.rows[key] = row
            self._order.append(key)

    def check_keys(self, known: Sequence[Key]) -> None:
        """Refuse a file with answers that nobody has asked for.

        Raises:
            UserError: It has one.
        """
        if strange := sorted(set(self.rows) - set(known)):
            self._refuse(
                f"it has an answer of '{strange[0][1]}' to prompt {strange[0][0]}, which this run does not ask"
            )

    def add(self, row: Row) -> None:
        """Put an answer at the end of the file.

        Raises:
            WriteError: The machine refuses to write it.
        """
        from weft.files.whole import append_line

        key = key_of(row)
        if not self._device:
            if self._continues:
                append_line(self.path, _line(row))
            else:
                self._begin(_line(row) + "\n")
        self.rows[key] = row
        self._order.append(key)

    def _begin(self, first: str) -> None:
        """Put the first answer in the place of what is there. A run that fails before it changes nothing."""
        from weft.files.whole import sha256_of, write_whole

        self._replaced = sha256_of(self.path) if self.path.exists() else None
        if self._replaced == hashlib.sha256(first.encode()).hexdigest():
            self._replaced = None  # it has this answer already: there is nothing to put in its place
        self._record(self._replaced)
        if self._replaced is not None or not self.path.exists():
            write_whole(self.path, first, "--output ")
        self._continues = True

    def _record(self, replaced: str | None) -> None:
        from weft.files.whole import write_whole

        write_whole(self._beside, json.dumps({**self._run, "replaces": replaced}, ensure_ascii=False), "--output ")

    def close(self, order: Sequence[Key]) -> list[Row]:
        """The answers in the order of the prompts, which the file's lines have from now on."""
        from weft.files.whole import write_whole

        rows = [self.rows[key] for key in order]
        if self._device or self._order != list(order):
            write_whole(self.path, (f"{_line(row)}\n" for row in rows), "--output ")
        if self._replaced is not None and self._stands(self._replaced):
            self._record(None)  # the answers are those that they have replaced
        return rows

    def _begun(self) -> dict[str, Any]:
        """What is known of the run that began the file."""
        from weft.foreign import read_json

        found = read_json(self._beside) if self._beside.is_file() else None
        if found is None or self._stands(found.get("replaces")):
            raise UserError(
                f"{self.path} is there already, and no run is known that wrote it and could go on with it; take "
                "another name or --overwrite."
            )
        if not all(isinstance(found.get(part), dict) for part in ("settings", "target")):
            raise UserError(f"{self._beside} is damaged; take another name for --output, or --overwrite.")
        return found

    def _stands(self, replaced: object) -> bool:
        """Whether the file is still that which the run was to replace, for it was ended before its first answer."""
        if replaced is None:
            return False
        from weft.files.whole import sha256_of  # it needs torch, which takes seconds

        return replaced == sha256_of(self.path)

    def _check_settings(self, begun: Mapping[str, Any]) -> None:
        for name, value in self.settings.items():
            if (before := begun["settings"].get(name)) != value:
                self._refuse(f"it was begun with --{name.replace('_', '-')} {_said(before)}, this is {_said(value)}")

    def _check_run(self, begun: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        self._check_settings(begun)
        for name, value in run["target"].items():
            if begun["target"].get(name) != value:
                self._refuse(f"{name} is not what it was when the file was begun")
        if begun.get("prompts") != run["prompts"]:
            self._refuse("it was begun with other prompts, or with prompts that were rendered otherwise")

    def _refuse(self, why: str) -> NoReturn:
        raise UserError(
            f"{self.path} holds answers of another run: {why}. Take another name, or --overwrite to begin anew."
        )


def _line(row: Row) -> str:
    return json.dumps(common.finite(row), ensure_ascii=False)


def _said(value: object) -> str:
    """A setting for people, on one line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
