"""Where a task's records lie: a file, a folder, a pattern of files, a zip archive."""

from __future__ import annotations

import fnmatch
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from weft.errors import UserError
from weft.files.whole import make_folder, temporary_place, write_whole
from weft.paths import local_path

_LARGEST = 1 << 30  # bytes of an archive's files that are read, in sum


@dataclass(frozen=True)
class Place:
    """What was given: ``root`` is where it is read, ``shown`` what the user calls it."""

    root: Path
    shown: str

    def files(self, pattern: str | None, where: str) -> list[Path]:
        """The files with records: the file itself, or those of a folder that fit the pattern (all without one).

        Raises:
            UserError: None fits.
        """
        if self.root.is_file() or pattern is None:
            return [self.root]
        found = sorted(path for path in self.root.glob(pattern) if path.is_file())
        if not found:
            inside = sorted(one.name for one in self.root.iterdir())[:8]
            raise UserError(
                f"{where}: {self.shown} has no file {pattern}. It holds {', '.join(inside) or 'nothing'}. Give the "
                "folder (or zip) as it was published, or the file with the questions itself."
            )
        return found

    def source(self, source: str) -> str:
        """The place of a record as the user knows it."""
        return source.replace(str(self.root), self.shown, 1) if self.shown != str(self.root) else source


@contextmanager
def opened(given: str | Path, patterns: Sequence[str], where: str) -> Iterator[Place]:
    """The place of data, readable inside the block; of a zip only the files that fit a pattern.

    Raises:
        UserError: Nothing is there, or the archive is damaged or too large.
    """
    path = local_path(given)
    if not path.exists():
        raise UserError(f"{where}: there is no file or folder {path}. Give the data with --data, or TASK=PATH.")
    if path.suffix.lower() != ".zip" or path.is_dir():
        yield Place(path, str(path))
        return
    with temporary_place() as folder:
        _unpack(path, folder, patterns or ["**/*"])
        yield Place(folder, str(path))


def _unpack(path: Path, folder: Path, patterns: Sequence[str]) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            wanted = [one for one in archive.infolist() if _fits(one.filename, patterns) and not one.is_dir()]
            if sum(one.file_size for one in wanted) > _LARGEST:
                raise UserError(f"{path}: its files take more than {_LARGEST >> 20} MB. Unpack it and give the folder.")
            for one in wanted:
                parts = PurePosixPath(one.filename).parts
                if ".." in parts or PurePosixPath(one.filename).is_absolute():
                    raise UserError(f"{path}: it holds {one.filename!r}, which points out of its folder.")
                make_folder(folder.joinpath(*parts).parent)
                with archive.open(one) as file:
                    data = file.read(one.file_size + 1)
                if len(data) != one.file_size:
                    raise UserError(f"{path}: {one.filename} is longer than the archive says; it is damaged.")
                write_whole(folder.joinpath(*parts), data)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a zip archive: {error}.") from None


def _fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a member of an archive fits one of the patterns, in which ``**/`` may stand for nothing."""
    return any(
        fnmatch.fnmatchcase(name, some) for one in patterns for some in (one, one.removeprefix("**/"), f"*/{one}")
    )
