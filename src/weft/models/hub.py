"""Models and data sets on a hub: Hugging Face (or the mirror that ``HF_ENDPOINT`` names) and ModelScope."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Literal

from weft.errors import UserError

Hub = Literal["huggingface", "modelscope"]
# What the data readers read.
_TEXTS = (".json", ".jsonl", ".csv", ".tsv", ".txt")
_PACKED = tuple(text + packed for text in _TEXTS for packed in (".gz", ".bz2", ".xz", ".zst"))
_SUFFIXES = (*_TEXTS, *_PACKED, ".parquet", ".arrow")


def fetch_model(name: str, hub: Hub = "huggingface") -> str:
    """What transformers can load: a folder as it is, a Hugging Face id as it is, a ModelScope id as its local folder.

    Raises:
        UserError: the extra for ModelScope is not installed, or it has no such model.
    """
    if hub == "huggingface" or Path(name).is_dir():
        return name
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise UserError('hub: modelscope needs its package: pip install "weft[modelscope]".') from None
    try:
        return str(snapshot_download(name, ignore_file_pattern=[r"\.bin$", r"\.pth?$"]))
    except Exception as error:  # whatever its client raises
        raise UserError(f"ModelScope has no model {name!r}, or cannot be reached: {_first_line(error)}") from error


def is_dataset_id(data: str) -> bool:
    """Whether ``data`` reads as ``owner/name`` (or ``owner/name:file``) of a hub rather than as a file."""
    if Path(data).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[][\w./*?-]+)?", data):
        return False
    owner, _, name = data.partition("/")
    return owner not in (".", "..") and not Path(owner).is_dir() and (":" in name or not name.endswith(_SUFFIXES))


def fetch_dataset(data: str, hub: Hub = "huggingface") -> Path:
    """Download the data file of a hub's data set (it is cached) and say where it lies.

    ``owner/name`` must hold one data file; of several, one is chosen by ``owner/name:file``, or all that match a
    pattern by ``owner/name:data/train-*.parquet``: the answer is then that pattern where they lie.

    Raises:
        UserError: it is not there, holds no readable file or several, or the hub cannot be reached.
    """
    name, _, wanted = data.partition(":")
    try:
        files = _list_files(name, hub)
        readable = [file for file in files if file.endswith(_SUFFIXES) and Path(file).name != "README.txt"]
        if wanted and wanted not in files:
            matching = sorted(file for file in readable if _matches(file, wanted))
            if not matching:
                listed = ", ".join(readable) or "none to read"
                raise UserError(f"data {data!r}: no such file there; there are: {listed}.")
            places = [_download(name, file, hub) for file in matching]
            return Path(places[0].removesuffix(matching[0])) / wanted
        if not wanted and len(readable) != 1:
            what = (
                "several data files" if readable else f"no file that Weft reads ({', '.join(_TEXTS)}, .parquet, .arrow)"
            )
            listed = ", ".join(readable or files)
            cure = f"Name one: {name}:<file>, or several by a pattern: {name}:<folder>/train-*.parquet."
            if not readable:
                cure = (
                    f'Save it with the `datasets` package (pip install "weft[datasets]"): '
                    f"datasets.load_dataset({name!r}, split='train').save_to_disk('{Path(name).name}'), and name that "
                    "folder as data."
                )
            raise UserError(f"data {data!r} holds {what}: {listed}. {cure}")
        return Path(_download(name, wanted or readable[0], hub))
    except UserError:
        raise
    except Exception as error:  # whatever the hub's client raises
        raise UserError(
            f"data {data!r} is no file here, and as a data set of {hub} it cannot be fetched: {_first_line(error)}"
        ) from error


def _matches(file: str, pattern: str) -> bool:
    """As ``glob`` does it: ``*`` stays within a folder."""
    return file.count("/") == pattern.count("/") and fnmatch.fnmatchcase(file, pattern)


def _list_files(name: str, hub: Hub) -> list[str]:
    if hub == "huggingface":
        from huggingface_hub import HfApi

        return list(HfApi().list_repo_files(name, repo_type="dataset"))
    folder = _modelscope_dataset(name)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _download(name: str, file: str, hub: Hub) -> str:
    if hub == "huggingface":
        from huggingface_hub import hf_hub_download

        return hf_hub_download(name, file, repo_type="dataset")
    return str(_modelscope_dataset(name) / file)


def _modelscope_dataset(name: str) -> Path:
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download
    except ImportError:
        raise UserError('hub: modelscope needs its package: pip install "weft[modelscope]".') from None
    return Path(dataset_snapshot_download(name))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
