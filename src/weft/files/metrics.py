"""The rows of ``metrics.jsonl`` as a table, and as they come while another process writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weft.errors import UserError
from weft.foreign import LINE_LIMIT, check_regular, parse_json


class Metrics(list[dict[str, Any]]):
    """Rows of a run, a mapping each: a list, so that whatever takes a list of mappings (pandas, csv) takes it.

    >>> weft.read_metrics("runs/first").where(event="eval", job="lora").column("eval_loss")
    [5.71, 1.02]
    """

    def where(self, **equal: object) -> Metrics:
        """The rows that have these values, such as ``event="step"`` and ``job="lora"``."""
        return Metrics(row for row in self if all(row.get(key) == value for key, value in equal.items()))

    def column(self, name: str) -> list[Any]:
        """The values of a key in all rows; None where a row does not have it."""
        return [row.get(name) for row in self]

    def columns(self, *names: str) -> dict[str, list[Any]]:
        """The columns of these keys; without names, of all."""
        return {name: self.column(name) for name in names or dict.fromkeys(key for row in self for key in row)}

    def curve(self, name: str, job: str | None = None) -> tuple[list[int], list[float]]:
        """The steps and the values of a figure, where there is one; of one job, or of the only one.

        Raises:
            UserError: The rows are of several jobs, and none is named.
        """
        if job is None and len(self.jobs) > 1:
            raise UserError(
                f"the rows are of several jobs ({', '.join(self.jobs)}); say which: curve({name!r}, job=…)."
            )
        rows = [row for row in self if row.get(name) is not None and (job is None or row.get("job") == job)]
        return [row["step"] for row in rows], [row[name] for row in rows]

    @property
    def jobs(self) -> list[str]:
        """The names of the jobs, in the order in which they come."""
        return list(dict.fromkeys(row["job"] for row in self if row.get("job") is not None))


class Follower:
    """Reads the rows of a file that grows. A line that is not whole yet is left for the next time.

    A run that goes on cuts its file back first. Then everything is read again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place, self._last = 0, b""

    def rows(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether the file began anew, and the rows since the last time (of one that began anew, all).

        Raises:
            UserError: A line is damaged.
        """
        if not self.path.is_file():
            begun_anew, self._place, self._last = self._place > 0, 0, b""
            return begun_anew, []
        check_regular(self.path)
        with open(self.path, "rb") as file:
            anew = not self._is_same(file)
            if anew:
                self._place, self._last = 0, b""
            file.seek(self._place)
            found = list(self._read(file))
        return anew, found

    def _is_same(self, file: Any) -> bool:
        if file.seek(0, os.SEEK_END) < self._place:
            return False
        file.seek(self._place - len(self._last))
        return bool(file.read(len(self._last)) == self._last)

    def _read(self, file: Any) -> Iterator[dict[str, Any]]:
        while (line := file.readline(LINE_LIMIT)).endswith(b"\n"):
            self._place, self._last = self._place + len(line), line
            row = parse_json(line, f"{self.path}: byte {self._place - len(line)}")
            if not isinstance(row, dict):
                raise UserError(f"{self.path}: byte {self._place - len(line)}: expected a row, an object.")
            yield row
