"""Adapters that lie in the server's folder of adapters, read and checked before they are served.

A client names a folder inside that one. No name leads outside: not by ``..``, not as a path from the root, not through
a symbolic link. An adapter that another base or another tokenizer was trained with is refused.
"""

from __future__ import annotations

import copy
import os
import stat
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from torch import Tensor

from weft.core.adapter import MethodConfig
from weft.data.provenance import Provenance, TokenizerFacts, make_renderer
from weft.errors import UserError
from weft.files.adapter_folder import OWN_CONFIG, base_of, is_adapter, provenance_of, read, trained_on
from weft.generation.target import Target
from weft.heads.reward import OwnHead
from weft.methods.dense import how_kept
from weft.patterns import check_name
from weft.serve.envelope import ApiError, bad_request
from weft.training.same_run import other_base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_FILES = 1000


@dataclass(frozen=True)
class Candidate:
    """An adapter that was read from ``root`` and fits the base, as far as can be told before it is added."""

    name: str
    config: MethodConfig
    tensors: Mapping[str, Tensor]
    _: KW_ONLY
    root: str
    tokenizer: PreTrainedTokenizerBase
    classes: OwnHead | None
    provenance: dict[str, object] | None
    trained_on: dict[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, of an adapter that classifies."""
        return () if self.classes is None else self.classes.labels

    def target(self, served: Target, internal: str) -> Target:
        """How the adapter is asked: prompts are rendered as in its own training."""
        record = Provenance.read(self.provenance, self.root)
        # Rendering as in training may set the tokenizer's template; other adapters have another.
        renderer, notes = make_renderer(record, copy.copy(served.base.tokenizer))
        settings = (record.settings if record else None) or {}
        return Target(
            served.base, served.adapters, renderer, names=(internal,), data_settings={internal: settings}, notes=notes
        )


def folder_of(root: Path, path: str) -> Path:
    """The folder that a client's path means, inside ``root``.

    Raises:
        ApiError: It leads outside, or holds links or no adapter.
    """
    parts = PurePosixPath(path).parts
    if "\0" in path or "\\" in path or not parts or path.startswith(("/", "~")) or any(p in ("..", "/") for p in parts):
        raise _no_path(path, "it must lead from the server's folder of adapters to one inside it")
    place = root
    try:
        for part in parts:
            place = place / part
            if not stat.S_ISDIR(os.lstat(place).st_mode):
                raise _no_path(path, "there is no such folder")
        _check_files(place, path)
        found = is_adapter(place)
    except UserError:  # its words name the folder
        found = False
    except (OSError, ValueError):
        raise _no_path(path, "there is no such folder") from None
    if not found:
        raise _no_path(path, "that folder holds no adapter")
    return place


def _check_files(folder: Path, path: str) -> None:
    """Refuse a folder in which something is neither a file nor a folder: a link could lead anywhere."""
    waiting, seen = [folder], 0
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                seen += 1
                if seen > _MOST_FILES:
                    raise _no_path(path, f"that folder holds more than {_MOST_FILES} files")
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False):
                    raise _no_path(path, "that folder holds a link or a special file")


def _no_path(path: str, why: str) -> ApiError:
    return bad_request(f"lora_path {path[:200]!r}: {why}.", "lora_path", "bad_path")


def read_candidate(served: Target, root: Path, name: str, path: str) -> Candidate:
    """Read the adapter at ``path`` in ``root``, for the base that is served.

    Raises:
        ApiError: The path leads outside, or the adapter is damaged, or of another base or tokenizer.
    """
    folder = folder_of(root, path)
    try:
        check_name(name)
        config, tensors, classes = read(folder, served.base.model)
        provenance, recorded = provenance_of(folder), trained_on(folder) or {}
        record = Provenance.read(provenance, OWN_CONFIG)
        _check_base(served, recorded | {"model": base_of(folder)})
        _check_tokenizer(served, record)
        candidate = Candidate(
            name,
            config,
            tensors,
            root=path,
            tokenizer=served.base.tokenizer,
            classes=classes,
            provenance=provenance,
            trained_on=recorded,
        )
        _check_end(served, candidate)
    except UserError as error:
        # The message must not tell where the folder lies.
        told = str(error).replace(str(folder), path).replace(str(root), "")
        raise bad_request(f"{path}: {told}", "lora_path", "adapter_refused") from None
    return candidate


def _check_base(served: Target, recorded: Mapping[str, object]) -> None:
    here = how_kept(served.adapters.model, served.adapters.dtype)
    if any(recorded.get(key, kept) != kept for key, kept in here.items()):
        return  # the tensors are rounded otherwise, which says nothing of where they come from
    difference = other_base(served.base, recorded)
    if difference is not None:
        raise UserError(f"it was trained on another base ({difference}).")


def _check_tokenizer(served: Target, record: Provenance | None) -> None:
    if record is None or record.tokenizer is None:
        return
    here = TokenizerFacts.of(served.base.tokenizer)
    if found := record.tokenizer.differences(here):
        raise UserError(
            f"it was trained with another tokenizer: {'; '.join(found)} (SHA-256 here {here.sha256[:12]}…, in training "
            f"{record.tokenizer.sha256[:12]}…)."
        )


def _check_end(served: Target, candidate: Candidate) -> None:
    if candidate.labels or not served.adapters.architecture.writes:
        return
    end = candidate.target(served, candidate.name).renderer.eos_token_id
    if end not in served.stop_ids:
        raise UserError(
            f"its answers end with the token {end}, and those of this server with {sorted(served.stop_ids)}."
        )
