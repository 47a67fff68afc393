"""Answers that were paid for: kept in a file for each contestant, so that nothing is computed twice.

The file's name is a hash of all that a contestant answers by. A line holds the hash of a request and its answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.errors import UserError
from weft.files.whole import append_line, drop_torn_line, make_folder
from weft.foreign import json_lines
from weft.generation.identity import content_hash
from weft.generation.target import Target
from weft.methods.dense import how_kept
from weft.models.hub import folder_of
from weft.models.load import resolve_model
from weft.training.same_run import base_fingerprint
from weft.version import __version__

_FORMAT = 1  # of a line, and of what is hashed


class KeptAnswers:
    """The answers of one contestant by the hash of what was asked.

    Args:
        path: The file; it is read now and grows with every answer. None: answers are kept in memory alone.

    Raises:
        UserError: A line of the file is none of these.
        WriteError: The machine refuses to write.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        if path is None:
            return
        make_folder(path.parent)
        if path.exists():
            drop_torn_line(path)
            for number, line in enumerate(json_lines(path), 1):
                key = line.get("key")
                if not isinstance(key, str) or "answer" not in line:
                    raise UserError(f"{path}:{number}: this is no kept answer. Delete the file to ask again.")
                self._known[key] = line["answer"]

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, answers: Mapping[str, object]) -> None:
        """Keep some more answers, which JSON can hold.

        Raises:
            WriteError: The machine refuses to write.
        """
        self._known |= answers
        if self.path is not None and answers:
            lines = (json.dumps({"key": key, "answer": value}, ensure_ascii=False) for key, value in answers.items())
            append_line(self.path, "\n".join(lines))


def target_mark(target: Target) -> str:
    """A hash of what all contestants of a target answer by: the base, and how texts become tokens.

    A base in a folder counts by its name, the smallest of its tensors, and the size and time of each of its files.
    """
    base = target.base
    folder = folder_of(resolve_model(base.name))
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    return key_of(
        _FORMAT, __version__, base_fingerprint(base),
        [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        how_kept(base.model, target.adapters.dtype), target.renderer.fingerprint()["sha256"],
    )  # fmt: skip


def contestant_mark(target: Target, name: str | None, mark: str) -> str:
    """A hash of all that adapter ``name`` (None: the base) answers by; ``mark`` is the target's."""
    return key_of(mark, None if name is None else content_hash(target.adapters[name]))


def key_of(*asked: object) -> str:
    """The hash of a request, whose parts JSON can hold."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
