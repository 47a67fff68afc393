"""Problems of records: their kinds, their places, and what becomes of them.

Readers hand on a ``Problem`` in the place of a record that they could not read, so that good and bad ones stay in the
order of the file. ``Problems`` decides: the first few end the run (``error``), or all are left out (``skip``) and
written down (``report``).
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import IO, Literal, get_args

from weft.errors import UserError, check_word
from weft.files.whole import make_folder, temporary_file, write_whole, writing_temporary

OnBadRecord = Literal["error", "skip", "report"]
SHOWN = 20
_KNOWN = 10_000  # problems that are recognised when they come again
_FEW = 3  # up to so many are listed one by one, even if all say the same
_NAME = "bad_records_file "  # before its path in messages
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: its ``kind`` (a word of KINDS), and ``what`` is wrong at ``path:line:column``.

    ``advice`` is the same for many records, and is told once.
    """

    kind: str
    path: str
    what: str
    _: KW_ONLY
    line: int | None = None
    column: int | None = None
    advice: str = ""

    @property
    def place(self) -> str:
        """``path:line:column``, as far as it is known."""
        return ":".join(str(part) for part in (self.path, self.line, self.column) if part is not None)

    def __str__(self) -> str:
        return f"{self.place}: {self.what} {self.advice}".rstrip()

    def row(self) -> dict[str, object]:
        """The problem as a row of a report."""
        return {"file": self.path, "line": self.line, "column": self.column, "kind": self.kind, "message": self.what}


KINDS: dict[str, str] = {
    "malformed_json": "JSON that is no JSON",
    "not_utf8": "bytes that are no UTF-8",
    "nul": "a NUL character, raw or as \\u0000",
    "half_character": "half of a UTF-16 pair alone (\\ud83d)",
    "duplicate_key": "an object that names a field twice",
    "not_a_number": "NaN or an infinity",
    "number_too_large": "a number beyond what a double holds (1e400, 400 digits)",
    "too_deep": "JSON nested too deeply",
    "too_long": "a line or record longer than the limit",
    "too_many_values": "a record of millions of small values, which would fill the memory",
    "not_an_object": "a record that is no object with fields",
    "bad_cell": "a cell of a spreadsheet that holds an error, or a formula without its value",
    "malformed_row": "a table's row whose quotation marks do not match",
    "row_width": "a table's row with more or fewer cells than the header",
    "cut_off": "a file that ends in the middle",
    "unread": "the rest of a file that could not be read after a problem before it",
    "empty_file": "a file without records",
    "format": "fields that fit no format, are of a wrong type, or cannot be learned from",
    "empty_answer": "an empty answer",
    "label": "classification: a label that is missing, not one of `labels`, or a score",
    "render": "a record that the template or the length refuses",
}


class BadRecordError(UserError):
    """A record that cannot be used; ``problem`` says where and why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.problem,)


class AdvisedError(UserError):
    """``what`` is wrong with a record, and ``advice`` that holds for many records."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(f"{what} {advice}".rstrip())
        self.what, self.advice = what, advice

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.what, self.advice)


def about_record(error: UserError, source: str, kind: str) -> Problem | None:
    """The problem in ``error``, if that is about the record at ``source``; None if it is about the settings."""
    if isinstance(error, BadRecordError):
        return error.problem
    text, advice = (error.what, error.advice) if isinstance(error, AdvisedError) else (str(error), "")
    path, line = source.rpartition(":")[::2]
    if not text.startswith(source) or text[len(source) : len(source) + 1] not in (":", " ", ","):
        return None
    what = text[len(source) :].removeprefix(":").strip()
    if not line.isdecimal():
        return Problem(kind, source, what, advice=advice)
    return Problem(kind, path, what, line=int(line), advice=advice)


class Problems:
    """Takes in the problems of a run's data and treats them as ``on_bad_record`` says.

    ``error``: reading goes on until 20 are found, then a UserError lists them. ``skip``: they are left out; their
    number and the first are logged. ``report``: as ``skip``, and ``write`` puts all of them into a file.
    Memory does not grow with their number. ``errors`` are classes of errors, by kind, for a run with a single problem.
    Two jobs may read one file in two ways: if ``begin`` opens each reading, a problem that comes again counts once.
    """

    def __init__(
        self, on_bad_record: OnBadRecord = "error", *, errors: Mapping[str, Callable[[str], UserError]] | None = None
    ) -> None:
        check_word("on_bad_record", on_bad_record, get_args(OnBadRecord))
        self.on_bad_record = on_bad_record
        self._errors = dict(errors or {})
        self.first: list[Problem] = []
        self.kinds: Counter[str] = Counter()
        self._rows: IO[str] | None = None
        self.ended: UserError | None = None  # what ``error`` gave
        self._known: Counter[Problem] = Counter()
        self._now: Counter[Problem] = Counter()  # of this reading; records may share a place and a fault

    @property
    def count(self) -> int:
        """The number of problems so far."""
        return self.kinds.total()

    def add(self, problem: Problem) -> None:
        """Take in one problem. Raises UserError with the earlier ones if there are too many to list."""
        if self._again(problem):
            return
        self.kinds[problem.kind] += 1
        if len(self.first) < SHOWN:
            self.first.append(problem)
        elif self.on_bad_record == "error":
            raise self.error()
        if self.on_bad_record == "report":
            with writing_temporary():
                if self._rows is None:
                    self._rows = temporary_file("w+")
                self._rows.write(json.dumps(problem.row()) + "\n")

    def begin(self) -> None:
        """Begin to read a file, perhaps not for the first time."""
        self._now.clear()

    def _again(self, problem: Problem) -> bool:
        """Whether an earlier reading found this problem already."""
        if problem not in self._known and len(self._known) >= _KNOWN:
            return False
        self._now[problem] += 1
        if self._now[problem] <= self._known[problem]:
            return True
        self._known[problem] += 1
        return False

    def error(self) -> UserError:
        """The listed problems as one error."""
        self.ended = self._error()
        return self.ended

    def _error(self) -> UserError:
        if self.count == 1:
            only = self.first[0]
            return self._errors[only.kind](str(only)) if only.kind in self._errors else BadRecordError(only)
        more = self.count > len(self.first)
        number = f"more than {SHOWN}" if more and self.on_bad_record == "error" else str(self.count)
        same = len(self.first) > _FEW and len({(problem.kind, problem.what) for problem in self.first}) == 1
        if same:
            lines = _places(self.first)
            reason = self.first[0].what
            title = f"{number} records cannot be used, {'the first all' if more else 'all'} for one reason: {reason}"
        else:
            lines = [f"  {problem.place}: {problem.what}" for problem in self.first]
            title = f"{number} records cannot be used:"
        if more and same:
            lines[-1] += " ... and more"
        elif more:
            lines.append("  ... and more")
        if self.on_bad_record == "error":
            mend = (
                "Mend these records, or have them left out: on_bad_record: skip (logs how many), or report (lists them "
                "all in a file)."
            )
        else:
            mend = "They would be left out, but nothing would be left. Mend them, or leave the file out."
        advice = dict.fromkeys(problem.advice for problem in self.first if problem.advice)
        lines.append(" ".join([mend, *advice]))
        return UserError("\n".join([title, *lines]))

    def check(self, what: str) -> None:
        """At the end of reading ``what``: raise what was found (``error``), or log it.

        Raises:
            UserError: There are problems; it lists each at its place.
        """
        if not self.count:
            return
        if self.on_bad_record == "error":
            raise self.error()
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.kinds.most_common())
        logger.warning("%s: left out %d bad records (%s); the first: %s", what, self.count, kinds, self.first[0])

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write all problems as JSON lines; the file appears whole or not at all. No problems: an empty file.

        Raises:
            UserError: The file cannot be written.
        """
        target, rows = Path(path), self._rows
        if target.is_dir():
            raise UserError(f"bad_records_file {path} is a folder; name a file.")
        if rows is not None:
            with writing_temporary():
                rows.seek(0)  # it writes what is in its buffer
        make_folder(target.parent, _NAME)
        write_whole(target, rows or (), _NAME)


def _places(problems: Sequence[Problem]) -> list[str]:
    """The places of problems, one line per file: ``a.jsonl: lines 3, 5:12``."""
    files: dict[str, list[str]] = {}
    for problem in problems:
        place = ":".join(str(part) for part in (problem.line, problem.column) if part is not None)
        files.setdefault(problem.path, []).extend([place] if place else [])
    return [
        f"  {path}" + (f": line{'s' if len(places) > 1 else ''} {', '.join(places)}" if places else "")
        for path, places in files.items()
    ]
