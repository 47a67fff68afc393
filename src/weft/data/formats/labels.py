"""The usual names of the columns that hold the texts and the class of classification data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from weft.data.formats.fields import shown
from weft.data.reading.records import Record
from weft.errors import UserError

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)")
# GLUE, SuperGLUE, CLUE and their likes use these names; case does not matter.
TEXTS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("premise", "hypothesis"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("#1 string", "#2 string"),
    ("sentence",),
    ("text",),
    ("review",),
    ("content",),
    ("文本",),
    ("评论",),
)
LABELS = (
    "label", "labels", "gold_label", "quality", "is_duplicate", "class", "category", "sentiment", "target", "标签",
    "类别",
)  # fmt: skip


def texts_of(record: Record, columns: Sequence[str]) -> tuple[str, ...]:
    """The texts in some columns.

    Raises:
        UserError: A column holds no text, or there is nothing but white space.
    """
    texts = []
    for column in columns:
        value = record.fields.get(column)
        if not isinstance(value, str):
            raise UserError(f"{record.source}: '{column}' must be a string, found {shown(value)}.")
        texts.append(value)
    if not any(text.strip() for text in texts):
        raise UserError(f"{record.source}: {' + '.join(map(repr, columns))} is empty. Remove the record.")
    return tuple(texts)


def label_name(record: Record, column: str) -> str:
    """The label's name: text without white space around it, other JSON values as JSON writes them.

    Raises:
        UserError: The column holds no label.
    """
    value = record.fields.get(column)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = str(value).strip() if isinstance(value, (str, int, float)) else ""
    if not name:
        raise UserError(
            f"{record.source}: '{column}' must be a label (a name or a number), found {shown(value)}. Give the record "
            "one or remove it (the test files of GLUE have none)."
        )
    return name


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes by number if all are numbers, else by code point."""
    names = tuple(names)
    numeric = all(_NUMBER.fullmatch(name) for name in names)
    return tuple(sorted(names, key=lambda name: (float(name) if numeric else 0.0, name)))
