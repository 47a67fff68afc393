"""Where a report's figures come from: folders of results, and runs with the results in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from weft.errors import UserError
from weft.evaluate.results import ITEMS, SUMMARY, Results
from weft.files.run_folder import RUN_FILE

# In a run's folder; `weft eval` writes there.
EVALUATION = "evaluation"


@dataclass(frozen=True)
class Source:
    """One folder that a user named.

    Attributes:
        label: by which it is told apart from the others.
        results: the folders of results in it.
        run: the folder of the run that it is or lies in; None if it lies elsewhere.
        unfinished: the evaluations in it that were cut and have no summary.
    """

    path: Path
    label: str
    results: tuple[Path, ...]
    _: KW_ONLY
    run: Path | None
    unfinished: tuple[Path, ...] = ()

    def read(self) -> list[Results]:
        """All its results.

        Raises:
            UserError: A file is damaged.
        """
        return [Results.read(folder) for folder in self.results]


def find_sources(paths: Sequence[Path]) -> list[Source]:
    """What lies in these folders; reads no results.

    Raises:
        UserError: One holds neither a run nor results, or is named twice.
    """
    seen: dict[Path, Path] = {}
    for path in paths:
        other = seen.setdefault(path.resolve(), path)
        if other is not path:
            raise UserError(f"{path} is named twice ({other}). Name each folder once.")
    return [_source(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _source(path: Path, label: str) -> Source:
    if not path.exists():
        raise UserError(f"{path} is not there. Give the folder of a run, or of results that `weft eval` has written.")
    if (path / SUMMARY).is_file():
        above = path.resolve().parent
        run = above.parent if above.name == EVALUATION and (above.parent / RUN_FILE).is_file() else None
        return Source(path, label, (path,), run=run)
    if (path / RUN_FILE).is_file():
        folders = sorted(one for one in (path / EVALUATION).glob("*") if one.is_dir())
        done = tuple(one for one in folders if (one / SUMMARY).is_file())
        unfinished = tuple(one for one in folders if one not in done and _begun(one))
        return Source(path, label, done, run=path, unfinished=unfinished)
    if path.is_dir() and _begun(path):
        raise UserError(
            f"{path}: this evaluation was cut: {SUMMARY} is not there yet. Go on with the same `weft eval`."
        )
    raise UserError(
        f"{path} is neither the folder of a run ({RUN_FILE}) nor of results ({SUMMARY}). `weft train` writes the one, "
        "`weft eval` the other."
    )


def _begun(folder: Path) -> bool:
    return (folder / ITEMS).is_file()


def _labels(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many before it as tell all apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(len(one) for one in parts) + 1):
        found = ["/".join(one[-count:]) for one in parts]
        if len(set(found)) == len(found):
            return found
    return [str(path) for path in paths]
