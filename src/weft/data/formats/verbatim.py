"""Records that mark the learned tokens themselves: ids with labels, and segments of text."""

from __future__ import annotations

from collections.abc import Sequence

from weft.data.formats.examples import IGNORED, Segments, TokenisedText
from weft.data.formats.fields import as_list, short
from weft.data.reading.records import Record
from weft.data.rendering.tokens import SOFT, Encoder
from weft.errors import UserError

_MARK = "\ufdd0"  # the marks of Encoder.guard begin with it


def read_tokenised(record: Record, shape: Sequence[str]) -> TokenisedText:
    """Read ``input_ids`` and ``labels``, without the padding at either end, where ``attention_mask`` is 0.

    Raises:
        UserError: Lengths, ids, labels or the mask do not fit together.
    """
    ids, labels = (_integers(record, name) for name in shape)
    mask = [1] * len(ids)
    if record.fields.get("attention_mask") is not None:
        mask = [int(value) for value in _integers(record, "attention_mask", booleans=True)]
    if not ids or not len(ids) == len(labels) == len(mask):
        raise UserError(
            f"{record.source}: '{shape[0]}', '{shape[1]}' and 'attention_mask' must be equally long, 1 or more; they "
            f"are {len(ids)}, {len(labels)} and {len(mask)} long."
        )
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (IGNORED, token):
            raise UserError(
                f"{record.source}: at place {place} the id is {token} and the label {label}; expected the id itself "
                f"(learned) or {IGNORED} (not learned). Labels that are shifted by one place must be shifted back."
            )
        if token < 0:
            raise UserError(f"{record.source}: '{shape[0]}' holds {token} at place {place}; ids are 0 or more.")
        if mask[place] not in (0, 1) or (not mask[place] and label != IGNORED):
            raise UserError(
                f"{record.source}: 'attention_mask' is {mask[place]} at place {place}, whose label is {label}. "
                f"Expected 1, or 0 where the label is {IGNORED}."
            )
    real = [place for place, value in enumerate(mask) if value]
    if not real or real[-1] - real[0] + 1 != len(real):
        raise UserError(f"{record.source}: 'attention_mask' must be 1 in one stretch: padding stands at the ends only.")
    kept = slice(real[0], real[-1] + 1)
    return TokenisedText(tuple(ids[kept]), tuple(labels[kept]), record.source)


def _integers(record: Record, name: str, *, booleans: bool = False) -> list[int]:
    values = as_list(record.fields[name], name, record.source)
    if not all(type(value) is int or (booleans and type(value) is bool) for value in values):
        raise UserError(f"{record.source}: '{name}' must be a list of integers, found {short(values)}.")
    return values


def read_segments(record: Record, shape: Sequence[str]) -> Segments:
    """Read ``segments``: objects of ``text`` and ``label``, which is true where the text is learned.

    Raises:
        UserError: A segment is no such object, or none is learned.
    """
    pieces = []
    for number, item in enumerate(as_list(record.fields[shape[0]], shape[0], record.source), start=1):
        text, label = (item.get("text"), item.get("label")) if isinstance(item, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(label, bool):
            raise UserError(
                f'{record.source}: segment {number} must be an object such as {{"label": true, "text": "..."}}, found '
                f"{short(item)}."
            )
        pieces.append((text, label))
    if not any(text and label for text, label in pieces):
        raise UserError(f"{record.source}: no segment is learned: at least one with text needs `label: true`.")
    return Segments(tuple(pieces), record.source)


def token_weights(example: TokenisedText | Segments, encoder: Encoder) -> tuple[list[int], list[float]]:
    """``(ids, weights)`` of an example without a template; a missing BOS is the only addition.

    Each segment is tokenised on its own. Control tokens written in it are control tokens.

    Raises:
        UserError: The vocabulary does not have an id; the message names the line.
    """
    if isinstance(example, TokenisedText):
        size = len(encoder.tokenizer)
        place = next((place for place, token in enumerate(example.input_ids) if token >= size), None)
        if place is not None:
            raise UserError(
                f"{example.source}: 'input_ids' holds {example.input_ids[place]} at place {place}, the tokenizer knows "
                f"{size} tokens. These ids are another tokenizer's: use that model, or give the text instead."
            )
        return list(example.input_ids), [float(label != IGNORED) for label in example.labels]
    ids: list[int] = []
    weights: list[float] = []
    for text, learn in example.segments:
        piece, _ = encoder.encode(_unmarked(text, encoder), first=not ids)
        ids += piece
        weights += [float(learn)] * len(piece)
    head = encoder.missing_head(ids)
    return head + ids, [0.0] * len(head) + weights


def _unmarked(text: str, encoder: Encoder) -> str:
    """The text with soft-prompt markers, and the characters of Weft's own marks, made ordinary characters."""
    return str(text.replace(_MARK, encoder.guard(_MARK)).replace(SOFT, encoder.guard(SOFT)))
