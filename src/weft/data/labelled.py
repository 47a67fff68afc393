"""Classification data: a file of texts with labels becomes samples with the numbers of their classes.

The names of the columns tell which hold the texts and which the label, or the user says it. A file that is not clear is
refused: a model trained on the wrong column looks like one that learns badly. Records that cannot be used are Problems,
as everywhere.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, Self

from weft.data.formats.examples import Message
from weft.data.formats.labels import LABELS, TEXTS, label_name, texts_of
from weft.data.pipeline import (
    BEHIND,
    TOO_LONG,
    Acceptance,
    Fold,
    Omission,
    Outcome,
    Recipe,
    RecordBehindLimit,
    outcomes,
)
from weft.data.problems import Problems
from weft.data.reading.rows import Record
from weft.data.rendering.render import Renderer
from weft.data.rendering.sample import Draft, Prompt, Sample, TooLongError
from weft.data.sources import number_of
from weft.errors import UserError, nearest

_INTEGER = re.compile(r"[+-]?[0-9]+")
_FRACTION = re.compile(r"[+-]?[0-9]*\.[0-9]*[1-9][0-9]*")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClassRecipe(Recipe):
    """The recipe for texts with classes; its fields are arguments of ``load_labelled``.

    Without ``labels`` the classes are those of the whole file: records behind the limit are read for their classes.
    """

    text_columns: Sequence[str] | None = None
    label_column: str | None = None
    encoder: bool | None = None
    as_chat: bool = False
    pair_separator: str = "\n"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encodes and self.as_chat:
            raise UserError(
                "as_chat and encoder exclude each other: an encoder's tokenizer has no chat template. Drop one."
            )

    @property
    def encodes(self) -> bool:
        """Whether the tokenizer itself encodes one or two texts."""
        return bool(self.renderer.encoder.tail) and not self.as_chat if self.encoder is None else self.encoder

    @property
    def whole(self) -> bool:
        """Whether records behind the limit count too."""
        return self.labels is None

    def header(self, rows: Callable[[], list[list[str]]]) -> Sequence[str] | None:
        """The columns of a table, if its first ``rows`` do not name them."""
        return missing_header(rows(), {*(self.text_columns or ()), self.label_column})

    def begun(self, head: Sequence[Record]) -> Self:
        """The recipe with the columns of these records.

        Raises:
            UserError: The columns are not clear.
        """
        texts, label = columns_of(head, self.text_columns, self.label_column)
        if self.encodes and len(texts) > 2:
            raise UserError(f"text_columns names {len(texts)} columns; an encoder takes one text or a pair of them.")
        return replace(self, text_columns=texts, label_column=label)

    def of(self, records: Sequence[Record]) -> list[Outcome]:
        """The outcomes of records, one for each."""
        return list(map(self._outcome, records))

    def _outcome(self, record: Record) -> Outcome:
        source, label = record.source, self.label_column or ""
        name, kind = None, "label"
        try:
            name = label_name(record, label)
            _check_name(name, record, label, self.labels)
            if isinstance(record, RecordBehindLimit):
                return Omission(source=source, label=name, why=BEHIND)
            kind = "format"
            texts = texts_of(record, self.text_columns or ())
            kind = "render"
            sample = unlabelled_sample(
                self.renderer,
                texts,
                source,
                encoder=self.encodes,
                as_chat=self.as_chat,
                pair_separator=self.pair_separator,
            )
        except UserError as error:
            if isinstance(error, TooLongError) and self.renderer.truncation == "drop":
                return Omission(source=source, label=name, why=TOO_LONG)
            return self.refused(error, kind, record)
        key = number_of(hashlib.sha256(repr(sample.input_ids).encode()).hexdigest()) if self.keyed else 0
        return Acceptance(source=source, label=name, samples=(sample,), key=key)

    def end(self, fold: Fold) -> None:
        """Log the number of records that were left out.

        Raises:
            UserError: There is a single class, or no sample is left.
        """
        path, long, problems = fold.path, fold.left_out[TOO_LONG], fold.problems
        if long:
            first = fold.first[TOO_LONG]
            logger.warning("%s: left out %d records longer than max_length (the first: %s)", path, long, first)
        if fold.refused and (not fold.kept or (problems.on_bad_record == "error" and self.labels is None)):
            raise problems.error()
        if self.labels is None and len(fold.classes) == 1:
            ((name, source),) = fold.classes.items()
            left_out = f" ({fold.refused} bad records were left out.)" if fold.refused else ""
            raise UserError(
                f"{source}: every record has the label '{name}', so there is nothing to tell apart. "
                "Is it the right column (`label_column`)? List the classes in `labels` if the others occur elsewhere."
                f"{left_out}"
            )
        if not fold.kept:
            limit = self.renderer.max_length
            raise UserError(f"{path}: every record is longer than max_length {limit}, so there is {fold.nothing}.")


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
    problems: Problems | None = None,
) -> tuple[list[Sample], tuple[str, ...]]:
    """Read the first ``limit`` labelled records of a file: ``(samples, label names)``; ``Sample.label`` is an index.

    ``labels`` names the classes in order. Without it the classes are those of the file's good records, whatever
    ``limit`` is; numbers are sorted by size and names by code point. ``encoder`` True encodes as the tokenizer itself
    does for one or two texts (BERT: ``[CLS] a [SEP] b [SEP]``). False joins the texts by ``pair_separator`` after a
    BOS, if there is one. None does the first where the tokenizer puts tokens after a text. ``as_chat`` makes the joined
    texts a user's message of the chat template. Records that cannot be used go to ``problems``, which the caller
    checks; without it one error lists up to 20. They are records that the file's reader refuses, that lack a text or a
    label, whose label is not in ``labels``, or that are longer than ``max_length`` (unless the renderer truncates).

    Raises:
        UserError: The columns are not clear, there is a single class, or no sample is left.
    """
    recipe = ClassRecipe(
        renderer=renderer,
        labels=given_labels(labels),
        text_columns=text_columns,
        label_column=label_column,
        encoder=encoder,
        as_chat=as_chat,
        pair_separator=pair_separator,
    )
    fold = Fold(path, recipe, problems if problems is not None else Problems())
    found = [sample for sample, _ in fold.samples(outcomes(path, recipe, limit=limit))]
    if problems is None:
        fold.problems.check(str(path))
    recipe.end(fold)
    return list(fold.numbered(found)), fold.names


def _check_name(name: str, record: Record, column: str, known: Sequence[str] | None) -> None:
    if known is None and _FRACTION.fullmatch(name):
        raise UserError(
            f"{record.source}: '{column}' is {name}, a score and not a class. Scores are not learned; if they are "
            "classes all the same, list them in `labels`."
        )
    if known is not None and name not in known:
        raise UserError(
            f"{record.source}: the label '{name}' is none of the labels {', '.join(known)}.{nearest(name, known)} "
            "Correct the record, or add it to `labels`."
        )


def unlabelled_sample(
    renderer: Renderer,
    texts: Sequence[str],
    source: str,
    *,
    encoder: bool,
    as_chat: bool = False,
    pair_separator: str = "\n",
) -> Sample:
    """Encode the texts of one record as ``load_labelled`` does."""
    if encoder:
        return _own_encoding(renderer, list(texts), source)
    return _joined(renderer, pair_separator.join(texts), as_chat, source)


def _joined(renderer: Renderer, text: str, as_chat: bool, source: str) -> Sample:
    """Encode one text as a language model reads it."""
    prompt = Prompt(renderer.text_ids(text))
    if as_chat:
        prompt = renderer.prompt([Message("user", text)], source=source)
    draft = Draft(prompt.ids, [0.0] * len(prompt.ids), list(prompt.slots))
    draft.remove(*renderer.settings.cut_ids(prompt.ids, source, "the record", head=len(renderer.encoder.bos)))
    # Without a cut a slot may stand at the very end.
    return Sample(draft.ids, draft.weights, source, slots=tuple(draft.slots), cut=draft.cut)


def _own_encoding(renderer: Renderer, texts: list[str], source: str) -> Sample:
    """Encode one text or a pair as the tokenizer itself does; a cut takes from the longer of the two."""
    tokenizer, limit = renderer.tokenizer, renderer.max_length
    options: dict[str, object] = {"split_special_tokens": True, "verbose": False}  # a typed [SEP] is ordinary text
    encoded = tokenizer(*texts, **options)
    length = len(encoded["input_ids"])
    if limit is not None and length > limit:
        renderer.settings.cut_ids(encoded["input_ids"], source, "the record")  # raises, unless the policy is to cut
        if renderer.truncation != "right":
            raise UserError(
                f"an encoder's texts are cut by `truncation: right` only (the longer of two first), not by "
                f"`{renderer.truncation}`; {source} is too long."
            )
        room = limit - tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
        if room < len(texts):
            raise UserError(f"{source}: max_length {limit} leaves no room for the text. Raise `max_length`.")
        encoded = tokenizer(*texts, truncation="longest_first", max_length=limit, **options)
    ids, types = list(encoded["input_ids"]), encoded.get("token_type_ids", [])
    cut = length - len(ids)
    return Sample(ids, [0.0] * len(ids), source, token_types=tuple(types) if any(types) else (), cut=cut)


# -------------------------------------------------------------------------------------------------------------- columns


def missing_header(rows: list[list[str]], named: Collection[str | None] = ()) -> tuple[str, ...] | None:
    """The columns of a table without a header row, if they are clear: CoLA's, or a text and a number."""
    if not rows or {*named} & {*rows[0]}:
        return None
    rows = [row for row in rows if len(row) == len(rows[0])]  # the others are bad records
    # CoLA's own release: source, label, the author's mark, sentence.
    if len(rows[0]) == 4 and all(row[1] in ("0", "1") and set(row[2]) <= {"*", "?"} for row in rows):
        return ("source", "label", "mark", "sentence")
    if len(rows[0]) == 2:
        numbers = [all(_INTEGER.fullmatch(row[column]) for row in rows) for column in (0, 1)]
        if numbers[0] != numbers[1]:
            return ("label", "sentence") if numbers[0] else ("sentence", "label")
    return None


def columns_of(
    head: Sequence[Record], text_columns: Sequence[str] | None, label_column: str | None, *, asked: bool = False
) -> tuple[tuple[str, ...], str]:
    """The columns of texts, and the column of the label.

    The names of all fields of the first records tell them: one record alone may lack its text or its label. Records
    that are ``asked`` and not learned may lack the columns that are given; what is not clear of them is empty. No other
    column is the label in the place of one that is given.

    Raises:
        UserError: The columns are not clear.
    """
    record = Record({name: None for one in head for name in one.fields}, head[0].source)
    if asked:
        text_columns = text_columns if record.fields.keys() >= {*(text_columns or ())} else None
        label_column = label_column if label_column is None or label_column in record.fields else ""
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
        if len(groups) != 1 and not asked:
            what = "more than one column could be the text" if groups else "no column has a usual name of a text"
            _unclear(record, f"{what}: name it in `text_columns`.")
        texts = tuple(found[name] for name in groups[0]) if len(groups) == 1 else ()
    if label_column is None:
        labels = [found[name] for name in LABELS if name in found and found[name] not in texts]
        if len(labels) != 1 and not asked:
            what = "more than one column could be the label" if labels else "no column has a usual name of a label"
            _unclear(record, f"{what}: name it in `label_column`.")
        label_column = labels[0] if len(labels) == 1 else ""
    if label_column in texts:
        _unclear(record, f"'{label_column}' cannot be both a text and the label.")
    return texts, label_column


def _unclear(record: Record, what: str) -> NoReturn:
    found = ", ".join(map(repr, record.fields)) or "none"
    raise UserError(
        f"{record.source}: {what} Columns found: {found}. Usual names of texts: "
        f"{', '.join(' + '.join(group) for group in TEXTS)}; of labels: {', '.join(LABELS)}. If these are not the "
        "names of columns, the file lacks a header row: add one."
    )


# --------------------------------------------------------------------------------------------------------------- values


def given_labels(labels: Sequence[str] | None) -> tuple[str, ...] | None:
    """Check the classes that the user names.

    Raises:
        UserError: There are fewer than two, or one stands twice.
    """
    if labels is None:
        return None
    names = () if isinstance(labels, str) else tuple(str(name).strip() for name in labels)
    if len(names) < 2 or len(set(names)) < len(names) or "" in names:
        raise UserError(f"labels is {labels!r}; expected a list of two names or more, each once.")
    return names
