"""The ledger: every request that goes out and what came of it, as lines at the end of a file.

A line is on the disk before what it tells of counts. ``sent`` stands before a request goes out, ``answer`` or
``failure`` when it is over. So a crash at any moment loses no answer, and what was on its way then counts as spent with
its worst case. Failures are written for what they cost; they are never taken for an answer.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from weft.errors import UserError
from weft.files.whole import append_line, cut_file, make_folder, sync
from weft.foreign import check_regular, entry, expect, parse_json, read_text
from weft.generators.budget import Cost
from weft.generators.outcome import Failure, Generated, Usage
from weft.generators.request import Draw

_FORMAT = 1
_HEAD = json.dumps({"ledger": _FORMAT})
_PAUSE = 0.5  # seconds that an answer that nobody pays for may wait for the disk
_LINE_LIMIT = 64 << 20
_Key = tuple[str, int]


class Ledger:
    """A ledger in a file, or (``path`` None) in memory alone. One process at a time has the file.

    Attributes:
        spent: all that was spent, what was lost included.
        lost: requests that were on their way when a process ended; they count with their worst case.
        notes: what the user should know of the file.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open it, or begin it.

        Raises:
            UserError: Another process has it open, it is no ledger, or a line in its middle is damaged.
            WriteError: The machine refuses to write.
        """
        self.path = path
        self.spent, self.lost = Cost(), 0
        self.notes: list[str] = []
        self._answers: dict[_Key, Generated] = {}
        self._open: dict[_Key, list[Cost]] = defaultdict(list)
        self._lock: int | None = None
        self._synced = time.monotonic()
        if path is not None:
            self._begin(path)
        left = [worst for all_of_one in self._open.values() for worst in all_of_one]
        self._open.clear()
        self.lost = len(left)
        self.spent = sum(left, self.spent)
        if left:
            self.notes.append(
                f"{path}: {len(left):,} requests were on their way when a process ended; they count as spent, with the "
                "most that they can have cost."
            )

    def _begin(self, path: Path) -> None:
        if not path.exists():
            make_folder(path.parent)
            append_line(path, _HEAD)
            sync(path)
            sync(path.parent)
        check_regular(path)
        self._lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(path)
        except BlockingIOError:
            self.close()
            raise UserError(f"{path} is used by another process. Wait for its end, or take another file.") from None
        except BaseException:
            self.close()
            raise

    def _read(self, path: Path) -> None:
        """Take all whole lines. What is torn at the end is cut off."""
        end, damaged = 0, ""
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LINE_LIMIT), b""), 1):
                try:
                    if not line.endswith(b"\n"):
                        raise UserError(f"{path}:{number}: the line has no end.")
                    found = expect(parse_json(line, f"{path}:{number}"), dict, f"{path}:{number}")
                    if number == 1 and "ledger" not in found:
                        raise _NoLedgerError(f"{path} is there, and is no ledger of a generator. Take another name.")
                    if damaged:
                        raise _NoLedgerError(f"{damaged} Whole lines follow it, so it is no tear. Mend it by hand.")
                    self._take(found, f"{path}:{number}")
                except _NoLedgerError:
                    raise
                except UserError as error:
                    damaged = damaged or str(error)
                    continue
                end = file.tell()
        size = path.stat().st_size
        if not end:  # not even its first line is whole
            if not _HEAD.startswith(read_text(path, _LINE_LIMIT)):
                raise UserError(f"{path} is there, and is no ledger of a generator. Take another name.")
            cut_file(path, 0)
            append_line(path, _HEAD)
            return
        if end < size:
            cut_file(path, end)
            self.notes.append(f"{path} was cut off in the middle of a line; it is repaired to its last whole line "
                              f"({size - end:,} bytes less).")  # fmt: skip

    def _take(self, line: Mapping[str, object], where: str) -> None:
        """Count one line."""
        if "ledger" in line:
            if line["ledger"] != _FORMAT:
                raise _NoLedgerError(f"{where}: format {line['ledger']!r} is not known, only {_FORMAT}.")
            return
        kind = next((name for name in ("sent", "answer", "failure") if name in line), None)
        if kind is None:
            raise UserError(f"{where}: this is no line of a ledger.")
        key = (entry(line, kind, str, where), entry(line, "index", int, where))
        cost = Cost(float(expect(line.get("money", 0.0), (int, float), where)),
                    expect(line.get("tokens", 0), int, where), expect(line.get("requests", 0), int, where))  # fmt: skip
        if kind == "sent":
            self._open[key].append(cost)
            return
        if self._open[key]:
            self._open[key].pop()
        self.spent += cost
        if kind == "answer":
            usage = Usage(entry(line, "prompt_tokens", int, where), entry(line, "answer_tokens", int, where))
            texts = {name: entry(line, name, str, where) for name in ("text", "finish_reason", "model")}
            self._answers[key] = Generated(**texts, usage=usage, money=cost.money, cached=True)

    def get(self, draw: Draw) -> Generated | None:
        """The answer to a draw, if there is one."""
        return self._answers.get((draw.key, draw.index))

    def __len__(self) -> int:
        """How many answers it has."""
        return len(self._answers)

    def sent(self, draw: Draw, worst: Cost) -> None:
        """A request is about to go out.

        Raises:
            WriteError: The machine refuses to write; then it must not go.
        """
        self._write({"sent": draw.key, "index": draw.index, **_costs(worst)})

    def answer(self, draw: Draw, found: Generated, cost: Cost, *, paid: bool = True) -> None:
        """An answer has come, and is kept. One that is not ``paid`` for may wait for others on its way to the disk.

        Raises:
            WriteError: The machine refuses to write.
        """
        self._write({
            "answer": draw.key, "index": draw.index, **_costs(cost), "prompt_tokens": found.usage.prompt_tokens,
            "answer_tokens": found.usage.answer_tokens, "model": found.model, "finish_reason": found.finish_reason,
            "text": found.text,
        }, at_once=paid)  # fmt: skip
        self._answers[draw.key, draw.index] = found
        self.spent += cost

    def failure(self, draw: Draw, failure: Failure, cost: Cost) -> None:
        """A request has failed, and has cost something or nothing.

        Raises:
            WriteError: The machine refuses to write.
        """
        line = {"failure": draw.key, "index": draw.index, **_costs(cost), "kind": failure.kind}
        self._write({**line, "message": failure.message[:300]})
        self.spent += cost

    def _write(self, line: Mapping[str, object], *, at_once: bool = True) -> None:
        if self.path is None:
            return
        append_line(self.path, json.dumps(line, ensure_ascii=True))
        if at_once or time.monotonic() - self._synced > _PAUSE:
            sync(self.path)
            self._synced = time.monotonic()

    def close(self) -> None:
        """Let others have the file.

        Raises:
            WriteError: The disk could not take its last lines.
        """
        if self._lock is not None:
            assert self.path is not None
            sync(self.path)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _NoLedgerError(UserError):
    """The file is not one that could be repaired."""


def _costs(cost: Cost) -> dict[str, object]:
    return {"money": cost.money, "tokens": cost.tokens, "requests": cost.requests}
