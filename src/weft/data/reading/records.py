"""Read data files into records; each record knows the line that it came from.

Every reader counts lines itself, so that a complaint about record 31,000 of a JSON array names a line that the user can
open. No reader holds more of a file than one record and a piece of constant size. What the fields mean is the business
of ``weft.data.formats.detect``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from weft.data.problems import BadRecordError, Problem, Problems
from weft.data.reading.encoding import check_encoding
from weft.data.reading.files import (
    CHUNK,
    COLUMNAR,
    OFFICE,
    PAGES,
    TABLES,
    ByteSource,
    DataFile,
    Place,
    Shards,
    damaged,
    find_files,
    is_saved_dataset,
    kind_of,
    opened,
)
from weft.data.reading.jsonfile import JsonFile
from weft.data.reading.lines import Lines, read_jsonl
from weft.data.reading.rows import Record
from weft.data.reading.tables import read_table, table_rows
from weft.data.reading.texts import TextUnit, read_texts
from weft.errors import UserError

__all__ = ["RECORD_LIMIT", "Record", "TextUnit", "first_rows", "iter_items", "iter_records", "read_records"]

RECORD_LIMIT = 64 << 20  # bytes of a line, characters of a record in a .json file


def iter_records(
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    header: Sequence[str] | None = None,
    problems: Problems | None = None,
    record_limit: int = RECORD_LIMIT,
    text_unit: TextUnit | None = None,
) -> Iterator[Record]:
    """Read records one by one, in the order of the files; memory does not grow with a file.

    ``path`` is a file (.json, .jsonl, .csv, .tsv, .txt, .md, .html, also compressed; .docx, .xlsx, .pdf, .parquet,
    .arrow), a folder or a glob of them, or a folder that ``datasets`` saved. A .json file may hold an array of objects,
    an object with such an array under ``train``, ``data``, ``rows``, ``records`` or ``samples``, one object, or objects
    one after another. A row that is a list of messages is taken as ``{"messages": row}``. ``header`` names the columns
    of a table without a header row. ``limit`` counts records. ``text_unit`` says what of a text is a record: all of it,
    a paragraph or a line (default: of a .txt the paragraphs, of other texts all). Records that cannot be read go to
    ``problems``, and reading goes on behind them; without ``problems`` the first is raised.

    Raises:
        UserError: A file cannot be read or holds no record.
        BadRecordError: Without ``problems``, the first record that cannot be read.
    """
    for item in iter_items(path, limit=limit, header=header, record_limit=record_limit, text_unit=text_unit):
        if isinstance(item, Record):
            yield item
        elif problems is None:
            raise BadRecordError(item)
        else:
            problems.add(item)


def read_records(
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    header: Sequence[str] | None = None,
    problems: Problems | None = None,
    text_unit: TextUnit | None = None,
) -> list[Record]:
    """``iter_records`` as a list."""
    return list(iter_records(path, limit=limit, header=header, problems=problems, text_unit=text_unit))


def iter_items(
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    header: Sequence[str] | None = None,
    record_limit: int = RECORD_LIMIT,
    text_unit: TextUnit | None = None,
) -> Iterator[Record | Problem]:
    """The records of ``iter_records``, and a Problem in the place of each that cannot be read.

    Raises:
        UserError: ``limit`` is less than 1, or a file cannot be read.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: give the number of records to read, 1 or more (or leave it out for all).")
    left = limit
    files: Sequence[Place] = [path] if isinstance(path, Shards) else find_files(path)
    for file in files:
        count = found = 0
        for item in _items(file, header, record_limit, text_unit):
            found += 1
            yield item
            count += isinstance(item, Record)
            if count == left:
                return
        left = None if left is None else left - count
        if not found:
            yield Problem("empty_file", str(file), f"{_empty(file)}; expected at least one record.")


def _empty(file: Place) -> str:
    if isinstance(file, Shards):
        return "the data set holds no records"
    return "the file is empty" if file.is_file() and not file.stat().st_size else "the file holds no records"


def first_rows(path: str | os.PathLike[str], count: int) -> list[list[str]]:
    """The first good rows of a .csv or .tsv file, header included; other files have none.

    Raises:
        BadRecordError: The header itself cannot be read.
    """
    file = find_files(path)[0]
    if kind_of(file)[0] not in TABLES:
        return []
    rows: list[list[str]] = []
    try:
        with opened(file) as raw:
            _check(file, raw)
            for row in islice(table_rows(Lines(raw, str(file), RECORD_LIMIT), tabs=_tabs(file)), count):
                if not isinstance(row, Problem):
                    rows.append(row[1])
                elif not rows:
                    raise BadRecordError(row)
    except OSError as error:
        raise _unreadable(file, error) from error
    return rows


def _items(
    file: Place, header: Sequence[str] | None, record_limit: int, unit: TextUnit | None
) -> Iterator[Record | Problem]:
    suffix = "" if isinstance(file, Shards) else kind_of(file)[0]
    if isinstance(file, Shards) or is_saved_dataset(file) or suffix in (*COLUMNAR, *OFFICE):
        if isinstance(file, Path) and file.is_file():
            with opened(file):  # this checks that the content is what the name says
                pass
        if isinstance(file, Path) and suffix in OFFICE:
            from weft.data.reading.office import read_office

            yield from read_office(file, unit or "file", record_limit)
            return
        from weft.data.reading.columnar import read_columnar

        yield from read_columnar(file)
        return
    reader = None
    try:
        with opened(file) as raw:
            reader = _Progress(raw)
            _check(file, raw)
            yield from _parsed(file, reader, header, record_limit, unit)
    except Exception as error:
        if reader is not None and damaged(error):
            line = reader.lines + 1
            what = "the file is damaged or cut off here, and what follows cannot be unpacked"
            yield Problem("cut_off", str(file), f"{what} ({error}). Fetch or pack it again.", line=line)
        elif isinstance(error, OSError):
            raise _unreadable(file, error) from error
        else:
            raise


def _check(file: Path, raw: DataFile) -> None:
    """Refuse a file of text in another encoding."""
    check_encoding(file, raw.peek(CHUNK), packed=bool(kind_of(file)[1]))


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file} cannot be read: {error.strerror or error}.")


class _Progress:
    """A file of bytes that counts the lines that were read."""

    def __init__(self, raw: ByteSource) -> None:
        self.raw, self.lines = raw, 0

    def read(self, size: int, /) -> bytes:
        data = self.raw.read(size)
        self.lines += data.count(b"\n")
        return data

    def read1(self, size: int, /) -> bytes:
        data = self.raw.read1(size)
        self.lines += data.count(b"\n")
        return data


def _parsed(
    file: Path, raw: _Progress, header: Sequence[str] | None, limit: int, unit: TextUnit | None
) -> Iterator[Record | Problem]:
    suffix, lines = kind_of(file)[0], Lines(raw, str(file), limit)
    if suffix == ".json":
        return JsonFile(raw, str(file), limit).items()
    if suffix == ".jsonl":
        return read_jsonl(lines)
    if suffix in TABLES:
        return read_table(lines, header, tabs=_tabs(file))
    if suffix in PAGES:
        from weft.data.reading.pages import read_page

        return read_page(lines, unit or "file")
    return read_texts(lines, unit or ("paragraph" if suffix == ".txt" else "file"))


def _tabs(file: Path) -> bool:
    return kind_of(file)[0] == ".tsv"
