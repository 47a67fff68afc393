"""Texts of .docx and .pdf files, rows of .xlsx files. Well-kept libraries open them (``weft[office]``).

Such files come from anywhere. What a file unpacks to is looked at before anything is unpacked, a document type (and
with it every entity) is refused, macros and formulas are not run, and every fault is one sentence with the file's name.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from weft.data.problems import Problem
from weft.data.reading.files import kind_of
from weft.data.reading.pages import texts_of
from weft.data.reading.rows import Record
from weft.data.reading.tables import Header
from weft.data.reading.texts import TextUnit
from weft.errors import UserError, reason_of

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

Value = TypeVar("Value")

_PACKED, _UNPACKED = 256 << 20, 1 << 30  # bytes of a file, and of all its parts
_WHOLE = 64 << 20  # bytes of the XML that a library holds in memory, where it takes ten times as many
_PARTS = 10_000
_PROLOG = 1 << 16  # in so many bytes of a part its first element begins
_ROWS, _COLUMNS = 1 << 20, 1 << 14  # Excel's own limits
_PAGES = 20_000
_DTD = re.compile(rb"<!(DOCTYPE|ENTITY)", re.IGNORECASE)
_ELEMENT = re.compile(rb"<[A-Za-z_]")
_ENCODING = re.compile(rb"""encoding\s*=\s*["']([^"']+)""")


def read_office(path: Path, unit: TextUnit, limit: int) -> Iterator[Record | Problem]:
    """The rows of a sheet, or the texts of a document.

    Raises:
        UserError: The library is not installed, or the file is too large, damaged, encrypted or not what it seems.
    """
    suffix = kind_of(path)[0]
    if path.stat().st_size > _PACKED:
        raise UserError(f"{path} is larger than {_PACKED >> 20} MB, the limit for such files. Split it.")
    if suffix == ".xlsx":
        yield from _guarded(path, _sheets(path))
        return
    text = "\n\n".join(_guarded(path, _document(path) if suffix == ".docx" else _pdf(path)))
    if text.strip():
        yield from texts_of(text, str(path), limit, unit)
    else:
        what = "the document holds no text (is it a scan? Then recognise its text first, with an OCR program)."
        yield Problem("empty_file", str(path), what)


def _guarded(path: Path, found: Iterator[Value]) -> Iterator[Value]:
    """What is found, until a library stumbles over the file."""
    try:
        yield from found
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds for a damaged file
        raise UserError(
            f"{path} cannot be read as a '{kind_of(path)[0]}' file: {reason_of(error)[:200].rstrip('.')}. Save it "
            "anew in its program, or convert it."
        ) from error


def _missing(path: Path) -> UserError:
    return UserError(
        f"{path}: '{path.suffix}' files need a package: pip install \"weft[office]\" (or convert the file to .csv or "
        ".txt)."
    )


def _check_zip(path: Path, streamed: str = " ") -> None:
    """Refuse an archive that would fill the memory, or with a document type. Parts under ``streamed`` are not held."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        total, whole = sum(part.file_size for part in parts), 0
        if len(parts) > _PARTS or total > _UNPACKED:
            _too_large(path, total)
        for part in parts:
            if part.flag_bits & 1:
                raise UserError(f"{path} is encrypted. Save it without a password.")
            with archive.open(part) as file:  # a part of any name may be taken for XML
                head = file.read(64)
                if head.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\0")[:1] in (b"<", b"") and head:
                    whole += 0 if part.filename.startswith(streamed) else part.file_size
                    _check_prolog(path, part.filename, head + file.read(_PROLOG))
        if whole > _WHOLE:
            _too_large(path, whole)


def _too_large(path: Path, size: int) -> NoReturn:
    raise UserError(
        f"{path} unpacks to {size / 1e6:,.0f} MB or too many parts, more than such a file needs. Save what is needed "
        "of it as .csv or .txt."
    )


def _check_prolog(path: Path, name: str, head: bytes) -> None:
    """Refuse a part of XML with anything but elements, comments and the usual declaration."""
    first = _ELEMENT.search(head)
    prolog = head[: first.start()] if first else head
    encoding = _ENCODING.search(prolog)
    said = encoding[1].lower() if encoding else b"utf-8"
    if first is None or _DTD.search(prolog) or said not in (b"utf-8", b"us-ascii"):
        what = "has a document type, or is not in UTF-8"
        raise UserError(f"{path} is no file of an office program: its part '{name[:80]}' {what}.")


# ------------------------------------------------------------------------------------------------------------ documents


def _document(path: Path) -> Iterator[str]:
    """The paragraphs and tables of a .docx, without what was deleted in it."""
    try:
        import docx
    except ImportError:
        raise _missing(path) from None
    _check_zip(path)
    yield from _blocks(docx.Document(str(path)).element.body)


# Deleted and moved text, and second versions of drawings.
_SKIPPED = frozenset(("del", "moveFrom", "Fallback", "instrText", "delText", "sectPr", "pPr", "rPr"))
_MARKS = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}


def _tag(node: Element) -> str:
    return node.tag.rpartition("}")[2] if isinstance(node.tag, str) else ""


def _blocks(node: Element) -> Iterator[str]:
    for child in node:
        tag = _tag(child)
        if tag == "p":
            if (text := "".join(_said(child)).strip()) != "":
                yield text
        elif tag == "tbl":
            yield "\n".join(_rows(child))
        elif tag not in _SKIPPED:
            yield from _blocks(child)


def _rows(node: Element) -> Iterator[str]:
    """The rows of a table, cells apart by tabs."""
    for child in node:
        if _tag(child) == "tr":
            yield "\t".join(" ".join(_blocks(cell)) for cell in child if _tag(cell) not in ("trPr", "tblPrEx"))
        elif _tag(child) not in _SKIPPED:
            yield from _rows(child)


def _said(node: Element) -> Iterator[str]:
    for child in node:
        tag = _tag(child)
        if tag == "t":
            yield child.text or ""
        elif tag in _MARKS:
            yield _MARKS[tag]
        elif tag == "p":  # of a text box
            yield "\n"
            yield from _said(child)
            yield "\n"
        elif tag not in _SKIPPED:
            yield from _said(child)


def _pdf(path: Path) -> Iterator[str]:
    """The text of a PDF as one piece: where its paragraphs end is not known."""
    try:
        import pypdf
    except ImportError:
        raise _missing(path) from None
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of each oddity of a file
    reader = pypdf.PdfReader(str(path))
    if reader.is_encrypted and not reader.decrypt(""):
        raise UserError(f"{path} is encrypted. Save it without a password.")
    if len(reader.pages) > _PAGES:
        raise UserError(f"{path} has {len(reader.pages):,} pages, more than {_PAGES:,}. Split it.")
    yield "\n".join(page.extract_text().strip() for page in reader.pages)


# --------------------------------------------------------------------------------------------------------------- sheets


def _sheets(path: Path) -> Iterator[Record | Problem]:
    """The rows of all sheets that are shown; several must name the same columns."""
    try:
        import openpyxl
    except ImportError:
        raise _missing(path) from None
    _check_zip(path, streamed="xl/worksheets/")
    options = {"read_only": True, "keep_links": False}
    values = openpyxl.load_workbook(path, data_only=True, **options)
    formulas = openpyxl.load_workbook(path, **options)
    try:
        tables = []
        for sheet in values.worksheets:
            if sheet.sheet_state != "visible":
                continue
            rows = _cells(path, sheet, formulas[sheet.title])
            if (first := next(rows, None)) is not None:
                tables.append((sheet.title, first, rows))
        if len({tuple(first[1]) for _, first, _ in tables}) > 1:
            names = ", ".join(repr(title[:40]) for title, _, _ in tables[:8])
            raise UserError(f"{path} holds sheets with different columns ({names}). Save each as a file of its own.")
        for title, (line, columns, _), rows in tables:
            where = str(path) if len(tables) == 1 else f"{path}[{title[:40]}]"
            header = Header(where, columns, line)
            width = len(header.cells)
            for number, found, fault in rows:
                if fault:
                    yield Problem("bad_cell", where, fault, line=number)
                elif (item := header.record([*found, *[""] * (width - len(found))], number)) is not None:
                    yield item
    finally:
        values.close()
        formulas.close()


def _cells(path: Path, sheet: Any, formulas: Any) -> Iterator[tuple[int, list[str], str]]:
    """The number, the cells as text and the fault of each row that is not empty."""
    for one in (sheet, formulas):
        one.reset_dimensions()  # what the file says of its size may be wrong
    for number, (row, source) in enumerate(zip(sheet.iter_rows(), formulas.iter_rows(), strict=False), start=1):
        if number > _ROWS or len(row) > _COLUMNS:
            raise UserError(
                f"{path}: the sheet '{sheet.title[:40]}' has more than {_ROWS:,} rows or {_COLUMNS:,} columns."
            )
        cells: list[str] = []
        fault = ""
        for cell, written in zip(row, source, strict=False):
            if cell.data_type == "e":
                fault = fault or f"the cell {cell.coordinate} holds the error {str(cell.value)[:20]}. Mend or empty it."
            elif cell.value is None and written.data_type == "f":
                fault = fault or (
                    f"the cell {written.coordinate} holds a formula without its value. Open the file in an office "
                    "program, and save it."
                )
            cells.append(_text(cell.value))
        while cells and not cells[-1]:
            cells.pop()
        if cells or fault:
            yield number, cells, fault


def _text(value: object) -> str:
    """A cell's value as a .csv of the same sheet has it; days and times in the form of ISO 8601."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float):
        return f"{value:.15g}"  # what Excel shows at most
    if isinstance(value, datetime):
        return str(value.date()) if value.time() == time() else value.isoformat(" ", "seconds")
    if isinstance(value, (date, time)):
        return value.isoformat()
    return str(value).replace("_x000D_", "")  # a carriage return
