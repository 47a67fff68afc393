"""Models and data sets on a hub: Hugging Face (or the mirror that ``HF_ENDPOINT`` names) and ModelScope."""

from __future__ import annotations

import fnmatch
import re
from functools import cache
from pathlib import Path
from typing import Literal

from weft.errors import UserError, reason_of
from weft.models.hub_datasets import SUFFIXES, HubSplit, listed, load_split, readable

Hub = Literal["huggingface", "modelscope"]
# How long a hub may take to answer at all.
_SECONDS = 5.0
_WAYS = (
    "Give the path of a folder or file on this machine that holds the {}; or name a mirror that can be reached "
    "(HF_ENDPOINT=https://...); or take it from ModelScope (hub: modelscope)."
)


# What of a model's repository is needed. Its weights may be in parts, which the index names.
_FILES = (
    "config.json, generation_config.json, the tokenizer's files (tokenizer*, special_tokens_map.json), *.safetensors*"
)


def _fetch(name: str, what: str = "") -> str:
    """The sentence on how another machine fetches it."""
    folder = name.partition("/")[2]
    return (
        f"A machine that is online fetches it: `hf download {name}{what} --local-dir {folder}`; copy that folder here"
    )


def fetch_model(name: str, hub: Hub = "huggingface") -> str:
    """A name that transformers can load: a folder or a Hugging Face id as it is, for a ModelScope id its local folder.

    Where the hub cannot be reached, it is the folder in the cache.

    Raises:
        UserError: The extra for ModelScope is not installed, it has no such model, or no hub can be reached and the
            model is not in the cache.
    """
    if Path(name).is_dir():
        return name
    if hub == "huggingface":
        return name if (away := _unreachable()) is None else _cached(name, away)
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise UserError('hub: modelscope needs its package: pip install "weft[modelscope]".') from None
    try:
        return str(snapshot_download(name, ignore_file_pattern=[r"\.bin$", r"\.pth?$"]))
    except Exception as error:  # its client raises many kinds
        raise UserError(f"ModelScope has no model {name!r}, or cannot be reached: {reason_of(error)}") from error


def folder_of(source: str) -> Path | None:
    """The folder on this machine with the files of a model that was just loaded; None if it is not known."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _unreachable() -> str | None:
    """Why Hugging Face's hub, or its mirror, cannot be asked; None if it answers.

    It is asked once and for a short time: its client and transformers ask again for every file, half a minute in all.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so that no hub is asked"
    return _no_answer(constants.ENDPOINT)


@cache
def _no_answer(endpoint: str) -> str | None:
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=_SECONDS)
    except Exception as error:  # of two HTTP clients, by its version
        return f"this machine seems to be offline: {endpoint} cannot be reached ({reason_of(error)})"
    return None


def _cached(name: str, away: str) -> str:
    """The folder of a model that was fetched before; ``away`` says why it cannot be fetched now."""
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(name, local_files_only=True))
    except Exception:  # its client raises many kinds
        raise UserError(
            f"the model {name!r} is no folder here and was not fetched before, and {away}. {_WAYS.format('model')} "
            f"{_fetch(name)}. Of it are needed: {_FILES} (where there are only *.bin: these, and `weft convert`)."
        ) from None


def is_dataset_id(data: str) -> bool:
    """Whether ``data`` reads as ``owner/name`` (or ``owner/name:part``) of a hub rather than as a file."""
    if Path(data).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[][\w./*?+=,@-]+)?", data):
        return False
    owner, _, name = data.partition("/")
    return owner not in (".", "..") and not Path(owner).is_dir() and (":" in name or not name.endswith(SUFFIXES))


def fetch_dataset(data: str, hub: Hub = "huggingface") -> Path | HubSplit:
    """Download a hub's data set, or the part that is asked for (into a cache); returns its place.

    ``owner/name`` with one data file means that file, ``owner/name:file`` one of several. With
    ``owner/name:data/train-*.parquet`` the result is the pattern in the cache, for all files that match. The package
    ``datasets`` reads the rest (``load_split``): the split ``train`` of ``owner/name``, ``owner/name:split``,
    ``owner/name:configuration`` or ``owner/name:configuration/split``.

    Raises:
        UserError: It does not exist, it is not clear what is meant, or the hub cannot be reached.
    """
    name, _, wanted = data.partition(":")
    away = _unreachable() if hub == "huggingface" else None
    try:
        files = _list_files(name, hub, fetched=away is not None)
        found = readable(files)
        if wanted in files or (not wanted and len(found) == 1):
            return Path(_download(name, wanted or found[0], hub, fetched=away is not None))
        matching = sorted(file for file in found if _matches(file, wanted))
        if matching:
            places = [_download(name, file, hub, fetched=away is not None) for file in matching]
            return Path(places[0].removesuffix(matching[0])) / wanted
        if wanted.endswith(SUFFIXES) or any(mark in wanted for mark in "*?["):
            raise UserError(f"data {data!r}: no such file there; there are: {listed(found) or 'none to read'}.")
        if hub == "huggingface":
            return load_split(data, name, files)
        folder = _modelscope_dataset(name)
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():  # saved by `datasets`
            return folder / wanted
        return load_split(data, str(folder), files)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        if away is not None:
            raise UserError(
                f"data {data!r} is no file here and was not fetched before, and {away}. {_WAYS.format('data')} "
                f"{_fetch(name, ' --repo-type dataset')}."
            ) from error
        raise UserError(
            f"data {data!r} is no file here, and as a data set of {hub} it cannot be fetched: {reason_of(error)}"
        ) from error


def _matches(file: str, pattern: str) -> bool:
    """Whether a file matches as in ``glob``, where ``*`` stays within a folder."""
    return file.count("/") == pattern.count("/") and fnmatch.fnmatchcase(file, pattern)


def _list_files(name: str, hub: Hub, *, fetched: bool) -> list[str]:
    """The files of a data set; of Hugging Face's only those that were ``fetched`` before, if asked."""
    if hub == "huggingface":
        from huggingface_hub import HfApi, snapshot_download

        if fetched:
            folder = Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
        else:
            return list(HfApi().list_repo_files(name, repo_type="dataset"))
    else:
        folder = _modelscope_dataset(name)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _download(name: str, file: str, hub: Hub, *, fetched: bool) -> str:
    if hub == "huggingface":
        from huggingface_hub import hf_hub_download

        return hf_hub_download(name, file, repo_type="dataset", local_files_only=fetched)
    return str(_modelscope_dataset(name) / file)


def _modelscope_dataset(name: str) -> Path:
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download
    except ImportError:
        raise UserError('hub: modelscope needs its package: pip install "weft[modelscope]".') from None
    return Path(dataset_snapshot_download(name))
