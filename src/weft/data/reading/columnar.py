"""Records of Parquet and Arrow files, and of folders that Hugging Face's ``datasets`` saved. ``path:7`` is row 7."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weft.data.problems import Problem
from weft.data.reading.files import is_saved_dataset, kind_of
from weft.data.reading.rows import Record, RowError, as_fields, check_nul
from weft.errors import UserError

_BATCH = 256  # rows; what is decoded at a time


def read_columnar(path: Path) -> Iterator[Record | Problem]:
    """The rows in order, batch by batch. Raises UserError without the package, and for a file that is none."""
    batches = _saved(path) if is_saved_dataset(path) else _arrow(path)
    number = 0
    for rows in batches:
        for row in rows:
            number += 1
            try:
                fields = as_fields(row)
                check_nul(fields)
            except RowError as fault:
                yield Problem(fault.kind, str(path), fault.what, number)
            else:
                yield Record(fields, f"{path}:{number}")


def _arrow(path: Path) -> Iterator[list[Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"{path}: '{path.suffix}' files need a package: pip install \"weft[parquet]\" (or convert the file to "
            ".jsonl or .csv)."
        ) from None
    try:
        if kind_of(path)[0] == ".parquet":
            with parquet.ParquetFile(path, memory_map=True) as file:
                for batch in file.iter_batches(batch_size=_BATCH):
                    yield batch.to_pylist()
            return
        with pa.memory_map(str(path)) as source:
            try:
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))  # what `datasets` writes
            for batch in batches:
                for start in range(0, batch.num_rows, _BATCH):
                    yield batch.slice(start, _BATCH).to_pylist()
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read as a '{path.suffix}' file: {first} Fetch it again, or convert it to .jsonl or .csv."
        ) from error


def _saved(path: Path) -> Iterator[list[Any]]:
    datasets = _datasets(str(path))
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the package raises for a folder that is damaged
        raise UserError(f"{path} cannot be read as a folder saved by `datasets`: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        raise UserError(f"{path} holds the splits {', '.join(data)}: name one, for instance {path / next(iter(data))}.")
    yield from (list(batch) for batch in _batched(data))


def _batched(data: Any) -> Iterator[list[Any]]:
    for start in range(0, len(data), _BATCH):
        columns = data[start : start + _BATCH]
        names = list(columns)
        yield [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f'{what} was saved by `datasets`, which is not installed: pip install "weft[datasets]".'
        ) from None
    return datasets
