"""Files of office programs, by well-kept libraries; hostile ones are refused before they are unpacked."""

from __future__ import annotations

import zipfile
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from weft.data import Problems, iter_records, read_records
from weft.errors import UserError

REASON = "the extra weft[office] is not installed"
BODY = '<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body>{}</w:body></w:document>'


def fields(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [record.fields for record in iter_records(path, **options)]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_records(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def book(path: Path, **sheets: list[list[Any]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl", reason=REASON)
    made = openpyxl.Workbook()
    made.remove(made.active)
    for title, rows in sheets.items():
        sheet = made.create_sheet(title)
        for row in rows:
            sheet.append(row)
    made.save(path)
    return path


def test_rows_of_a_sheet_are_as_those_of_a_table(tmp_path: Path) -> None:
    rows: list[list[Any]] = [
        ["instruction", "output", None], [], ["2+2?", 4], ["pi?", 3.14], ["third?", 0.1 + 0.2], ["so?", True],
        ["when?", datetime(2024, 5, 6)], ["at?", datetime(2024, 5, 6, 7, 8)], ["day?", date(2024, 5, 6)],
        ["two lines", "a\r\nb"], ["=", "中文"],
    ]  # fmt: skip
    path = book(tmp_path / "a.xlsx", Data=rows, Empty=[])
    found = read_records(path)
    assert [record.fields["output"] for record in found] == [
        "4", "3.14", "0.3", "TRUE", "2024-05-06", "2024-05-06 07:08:00", "2024-05-06", "a\nb", "中文",
    ]  # fmt: skip
    assert found[0].source == f"{path}:3"
    assert len(fields(path, limit=2)) == 2


def test_a_cell_without_a_value_is_a_problem(tmp_path: Path) -> None:
    path = book(tmp_path / "a.xlsx", Data=[["q", "a"], ["sum", "=1+1"], ["bad", "#N/A"], ["good", "x"], ["", "y", "z"]])
    problems = Problems("skip")
    assert fields(path, problems=problems) == [{"q": "good", "a": "x"}]
    assert [(one.kind, one.line) for one in problems.first] == [("bad_cell", 2), ("bad_cell", 3), ("row_width", 5)]
    assert "B2 holds a formula without its value" in problems.first[0].what


def test_several_sheets(tmp_path: Path) -> None:
    rows = [["q", "a"], ["1", "2"]]
    path = book(tmp_path / "a.xlsx", One=rows, Two=rows)
    assert [record.source for record in read_records(path)] == [f"{path}[One]:2", f"{path}[Two]:2"]
    assert "'One', 'Notes'" in refusal(book(tmp_path / "b.xlsx", One=rows, Notes=[["by", "me"]]))


def test_a_document(tmp_path: Path) -> None:
    docx = pytest.importorskip("docx", reason=REASON)
    made = docx.Document()
    made.add_heading("Title")
    made.add_paragraph("First 中文.\tTab")
    table = made.add_table(2, 2)
    for place, text in {(0, 0): "a", (0, 1): "b", (1, 0): "c", (1, 1): "d"}.items():
        table.cell(*place).text = text
    made.add_paragraph("last")
    made.save(tmp_path / "a.docx")
    blocks = ["Title", "First 中文.\tTab", "a\tb\nc\td", "last"]
    assert fields(tmp_path / "a.docx") == [{"text": "\n\n".join(blocks)}]
    assert fields(tmp_path / "a.docx", text_unit="paragraph") == [{"text": block} for block in blocks]


def test_tracked_changes(tmp_path: Path) -> None:
    docx = pytest.importorskip("docx", reason=REASON)
    run = "<w:r><w:t>{}</w:t></w:r>".format
    body = f"<w:p>{run('kept ')}<w:del>{run('gone')}</w:del><w:ins>{run('new')}</w:ins></w:p>"
    docx.Document().save(tmp_path / "plain.docx")
    replaced(tmp_path / "plain.docx", tmp_path / "a.docx", "word/document.xml", BODY.format(body))
    assert fields(tmp_path / "a.docx") == [{"text": "kept new"}]


def replaced(old: Path, new: Path, name: str, content: str) -> None:
    """A copy of an archive with another content in one part."""
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.namelist():
            target.writestr(part, content if part == name else source.read(part))


def pdf(text: str) -> bytes:
    stream = f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 300] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, one in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, one)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + b"xref\n0 6\n0000000000 65535 f \n%strailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        table,
        len(out),
    )


def test_a_pdf(tmp_path: Path) -> None:
    pytest.importorskip("pypdf", reason=REASON)
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf("Hello from a page."))
    assert fields(path) == [{"text": "Hello from a page."}]
    path.write_bytes(pdf(""))
    assert "holds no text (is it a scan?" in refusal(path)
    path.write_bytes(pdf("x")[:200])
    assert "cannot be read as a '.pdf' file" in refusal(path)


@pytest.mark.parametrize("name", ["a.xlsx", "a.docx", "a.pdf"])
def test_the_library_is_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("openpyxl", "docx", "pypdf"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / name).write_bytes(b"%PDF-1.4" if name == "a.pdf" else b"PK\x03\x04")
    assert 'pip install "weft[office]"' in refusal(tmp_path / name)


def archive(path: Path, parts: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in parts.items():
            target.writestr(name, content)
    return path


DTD = b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>'
HOSTILE: dict[str, tuple[dict[str, bytes], str]] = {
    "entities": ({"word/document.xml": DTD, "xl/workbook.xml": DTD}, "document type"),
    "entities behind space": ({"word/a.bin": b" " * 1000 + DTD}, "document type"),
    "entities in UTF-16": ({"word/document.xml": DTD.decode().encode("utf-16")}, "not in UTF-8"),
    "another encoding": ({"a.xml": b'<?xml version="1.0" encoding="cp037"?>' + b"L" * 99}, "not in UTF-8"),
    "a bomb": ({"xl/sharedStrings.xml": b"<sst>" + b" " * (80 << 20) + b"</sst>"}, "unpacks to"),
    "many parts": ({f"{number}.xml": b"" for number in range(10_001)}, "too many parts"),
    "nothing in it": ({"a.txt": b"x"}, "cannot be read as"),
}


@pytest.mark.parametrize("suffix", [".xlsx", ".docx"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(name: str, suffix: str, tmp_path: Path) -> None:
    pytest.importorskip({".xlsx": "openpyxl", ".docx": "docx"}[suffix], reason=REASON)
    parts, said = HOSTILE[name]
    assert said in refusal(archive(tmp_path / f"a{suffix}", parts))


def test_a_sheet_that_says_it_has_a_billion_rows(tmp_path: Path) -> None:
    path = book(tmp_path / "a.xlsx", Data=[["q", "a"], ["1", "2"]])
    with zipfile.ZipFile(path) as source:
        sheet = source.read("xl/worksheets/sheet1.xml").decode()
    wide = sheet.replace('ref="A1:B2"', 'ref="A1:XFD1048576"')
    replaced(path, tmp_path / "b.xlsx", "xl/worksheets/sheet1.xml", wide)
    assert fields(tmp_path / "b.xlsx") == [{"q": "1", "a": "2"}]
    far = sheet.replace('<row r="2"', '<row r="1000000000"').replace('r="A2"', 'r="A1000000000"')
    replaced(path, tmp_path / "c.xlsx", "xl/worksheets/sheet1.xml", far.replace('r="B2"', 'r="B1000000000"'))
    assert "more than 1,048,576 rows" in refusal(tmp_path / "c.xlsx")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.xls", b"x", "Save it as .xlsx or .csv."),
        ("a.odt", b"x", "Save it as .docx or .txt."),
        ("a.xlsx", b"\xd0\xcf\x11\xe0x", "password-protected"),
        ("a.csv", b"\xd0\xcf\x11\xe0x", "without a password"),
        ("a.csv", b"PK\x03\x04x", "rename it to end in .xlsx"),
        ("a.txt", b"%PDF-1.4", "Rename it to end in .pdf."),
        ("a.docx", b"text", "something else"),
        ("a.xlsx.gz", b"\x1f\x8b", "compressed inside"),
    ],
)
def test_what_is_no_such_file(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path / name)
