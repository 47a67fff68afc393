"""Rows of an Arrow batch as JSON would have them, with what Hugging Face's ``datasets`` wrote into the schema.

Numbers of a ``ClassLabel`` become the names of the classes, ``Json`` what it holds, a turn's lists side by side
(``{"role": [...], "content": [...]}``) a list of turns, and null inside a record an absent field: Arrow fills in every
key that any record has. A column of images, audio or video is told by its field alone, none of it is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weft.data.reading.rows import decode
from weft.foreign import parse_json

Convert = Callable[[Any], Any]
# What the formats know such a field by; they refuse it, whatever the column is called.
_MEDIA = {"Image": "images", "Audio": "audios", "Video": "videos", "Pdf": "images", "Nifti": "images", "Mesh": "images"}
_MEDIA_FIELDS = frozenset(("image", "images", "audio", "audios", "video", "videos"))
# A struct of lists is a list of turns if it has both of these.
_TURNS = (("role", "content"), ("from", "value"), ("human", "assistant"))
_LISTS = ("List", "LargeList", "Sequence")


class Columns:
    """How the columns of a schema are read."""

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
        """The batch, where media are a number (how many) or whether there is one: their bytes are not read."""
        for name in self._media:
            place = batch.schema.get_field_index(name)
            column = batch.column(place)
            batch = batch.set_column(place, name, _present(column))
        return batch

    def row(self, fields: dict[str, object]) -> dict[str, object]:
        """One row of ``plain(batch).to_pylist()``. Raises RowError for JSON that is none."""
        for name, convert in self._convert.items():
            if fields[name] is not None:
                fields[name] = convert(fields[name])
        for name, media in self._media.items():
            if fields.pop(name):
                fields[media] = True
        return fields


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, object]:
    """What ``datasets`` notes about each column; of other files nothing."""
    try:
        found = parse_json(metadata[b"huggingface"], "the note of `datasets`", infinities=True)["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(feature: object) -> str:
    """``Value``, ``ClassLabel``, ``List`` …; empty for a struct."""
    kind = feature.get("_type") if isinstance(feature, dict) else None
    return kind if isinstance(kind, str) else ""


def _inner(feature: Any) -> object:
    """Of a list, the feature of its entries."""
    if isinstance(feature, list) and feature:
        return feature[0]
    return feature.get("feature") if _kind(feature) in _LISTS else None


def _converter(feature: Any, kind: Any) -> Convert | None:
    """What makes of a value, as ``to_pylist`` gives it, what it stands for; None where it is that already."""
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
    """Of a struct; one whose fields are lists of the parts of turns is the list of the turns."""
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
    """Lists of equal length as a list of objects, each without what is null in it; other lists as they stand."""
    if len({len(items) for items in lists.values()}) != 1:
        return lists
    rows = zip(*lists.values(), strict=True)
    return [{name: item for name, item in zip(lists, row, strict=True) if item is not None} for row in rows]


def _json(text: object) -> object:
    return decode(text, 0)[0] if isinstance(text, str) else text


def _present(column: Any) -> object:
    """Of media: how many there are in a list, or whether there is one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return pc.list_value_length(column)
    return pc.is_valid(column)
