"""Data sets of a hub that are not one plain file: Hugging Face's ``datasets`` reads them, Weft uses its cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import UserError

# The files that the data readers read.
_TEXTS = (".json", ".jsonl", ".csv", ".tsv", ".txt")
_PACKED = tuple(text + packed for text in _TEXTS for packed in (".gz", ".bz2", ".xz", ".zst"))
SUFFIXES = (*_TEXTS, *_PACKED, ".parquet", ".arrow")
_BESIDE = ("README.txt", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_LISTED = 20
_SAID = 300  # characters of another package's error


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set: ``owner/name/split`` and the Arrow files in the cache that hold it, in order."""

    name: str
    files: tuple[Path, ...]


def load_split(data: str, where: str, files: Sequence[str]) -> HubSplit:
    """One split of a data set, as Arrow files in the cache of ``datasets``; no code of the data set is run.

    Args:
        data: ``owner/name``, ``owner/name:split``, ``owner/name:configuration`` or ``owner/name:configuration/split``.
        where: The name by which ``datasets`` finds it: the hub's, or a folder.
        files: The files of the repository, to be named in errors.

    Raises:
        UserError: ``datasets`` is not installed or cannot read it, it needs a script, or it has several configurations
            or splits and none is named.
    """
    name = data.partition(":")[0]
    script = f"{name.rpartition('/')[2]}.py"
    if script in files:
        raise UserError(
            f"data {data!r} is made by a script of its own ({script}), and Weft runs no code from a hub. "
            f"{_files(name, files)} Or take a copy of the data set in plain files (Parquet, JSON Lines)."
        )
    datasets = _datasets(data, files)
    try:
        configs = list(datasets.get_dataset_config_names(where))
        default = datasets.get_dataset_default_config_name(where) if len(configs) > 1 else None
        config, split = _meant(data, configs, default)
        loaded = datasets.load_dataset(where, config, keep_in_memory=False, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # the package and the hub's client raise many kinds
        cause = " ".join(str(error.__cause__ or error).split())[:_SAID].rstrip(".") or type(error).__name__
        raise UserError(
            f"data {data!r} cannot be read by the package `datasets`: {cause}. {_files(name, files)}"
        ) from error
    chosen = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if chosen not in loaded:
        raise UserError(_no_split(data, config, split, loaded))
    shards = tuple(Path(file["filename"]) for file in loaded[chosen].cache_files)
    return HubSplit("/".join(part for part in (name, config, chosen) if part), shards)


def _meant(data: str, configs: Sequence[str], default: str | None) -> tuple[str | None, str | None]:
    """The configuration (None: there is one only) and the split (None: none is named) that the word in ``data`` means.

    ``default`` is the data set's own choice of a configuration where none is named.
    """
    name, _, word = data.partition(":")
    config, _, split = word.partition("/")
    if config in configs:
        return (config if len(configs) > 1 else None), split or None
    if default is not None and not split:
        return default, word or None
    if len(configs) > 1:
        what = f"has no configuration {config!r}" if config else "has several configurations"
        raise UserError(
            f"data {data!r} {what}: {listed(configs)}. Name one: {name}:{configs[0]}, or one with a split of it: "
            f"{name}:{configs[0]}/train."
        )
    if split:
        raise UserError(
            f"data {data!r}: there is neither such a file nor a configuration {config!r}; the data set has only one. "
            f"Name the split alone: {name}:{split}."
        )
    return None, word or None


def _no_split(data: str, config: str | None, split: str | None, found: Iterable[str]) -> str:
    name = data.partition(":")[0]
    prefix = f"{name}:{config}/" if config else f"{name}:"
    what = f"has no split (and no file) {split!r}; its splits are" if split else "has no split 'train', but several"
    found = list(found)
    return f"data {data!r} {what}: {listed(found)}. Name one: {prefix}{found[0]}."


def _datasets(data: str, files: Sequence[str]) -> Any:
    try:
        import datasets
    except ImportError:
        name, _, word = data.partition(":")
        what = f"{word!r} is no file of the data set" if word else "it is not one plain file"
        raise UserError(
            f'data {data!r}: {what}, and anything else is read by a package: pip install "weft[datasets]". '
            f"{_files(name, files)}"
        ) from None
    return datasets


def _files(name: str, files: Sequence[str]) -> str:
    """The files that Weft reads itself, as a hint what can be named instead."""
    found = readable(files)
    if not found:
        return f"It has no file that Weft reads by itself ({listed(files) or 'it is empty'})."
    pattern = f"{name}:<folder>/train-*.parquet"
    return f"Or name one of its files, {name}:<file>, or several by a pattern, {pattern}; there are: {listed(found)}."


def readable(files: Iterable[str]) -> list[str]:
    """Those of a repository's files that Weft's readers read."""
    return [file for file in files if file.endswith(SUFFIXES) and Path(file).name not in _BESIDE]


def listed(names: Iterable[str]) -> str:
    """The first names, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
