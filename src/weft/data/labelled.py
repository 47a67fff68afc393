"""Classification data: a file of texts with a label each, to samples with the number of their class.

Which columns hold the texts and which the label is told from their names, or by the user; a file that is not clear is
refused, for a model trained on the wrong column looks like one that learns badly.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from weft.data.formats.examples import Message
from weft.data.formats.labels import LABELS, TEXTS, label_name, text_of
from weft.data.reading.records import Record, first_rows, read_records
from weft.data.rendering.render import Renderer
from weft.data.rendering.sample import Draft, Prompt, Sample, TooLongError
from weft.errors import UserError, nearest

_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)")
_FRACTION = re.compile(r"[+-]?[0-9]*\.[0-9]*[1-9][0-9]*")
_PEEK = 50  # rows that a table without a header is recognised from


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Columns:
    texts: tuple[str, ...]
    label: str


def load_labelled(
    path: str | os.PathLike[str],
    renderer: Renderer,
    *,
    labels: Sequence[str] | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    encoder: bool | None = None,
    as_chat: bool = False,
    pair_separator: str = "\n",
) -> tuple[list[Sample], tuple[str, ...]]:
    """Read the first ``limit`` labelled records of a file: ``(samples, label names)``; ``Sample.label`` is an index.

    ``labels`` names the classes in order; without it they are the file's own (all of it, whatever ``limit``), numbers
    by size and names by code point. ``encoder`` True encodes as the tokenizer itself does for one or two texts (BERT:
    ``[CLS] a [SEP] b [SEP]``); False joins the texts by ``pair_separator`` after a BOS, if there is one; None does the
    first where the tokenizer puts tokens after a text. ``as_chat`` makes the joined texts a user's message of the chat
    template. Raises UserError, naming file and line, for columns that are not clear, a label that is not in
    ``labels``, and a record longer than the renderer's ``max_length`` (unless it truncates).
    """
    own = bool(renderer.encoder.tail) and not as_chat if encoder is None else encoder
    if own and as_chat:
        raise UserError(
            "as_chat and encoder exclude each other: an encoder's tokenizer has no chat template. Drop one."
        )
    known = _given(labels)
    header = _missing_header(path, text_columns, label_column)
    records = read_records(path, limit=None if known is None else limit, header=header)
    columns = _columns(records[0], text_columns, label_column)
    if own and len(columns.texts) > 2:
        raise UserError(
            f"text_columns names {len(columns.texts)} columns; an encoder takes one text or a pair of them."
        )
    found = [label_name(record, columns.label) for record in records]
    names = known or _sorted(found, records, columns.label)
    number = {name: index for index, name in enumerate(names)}
    samples, dropped = [], []
    for record, name in list(zip(records, found, strict=True))[:limit]:
        if name not in number:
            raise UserError(
                f"{record.source}: the label '{name}' is none of the labels {', '.join(names)}.{nearest(name, names)} "
                "Correct the record, or add it to `labels`."
            )
        texts = [text_of(record, column) for column in columns.texts]
        if not any(text.strip() for text in texts):
            raise UserError(f"{record.source}: {_quoted(columns.texts)} is empty. Remove the record.")
        try:
            unlabelled = unlabelled_sample(
                renderer, texts, record.source, encoder=own, as_chat=as_chat, pair_separator=pair_separator
            )
        except TooLongError:
            if renderer.truncation != "drop":
                raise
            dropped.append(record.source)
            continue
        samples.append(replace(unlabelled, label=number[name]))
    if dropped:
        logger.warning("%s: left out %d records longer than max_length (the first: %s)", path, len(dropped), dropped[0])
    if not samples:
        raise UserError(f"{path}: every record is longer than max_length {renderer.max_length}; nothing is left.")
    return samples, names


def unlabelled_sample(
    renderer: Renderer,
    texts: Sequence[str],
    source: str,
    *,
    encoder: bool,
    as_chat: bool = False,
    pair_separator: str = "\n",
) -> Sample:
    """One record's texts as ``load_labelled`` encodes them."""
    if encoder:
        return _own_encoding(renderer, list(texts), source)
    return _joined(renderer, pair_separator.join(texts), as_chat, source)


def _joined(renderer: Renderer, text: str, as_chat: bool, source: str) -> Sample:
    """One text as a language model reads it."""
    prompt = Prompt(renderer.text_ids(text))
    if as_chat:
        prompt = renderer.prompt([Message("user", text)], source=source)
    draft = Draft(prompt.ids, [0.0] * len(prompt.ids), list(prompt.slots))
    draft.remove(*renderer.limit.cut_ids(prompt.ids, source, "the record", head=len(renderer.encoder.bos)))
    # Without a cut a slot may stand at the very end.
    return Sample(draft.ids, draft.weights, source, tuple(draft.slots), cut=draft.cut)


def _own_encoding(renderer: Renderer, texts: list[str], source: str) -> Sample:
    """One text or a pair as the tokenizer itself encodes it; a cut takes from the longer of the two."""
    tokenizer, limit = renderer.tokenizer, renderer.max_length
    options: dict[str, Any] = {"split_special_tokens": True, "verbose": False}  # a typed [SEP] is ordinary text
    encoded = tokenizer(*texts, **options)
    length = len(encoded["input_ids"])
    if limit is not None and length > limit:
        renderer.limit.cut_ids(encoded["input_ids"], source, "the record")  # raises, unless the policy is to cut
        if renderer.truncation != "right":
            raise UserError(
                f"{source}: an encoder's texts are cut by `truncation: right` only (the longer of two first), not by "
                f"`{renderer.truncation}`."
            )
        room = limit - tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
        if room < len(texts):
            raise UserError(f"{source}: max_length {limit} leaves no room for the text. Raise `max_length`.")
        encoded = tokenizer(*texts, truncation="longest_first", max_length=limit, **options)
    ids, types = list(encoded["input_ids"]), encoded.get("token_type_ids", [])
    cut = length - len(ids)
    return Sample(ids, [0.0] * len(ids), source, token_types=tuple(types) if any(types) else (), cut=cut)


# -------------------------------------------------------------------------------------------------------------- columns


def _missing_header(
    path: str | os.PathLike[str], text_columns: Sequence[str] | None, label_column: str | None
) -> tuple[str, ...] | None:
    """The columns of a table without a header row, if it is one that can be told: CoLA's, or a text and a number."""
    rows = first_rows(path, _PEEK)
    named = {*(text_columns or ()), label_column}
    if not rows or named & set(rows[0]) or len({len(row) for row in rows}) > 1:
        return None
    # CoLA's own release: source, label, the author's mark, sentence.
    if len(rows[0]) == 4 and all(row[1] in ("0", "1") and set(row[2]) <= {"*", "?"} for row in rows):
        return ("source", "label", "mark", "sentence")
    if len(rows[0]) == 2:
        numbers = [all(_INTEGER.fullmatch(row[column]) for row in rows) for column in (0, 1)]
        if numbers[0] != numbers[1]:
            return ("label", "sentence") if numbers[0] else ("sentence", "label")
    return None


def _columns(record: Record, text_columns: Sequence[str] | None, label_column: str | None) -> _Columns:
    found = {name.strip().lower(): name for name in record.fields}
    for name in [*(text_columns or ()), *([label_column] if label_column else [])]:
        if name not in record.fields:
            _unclear(record, f"there is no column '{name}'.{nearest(name, record.fields)}")
    if text_columns is not None:
        if isinstance(text_columns, str) or not text_columns or len(set(text_columns)) < len(text_columns):
            _unclear(record, f"text_columns is {text_columns!r}; expected a list of columns, each once.")
        texts = tuple(text_columns)
    else:
        free = {name for name in found if found[name] != label_column}
        present = [group for group in TEXTS if free >= set(group)]
        groups = [group for group in present if not any(set(group) < set(other) for other in present)]
        if len(groups) != 1:
            what = "more than one column could be the text" if groups else "no column has a usual name of a text"
            _unclear(record, f"{what}: name it in `text_columns`.")
        texts = tuple(found[name] for name in groups[0])
    if label_column is None:
        labels = [found[name] for name in LABELS if name in found and found[name] not in texts]
        if len(labels) != 1:
            what = "more than one column could be the label" if labels else "no column has a usual name of a label"
            _unclear(record, f"{what}: name it in `label_column`.")
        label_column = labels[0]
    if label_column in texts:
        _unclear(record, f"'{label_column}' cannot be both a text and the label.")
    return _Columns(texts, label_column)


def _unclear(record: Record, what: str) -> NoReturn:
    raise UserError(
        f"{record.source}: {what} Columns found: {_quoted(record.fields) or 'none'}. Usual names of texts: "
        f"{', '.join(' + '.join(group) for group in TEXTS)}; of labels: {', '.join(LABELS)}. If these are not the "
        "names of columns, the file lacks a header row: add one."
    )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


# --------------------------------------------------------------------------------------------------------------- values


def _given(labels: Sequence[str] | None) -> tuple[str, ...] | None:
    if labels is None:
        return None
    names = () if isinstance(labels, str) else tuple(str(name).strip() for name in labels)
    if len(names) < 2 or len(set(names)) < len(names) or "" in names:
        raise UserError(f"labels is {labels!r}; expected a list of two names or more, each once.")
    return names


def _sorted(found: Sequence[str], records: Sequence[Record], column: str) -> tuple[str, ...]:
    """The labels of a file in their order: by number if all are numbers, else by name."""
    for record, name in zip(records, found, strict=True):
        if _FRACTION.fullmatch(name):
            raise UserError(
                f"{record.source}: '{column}' is {name}, a score and not a class. Scores are not learned; if they are "
                "classes all the same, list them in `labels`."
            )
    names = set(found)
    if len(names) == 1:
        raise UserError(
            f"{records[0].source}: every record has the label '{found[0]}', so there is nothing to tell apart. "
            "Is it the right column (`label_column`)? List the classes in `labels` if the others occur elsewhere."
        )
    numeric = all(_NUMBER.fullmatch(name) for name in names)
    return tuple(sorted(names, key=lambda name: (float(name) if numeric else 0.0, name)))
