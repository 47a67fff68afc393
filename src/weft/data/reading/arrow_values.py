"""Rows of an Arrow batch are made what they would be in JSON.

The notes that Hugging Face's ``datasets`` wrote into the schema say how. Numbers of a ``ClassLabel`` become names of
classes. A ``Json`` string is parsed. Lists side by side (``{"role": [...], "content": [...]}``) become a list of turns.
A null inside a record becomes an absent field, because Arrow fills in every key that any record has. Of images, audio
and video only the presence counts: nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weft.data.reading.rows import decode
from weft.foreign import parse_json

Convert = Callable[[Any], Any]
# The formats refuse fields of these names, so a column of media gets one whatever it is called.
_MEDIA = {"Image": "images", "Audio": "audios", "Video": "videos", "Pdf": "images", "Nifti": "images", "Mesh": "images"}
_MEDIA_FIELDS = frozenset(("image", "images", "audio", "audios", "video", "videos"))
# A struct of lists is a list of turns if it has both fields of a pair.
_TURNS = (("role", "content"), ("from", "value"), ("human", "assistant"))
_LISTS = ("List", "LargeList", "Sequence")


class RowConverter:
    """Converts the rows of batches that have one schema."""

    def __init__(self, schema: Any) -> None:
        features = _features(schema.metadata or {})
        self._convert: dict[str, Convert] = {}
        self._media: dict[str, str] = {}
        for field in schema:
            feature = features.get(field.name)
            media = _MEDIA.get(_kind(_inner(feature)) or _kind(feature))
            if media is not None:
                self._media[field.name] = field.name if field.name in _MEDIA_FIELDS else media
            elif (convert := _converter(feature, field.type)) is not None:
                self._convert[field.name] = convert

    def plain(self, batch: Any) -> Any:
        """The batch with each medium replaced by its number or its presence: the bytes are not read."""
        for name in self._media:
            place = batch.schema.get_field_index(name)
            column = batch.column(place)
            batch = batch.set_column(place, name, _present(column))
        return batch

    def row(self, fields: dict[str, object]) -> dict[str, object]:
        """Convert one row of ``plain(batch).to_pylist()``. Raises RowError for a string that is not JSON."""
        for name, convert in self._convert.items():
            if fields[name] is not None:
                fields[name] = convert(fields[name])
        for name, media in self._media.items():
            if fields.pop(name):
                fields[media] = True
        return fields


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, object]:
    """What ``datasets`` notes about each column; other files have no such notes."""
    try:
        found = parse_json(metadata[b"huggingface"], "the note of `datasets`", infinities=True)["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(feature: object) -> str:
    """The type of a feature (``Value``, ``ClassLabel``, ``List`` …); empty for a struct."""
    kind = feature.get("_type") if isinstance(feature, dict) else None
    return kind if isinstance(kind, str) else ""


def _inner(feature: Any) -> object:
    """The feature of a list's entries."""
    if isinstance(feature, list) and feature:
        return feature[0]
    return feature.get("feature") if _kind(feature) in _LISTS else None


def _converter(feature: Any, kind: Any) -> Convert | None:
    """The function that turns a value of ``to_pylist`` into what it stands for; None if there is nothing to do."""
    import pyarrow as pa

    name = _kind(feature)
    if name == "ClassLabel" and pa.types.is_integer(kind):
        names = feature.get("names") or []
        return lambda number: names[number] if 0 <= number < len(names) else None if number < 0 else number
    if name == "Json":
        return _json
    if name in _MEDIA:
        return lambda value: True
    if pa.types.is_struct(kind):
        return _struct(feature, kind)
    if pa.types.is_map(kind):
        return dict
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        convert = _converter(_inner(feature), kind.value_type)
        return None if convert is None else lambda items: [None if item is None else convert(item) for item in items]
    return None


def _struct(feature: Any, kind: Any) -> Convert:
    """The converter of a struct. A struct whose fields are lists of parts of turns becomes a list of turns."""
    import pyarrow as pa

    inner = _inner(feature)
    converts: dict[str, Convert] = {}
    for field in kind:
        if isinstance(inner, dict):  # a Sequence of a struct, which is stored as a struct of lists
            child: Any = {"feature": inner.get(field.name), "_type": "List"}
        else:
            child = feature.get(field.name) if isinstance(feature, dict) else None
        if (convert := _converter(child, field.type)) is not None:
            converts[field.name] = convert
    names = [field.name for field in kind]
    lists = all(pa.types.is_list(field.type) or pa.types.is_large_list(field.type) for field in kind)
    turns = lists and any({*pair}.issubset(names) for pair in _TURNS)

    def read(value: dict[str, Any]) -> Any:
        found = {
            name: converts[name](item) if name in converts else item for name, item in value.items() if item is not None
        }
        return _side_by_side(found) if turns else found

    return read


def _side_by_side(lists: dict[str, list[object]]) -> object:
    """A list of objects, without their nulls, from lists of equal length; other lists stay as they are."""
    if len({len(items) for items in lists.values()}) != 1:
        return lists
    rows = zip(*lists.values(), strict=True)
    return [{name: item for name, item in zip(lists, row, strict=True) if item is not None} for row in rows]


def _json(text: object) -> object:
    return decode(text, 0)[0] if isinstance(text, str) else text


def _present(column: Any) -> object:
    """How many media a list holds, or whether there is one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return pc.list_value_length(column)
    return pc.is_valid(column)
