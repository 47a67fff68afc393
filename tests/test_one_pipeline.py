"""Records are read in one place, ``weft.data.pipeline``: no other module imports or calls what reads them."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from tests.test_layering import FILES, SOURCE, imports

PIPELINE = "data/pipeline.py"
READING = "weft.data.reading"
# What names a record or the place of a file, or counts its lines; none gives a record.
NAMES = {"Record", "Place", "Shards", "TextUnit", "find_files", "unique", "listed", "lines_in"}
READERS = {"iter_items", "iter_records", "read_records", "first_rows"}
# Libraries that parse files of records; what a hub has is fetched with one.
PARSERS = {"csv", "pyarrow", "datasets", "pandas", "polars", "ijson"}
FETCHES = {"models/hub_datasets.py"}


def reads(path: str, source: str) -> Iterator[str]:
    """Where a module reads records by itself."""
    if path == PIPELINE or path.startswith("data/reading/"):
        return
    tree = ast.parse(source)
    package = ".".join(["weft", *path.split("/")[:-1]])
    for line, module in imports(tree, package):
        if module.split(".")[0] in PARSERS and path not in FETCHES:
            yield f"{path}:{line}: imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.startswith(READING) for alias in node.names):
            yield f"{path}:{node.lineno}: imports all of {READING}"
        elif isinstance(node, ast.ImportFrom):
            (_, module), *_ = imports(ast.Module([node], []), package)
            names = {alias.name for alias in node.names}
            foreign = names - NAMES if f"{module}.".startswith(f"{READING}.") else names & READERS
            if module == "weft.data" and "reading" in names:
                foreign = {"reading"}
            if foreign and path != "data/__init__.py":  # that hands them to users
                yield f"{path}:{node.lineno}: imports {', '.join(sorted(foreign))} of {module}"
        elif isinstance(node, ast.Attribute) and node.attr in READERS:
            yield f"{path}:{node.lineno}: uses {ast.unparse(node)}"


def test_nothing_but_the_pipeline_reads_records() -> None:
    found = [line for path in FILES for line in reads(path.relative_to(SOURCE).as_posix(), path.read_text())]
    assert found == []


def test_the_pipeline_is_there() -> None:
    """Were it renamed, the check above would look at nothing."""
    source = (SOURCE / PIPELINE).read_text()
    assert list(reads("data/elsewhere.py", source)), "the pipeline reads no records any more"


@pytest.mark.parametrize(
    "source",
    [
        "from weft.data.reading.records import iter_items",
        "from weft.data.reading.records import Record, first_rows",
        "from weft.data.reading.lines import read_jsonl",
        "from weft.data.reading import records",
        "from weft.data import reading",
        "from weft.data import read_records",
        "from ..data.reading.jsonfile import JsonFile",
        "import weft.data.reading.records as r",
        "import weft.data\nrows = weft.data.iter_records('x')",
        "def f(path):\n    from weft.data.reading.records import iter_records\n    return iter_records(path)",
        "import csv",
        "def f():\n    import pyarrow.parquet",
    ],
)
def test_the_check_sees(source: str) -> None:
    assert list(reads("training/x.py", source))


@pytest.mark.parametrize(
    "source",
    [
        "from weft.data.reading.files import Place, Shards, find_files",
        "from weft.data.reading.rows import Record",
        "from weft.data import Record, load_samples",
        "from weft.data.pipeline import outcomes, read_all",
    ],
)
def test_the_check_lets_through(source: str) -> None:
    assert not list(reads("training/x.py", source))
