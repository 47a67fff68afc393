"""The one place for writing: files and folders that appear whole or not at all, their hashes and sizes.

All that Weft writes goes through this file, so that each refusal of the machine becomes a ``WriteError``, and nothing
that is half written remains. ``tests/files/test_writing.py`` looks for writing elsewhere.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors.torch import save_file
from torch import Tensor

from weft.errors import UserError
from weft.files.writing import WriteError, writing

_PART, _OLD = ".unfinished", ".replaced"
_TEMPORARY = "free some space, or name another folder for temporary files (the environment variable TMPDIR)"


def check_new(output: Path, name: str = "") -> tuple[Path, Path]:
    """The place of a new folder, and the nearest folder above it that is there; changes nothing.

    Raises:
        UserError: ``output`` is taken, or cannot be made where it is to go.
    """
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{name}{output} is there already; it is left alone. Take another folder.")
    target = Path(os.path.realpath(output))
    above = next(path for path in target.parents if os.path.lexists(path))
    if not above.is_dir():
        raise UserError(f"{name}{output}: {above} is no folder.")
    return target, above


@contextmanager
def new_folder(output: Path, name: str = "") -> Iterator[Path]:
    """Give the block a folder to write, which becomes ``output`` at the block's end; after an error nothing remains.

    ``name`` stands before the path in messages. Under the folder's own name nothing is there before the end.

    Raises:
        UserError: ``output`` is taken, or cannot be made where it is to go.
        WriteError: The machine refuses to write there.
    """
    target, above = check_new(output, name)
    part = _beside(target)
    remove(part)
    try:
        with _told_as(part, output, name):
            yield part
            _sync_all(part)
            os.replace(part, target)
            try:
                with writing(part):
                    _sync(target.parent)
            except BaseException:
                remove(target)
                raise
    except BaseException:
        remove(part)
        with suppress(OSError):  # the folders above that were made for it
            for folder in target.parents[: target.parents.index(above)]:
                folder.rmdir()
        raise


@contextmanager
def refilled_folder(output: Path, drop: Collection[str] = ()) -> Iterator[Path]:
    """Give the block a folder to write, whose files come into ``output`` at the block's end; other files there stay.

    After an error ``output`` is as it was. ``drop`` are names of files that go, beside those that
    the block has written, unless they are among them.

    Raises:
        UserError: ``output`` is a file.
        WriteError: The machine refuses to write there.
    """
    if not output.is_dir():
        with new_folder(output) as part:
            yield part
        return
    # Inside it: the folder may be a mount, or one in whose parent nobody may write.
    part, old = output / _PART, output / _OLD
    remove(part)
    remove(old)
    try:
        with _told_as(part, output), _told_as(old, output):
            yield part
            _sync_all(part)
            with writing(output):
                _take_over(part, output, old, drop)
            sync(output)
    finally:
        remove(part)
        remove(old)


def _take_over(part: Path, output: Path, old: Path, drop: Collection[str]) -> None:
    """Move the files of ``part`` into ``output``. If one cannot be moved, all that were there come back."""
    files = [path.relative_to(part) for path in sorted(part.rglob("*")) if path.is_file()]
    dropped = {file.parent / name for file in files for name in drop} - set(files)
    gone = [file for file in sorted(dropped) if (output / file).is_file()]
    new = [file for file in files if not _equal(part / file, output / file)]
    for file in (*new, *gone):
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        if (output / file).exists():
            (old / file).parent.mkdir(parents=True, exist_ok=True)
            _second_name(output / file, old / file)
    changed: list[Path] = []
    try:
        for file in (*new, *gone):
            changed.append(file)
            if file in gone:
                (output / file).unlink()
            else:
                os.replace(part / file, output / file)
    except BaseException:
        for file in changed:
            with suppress(OSError):
                if (old / file).exists():
                    os.replace(old / file, output / file)
                else:
                    (output / file).unlink(missing_ok=True)
        raise


def _equal(path: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(path, other, shallow=False)


def _second_name(path: Path, other: Path) -> None:
    try:
        os.link(path, other)
    except OSError:  # a file system without links
        shutil.copyfile(path, other)


@contextmanager
def _told_as(part: Path, output: Path, name: str = "") -> Iterator[None]:
    """Let errors about what lies in ``part`` be about ``output``, where the user looks for it."""
    try:
        yield
    except WriteError as error:
        if not error.path.is_relative_to(part):
            raise
        raise error.at(output / error.path.relative_to(part), name) from error.__cause__
    except OSError as error:
        where = Path(error.filename) if isinstance(error.filename, str) else None
        if error.errno is None or where is None or not where.is_relative_to(part):
            raise
        raise WriteError(output / where.relative_to(part), error.errno, name=name) from error


def write_whole(path: Path, content: bytes | str | Iterable[str], name: str = "") -> None:
    """Write a text, pieces of one, or bytes, so that the file is the old one or the new one, never a part.

    Raises:
        WriteError: The machine refuses to write it; ``name`` stands before the path in the message.
    """
    target = Path(os.path.realpath(path))
    with writing(path, name=name):
        if os.path.lexists(target) and not target.is_file():  # a device or a pipe
            _write(target, content)
            return
        part = _beside(target)
        try:
            _write(part, content)
            _sync(part)
            os.replace(part, target)
        except BaseException:
            remove(part)
            raise
        _sync(target.parent)


def _write(path: Path, content: bytes | str | Iterable[str]) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    with path.open("w", encoding="utf-8") as file:
        file.writelines([content] if isinstance(content, str) else content)


def write_text(path: Path, text: str) -> None:
    """Write a file in a folder that is new.

    Raises:
        WriteError: The machine refuses to write it.
    """
    with writing(path):
        path.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Put a line at the end of a file. If it does not fit, the file is as it was.

    Raises:
        WriteError: The machine refuses to write it.
    """
    before = path.stat().st_size if path.exists() else None
    try:
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except WriteError:
        with suppress(OSError):
            if before is None:
                path.unlink(missing_ok=True)
            else:
                os.truncate(path, before)
        raise


def drop_torn_line(path: Path) -> None:
    """Take off what stands behind the last end of a line: whoever wrote it was ended in the middle.

    Raises:
        WriteError: The machine refuses to write.
    """
    with writing(path), open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:
            start = max(0, keep - (1 << 16))
            file.seek(start)
            if (found := file.read(keep - start).rfind(b"\n")) >= 0:
                keep = start + found + 1
                break
            keep = start
        if keep < end:
            file.truncate(keep)


def cut_file(path: Path, size: int) -> None:
    """Take off what stands behind the first ``size`` bytes.

    Raises:
        WriteError: The machine refuses to write.
    """
    with writing(path):
        os.truncate(path, size)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors of any shape as safetensors, in a folder that is new.

    Raises:
        WriteError: The machine refuses to write it.
    """
    with writing(path):
        save_file(dict(tensors), path, metadata={"format": "pt"})


def copy_file(source: Path, path: Path) -> None:
    """Copy a file into a folder that is new.

    Raises:
        WriteError: The machine refuses to write it.
    """
    with writing(path):
        shutil.copyfile(source, path)


def make_folder(path: Path, name: str = "") -> None:
    """Make a folder and those above it, if they are not there.

    Raises:
        WriteError: The machine refuses to make it; ``name`` stands before the path in the message.
    """
    with writing(path, name=name):
        path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Remove a file or a folder that is no longer wanted. What cannot be removed now is removed by the next writing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)


def is_part(name: str) -> bool:
    """Whether a file or folder of this name is one that was not written to its end."""
    return name.startswith(".") and name.endswith(_PART)


def _beside(path: Path) -> Path:
    return path.absolute().with_name(f".{path.name}{_PART}")


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk.

    Raises:
        WriteError: The disk could not take it.
    """
    with writing(path):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_all(folder: Path) -> None:
    """Wait until all of a folder is on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def temporary_folder() -> Path:
    """The folder for temporary files, by its name alone: it may be full or missing."""
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        return Path(os.environ.get("TMPDIR", "/tmp"))


@contextmanager
def temporary_place() -> Iterator[Path]:
    """A folder that is gone after the block.

    Raises:
        WriteError: It cannot be made.
    """
    with writing_temporary():
        made = Path(tempfile.mkdtemp())
    try:
        yield made
    finally:
        remove(made)


@contextmanager
def writing_temporary() -> Iterator[None]:
    """Turn what the machine refuses inside the block into an error about the folder for temporary files.

    Raises:
        WriteError: The block could not write.
    """
    with writing(temporary_folder(), todo=_TEMPORARY, inside=False):
        yield


def temporary_file(mode: str) -> IO[str]:
    """A file for text without a name, which goes with the process. Raises OSError if there is no place for it."""
    return tempfile.TemporaryFile(mode, encoding="utf-8", errors="surrogateescape")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_bytes(folder: Path) -> int:
    """The bytes of all files of tensors in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
