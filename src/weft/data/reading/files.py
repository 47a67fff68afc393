"""Find the files that a path means, and open them: folders, globs, compression, names that hide another content."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from weft.errors import UserError, nearest
from weft.foreign import check_regular
from weft.paths import names_in

TABLES = (".csv", ".tsv")
COLUMNAR = (".parquet", ".arrow", ".feather")
TEXTS = (".txt", ".md")
PAGES = (".html", ".htm")
OFFICE = (".docx", ".xlsx", ".pdf")
PLAIN = (".json", ".jsonl", *TABLES, *TEXTS, *PAGES)
SUFFIXES = (*PLAIN, *OFFICE, *COLUMNAR)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Files whose texts are learned may lie together, and so may both kinds of JSON.
_KIND = {".jsonl": ".json", **dict.fromkeys((*TEXTS, *PAGES, ".docx", ".pdf"), ".txt")}
# Beside records in a folder, these describe them.
_DESCRIBE = (".md", *PAGES, ".docx", ".pdf")
_SAVE_AS = {
    **dict.fromkeys((".xls", ".xlsm", ".xlsb", ".ods", ".numbers"), "Save it as .xlsx or .csv."),
    **dict.fromkeys((".doc", ".docm", ".odt", ".rtf", ".pages", ".ppt", ".pptx", ".epub"), "Save it as .docx or .txt."),
}
CHUNK = 1 << 20
_MEMORY = 128 << 20  # `xz -9` needs 65 MiB; a header may ask for 4 GiB
_MAGIC = {
    b"\x1f\x8b": ("compressed with gzip", ".gz"),
    b"BZh": ("compressed with bzip2", ".bz2"),
    b"\xfd7zXZ": ("compressed with xz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstandard", ".zst"),
    b"PAR1": ("a Parquet file", ".parquet"),
    b"ARROW1": ("an Arrow file", ".arrow"),
    b"PK\x03\x04": ("a zip archive (or an Excel sheet)", ".xlsx"),
    b"%PDF-": ("a PDF", ".pdf"),
    b"\xd0\xcf\x11\xe0": ("an old or a password-protected office file", ".doc"),
}
# Files of these names lie beside data in a folder and hold none.
_BESIDE = ("readme", "license", "licence", "dataset_info", "dataset_infos", "state", "dataset_dict")


@dataclass(frozen=True)
class Shards(os.PathLike[str]):
    """The Arrow files of one split of a data set, in order. Its records stand at ``name:row``, not in some cache."""

    name: str
    files: tuple[Path, ...]

    def __fspath__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name


Place = Path | Shards


class ByteSource(Protocol):
    """What the readers ask of an open file."""

    def read(self, size: int, /) -> bytes: ...

    def read1(self, size: int, /) -> bytes: ...


class DataFile(ByteSource, Protocol):
    """An open file, unpacked, that also shows what comes next."""

    def peek(self, size: int, /) -> bytes: ...


def kind_of(path: Path) -> tuple[str, str]:
    """(suffix of the data, suffix of the compression or an empty string), in lower case."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


def is_saved_dataset(path: Path) -> bool:
    """Whether ``path`` is a folder that Hugging Face's ``save_to_disk`` wrote."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def find_files(path: str | os.PathLike[str]) -> list[Path]:
    """The data files of a file, a folder (with the folders in it) or a glob, sorted by path.

    A folder that ``datasets`` has saved stands for itself. Shards stand for their files.

    Raises:
        UserError: There is no file, a file is of no known kind, or a folder or glob has files of several kinds.
    """
    if isinstance(path, Shards):
        return list(path.files)
    if not isinstance(path, (str, os.PathLike)):
        given = type(path).__name__
        raise UserError(f"records are read from a file, a folder or a pattern (*.jsonl), not from {given}: write one.")
    place = Path(path)
    if is_saved_dataset(place):
        return [place]
    if place.is_dir():
        inside = sorted(file for file in place.rglob("*") if file.is_file() and not _hidden(file, place))
        data = [file for file in inside if kind_of(file)[0] in SUFFIXES]
        found = [file for file in data if file.name.split(".")[0].lower() not in _BESIDE]
        if any(_family(file) != ".txt" for file in found):
            found = [file for file in found if kind_of(file)[0] not in _DESCRIBE]
        if not found:
            names = ", ".join(file.name for file in inside[:5])
            raise UserError(
                f"{path} is a directory without data files (it holds {names or 'no files'}). Files that are read end "
                f"in {', '.join(SUFFIXES)}, also with {', '.join(COMPRESSED)} after it."
            )
        return _one_kind(found, f"the folder {path}")
    if not place.exists() and glob.has_magic(str(path)):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise UserError(
                f"{path}: no file matches this pattern (it is relative to the current directory). `*` stands for any "
                "name, `**` for any folders."
            )
        return _one_kind([_readable_kind(file) for file in found], f"the pattern {path}")
    if not place.exists():
        seen = "" if place.is_absolute() else " (relative to the current directory)"
        raise UserError(f"no data file at {path}{seen}.{nearest(place.name, names_in(place.parent))}")
    return [_readable_kind(place)]


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _readable_kind(file: Path) -> Path:
    data, compression = kind_of(file)
    if data in PLAIN or (data in (*COLUMNAR, *OFFICE) and not compression):
        return file
    if data in (*COLUMNAR, *OFFICE):
        kind = "Parquet and Arrow" if data in COLUMNAR else data
        raise UserError(f"{file}: {kind} files are compressed inside; unpack the outer '{compression}'.")
    what = f"'{file.suffix}'" if not compression else f"'{data}{compression}'"
    advice = _SAVE_AS.get(data, "Convert the file, for instance to JSON Lines (.jsonl: one object per line).")
    raise UserError(
        f"{file}: files ending in {what} are not read. Known: {', '.join(SUFFIXES)}; compressed also with "
        f"{', '.join(COMPRESSED)} after it. {advice}"
    )


def _family(file: Path) -> str:
    """One suffix for all kinds that may lie together."""
    suffix = kind_of(file)[0]
    return _KIND.get(suffix, suffix)


def _one_kind(files: list[Path], what: str) -> list[Path]:
    """``files``, if all are of one kind (.json and .jsonl count as one, and so do all texts)."""
    if len(set(map(_family, files))) > 1:
        kinds = Counter("".join(kind_of(file)) for file in files)
        listed = ", ".join(f"{suffix} ({count})" for suffix, count in sorted(kinds.items()))
        pattern = files[0].with_name("*" + "".join(kind_of(files[0])))
        raise UserError(
            f"{what} holds files of several kinds: {listed}. Name one kind with a pattern such as {pattern}, or list "
            "the files one by one."
        )
    return unique(files)


def unique(files: Sequence[Path]) -> list[Path]:
    """``files``, all of which must be different files.

    Raises:
        UserError: Two of the paths mean one file.
    """
    seen: dict[object, Path] = {}
    for file in files:
        try:
            status = file.stat()
        except OSError:
            continue
        key = (status.st_dev, status.st_ino)
        if key in seen:
            other = "" if seen[key] == file else f" (as {seen[key]} and {file})"
            raise UserError(
                f"{file} stands twice in the data{other}: its records would be seen twice as often. Name it once; to "
                "have it seen more often, give weights."
            )
        seen[key] = file
    return list(files)


@contextmanager
def opened(path: Path) -> Iterator[DataFile]:
    """Open a file and unpack it as its name says. Raises UserError if the content is of another kind."""
    compression = kind_of(path)[1]
    check_regular(path)  # a FIFO would block, a device never ends
    with io.BufferedReader(path.open("rb", buffering=0), CHUNK) as raw:
        _check_magic(path, raw.read(8), compression)
        raw.seek(0)
        if not compression:
            yield raw
            return
        with io.BufferedReader(_unpacked(path, raw, compression), CHUNK) as file:
            yield file


def _check_magic(path: Path, head: bytes, compression: str) -> None:
    data = kind_of(path)[0]
    wanted = compression or (data if data in (*COLUMNAR, *OFFICE) else "")
    found = next((entry for magic, entry in _MAGIC.items() if head.startswith(magic)), None)
    if wanted:
        unmarked = found is None and wanted in (".arrow", ".feather")  # a stream of Arrow has no mark
        same = found is not None and (found[1] == wanted or {found[1], wanted} == {".xlsx", ".docx"})
        if head and not unmarked and not same:
            what = f"it is {found[0]}" if found else "the content is something else"
            raise UserError(
                f"{path}: the name ends in '{wanted}', but {what}. Give the file the suffix of its content: "
                f"{', '.join(SUFFIXES)}, also with {', '.join(COMPRESSED)} after it."
            )
    elif found is not None:
        what, suffix = found
        cure = {
            ".xlsx": "Unpack it (or rename it to end in .xlsx, if it is a sheet).",
            ".doc": "Open it in its program, and save it as .xlsx, .docx or .csv without a password.",
            **{own: f"Rename it to end in {own}." for own in (".parquet", ".arrow", ".pdf")},
        }.get(suffix, f"Rename it to end in {data}{suffix}.")
        raise UserError(f"{path}: the name ends in '{data}', but this is {what}. {cure}")


def _unpacked(path: Path, raw: IO[bytes], compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == ".bz2":
        return bz2.BZ2File(raw)
    if compression == ".xz":
        return _Unpacker(raw, lambda: lzma.LZMADecompressor(memlimit=_MEMORY), CHUNK, bounded=True)
    try:
        import zstandard
    except ImportError:
        raise UserError(f'{path}: .zst files need a package: pip install "weft[zstandard]" (or unpack it).') from None
    # Its output cannot be bounded, so its input is: 1 KiB unpacks to 32 MiB at most.
    unpacker = zstandard.ZstdDecompressor(max_window_size=_MEMORY)
    return _Unpacker(raw, unpacker.decompressobj, 1 << 10, bounded=False)


class _Unpacker(io.RawIOBase):
    """Unpacks a compressed stream frame by frame, in small pieces however much they unpack to.

    Unlike ``lzma.LZMAFile`` it limits the memory that a header may ask for. Unlike zstandard's own reader it notices
    that a file is cut off.
    """

    def __init__(self, raw: IO[bytes], make: Callable[[], Any], piece: int, *, bounded: bool) -> None:
        self._raw, self._make, self._piece, self._bounded = raw, make, piece, bounded
        self._unpack, self._fresh = make(), True
        self._data = self._out = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            if self._unpack.eof:
                self._data, self._unpack, self._fresh = self._unpack.unused_data.lstrip(b"\0"), self._make(), True
            if not self._data and getattr(self._unpack, "needs_input", True):
                self._data = self._raw.read(self._piece)
                if self._fresh:
                    self._data = self._data.lstrip(b"\0")  # padding between the frames of xz
                if not self._data and self._fresh:
                    return 0
                if not self._data:
                    raise EOFError("the compressed data ends in the middle")
            data, self._data, self._fresh = self._data, b"", False
            self._out = self._unpack.decompress(data, len(buffer)) if self._bounded else self._unpack.decompress(data)
        size = min(len(buffer), len(self._out))
        buffer[:size], self._out = self._out[:size], self._out[size:]
        return size


def damaged(error: BaseException) -> bool:
    """Whether an unpacker raised this error because the file is damaged or ends too early."""
    # bz2 and gzip raise OSError without a number; zstandard has a class of its own.
    plain = isinstance(error, OSError) and error.errno is None
    return plain or isinstance(error, (EOFError, lzma.LZMAError, zlib.error)) or type(error).__name__ == "ZstdError"


def lines_in(path: str) -> int:
    """The number of lines of a file of text; of any other 0, for its records stand at rows.

    Raises:
        UserError: The file is not what its name says.
    """
    file = Path(path)
    if kind_of(file)[0] not in PLAIN or not file.is_file():
        return 0
    count, piece = 0, b"\n"
    with opened(file) as data:
        for piece in iter(lambda: data.read(1 << 20), b""):
            count += piece.count(b"\n")
    return count + (not piece.endswith(b"\n"))
