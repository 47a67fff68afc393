"""Records of Parquet and Arrow files, and of data that ``datasets`` saved or cached. ``path:7`` is row 7."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from weft.data.problems import Problem
from weft.data.reading.arrow_values import RowConverter
from weft.data.reading.files import Place, Shards, is_saved_dataset, kind_of
from weft.data.reading.rows import Record, RowError, as_fields, check_nul
from weft.errors import UserError
from weft.foreign import entry, expect, read_json

_BATCH = 256  # rows that are decoded at a time


def read_columnar(place: Place) -> Iterator[Record | Problem]:
    """The rows in order, batch by batch. Raises UserError without the package, and for a file of another kind."""
    if isinstance(place, Shards):
        batches: Iterator[Any] = chain.from_iterable(map(_arrow, place.files))
    else:
        batches = _saved(place) if is_saved_dataset(place) else _arrow(place)
    number = 0
    columns: RowConverter | None = None
    for batch in batches:
        columns = columns or RowConverter(batch.schema)
        for row in _rows(columns.plain(batch)):
            number += 1
            try:
                if isinstance(row, RowError):
                    raise row
                fields = as_fields(columns.row(row))
                check_nul(fields)
            except RowError as fault:
                yield Problem(fault.kind, str(place), fault.what, line=number)
            else:
                yield Record(fields, f"{place}:{number}")


def _rows(batch: Any) -> Iterable[Any]:
    """The rows of a batch. A RowError stands for a row with a string that is not UTF-8, which Arrow does not check."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            what = f"byte 0x{error.object[error.start]:02x} of a string is not UTF-8. Repair or remove the record."
            return [RowError("not_utf8", what)]
    return chain.from_iterable(_rows(batch.slice(place, 1)) for place in range(batch.num_rows))


def _arrow(path: Path) -> Iterator[Any]:
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
                    yield batch
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
                    yield batch.slice(start, _BATCH)
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read as a '{path.suffix}' file: {first} Fetch it again, or convert it to .jsonl or .csv."
        ) from error


def _saved(path: Path) -> Iterator[Any]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f'{path} was saved by `datasets`, which is not installed: pip install "weft[datasets]".'
        ) from None
    if (path / "state.json").is_file() and _holds_nothing(path / "state.json"):
        return
    for name in ("dataset_info.json", "dataset_dict.json"):
        if (path / name).exists():
            read_json(path / name, infinities=True)
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # the package raises many kinds for a damaged folder
        raise UserError(f"{path} cannot be read as a folder saved by `datasets`: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        raise UserError(f"{path} holds the splits {', '.join(data)}: name one, for instance {path / next(iter(data))}.")
    tables = data.with_format("arrow")  # in the order of its indices, nothing decoded
    for start in range(0, len(data), _BATCH):
        yield tables[start : start + _BATCH]


def _holds_nothing(state: Path) -> bool:
    """Whether the saved data set has no rows; ``datasets`` cannot load such a folder again."""
    try:
        found = entry(read_json(state, infinities=True), "_data_files", list, str(state))
    except UserError as error:
        raise UserError(f"{state.parent} cannot be read as a folder saved by `datasets`: {error}") from None
    for one in found:
        name = entry(expect(one, dict, str(state)), "filename", str, str(state))
        if Path(name).name != name:  # any file of the disk could be read so, also with ".."
            raise UserError(f"{state} names the file {name[:200]!r}, which is not in its folder.")
    return not found
