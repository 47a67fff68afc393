"""What a judge has said, read strictly. What cannot be read is no verdict, and is never taken for a tie or a loss."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from weft.errors import UserError
from weft.evaluate.judge.rubric import Rubric
from weft.foreign import parse_json

# How a verdict is written: an object that keeps a schema, or a sign alone.
Form = Literal["json", "letter"]
FORMS = ("json", "letter")
# Which of the two answers, by their places in the prompt.
Place = Literal["first", "second", "tie"]
_LETTERS: dict[str, Place] = {"A": "first", "B": "second", "C": "tie"}
_LETTER = re.compile(r"\W*([ABC])\W*")
_NUMBER = re.compile(r"[^\w+-]*(\d{1,4})\W*")


def comparison_schema() -> dict[str, object]:
    """The schema of a verdict on two answers: the reason stands first, so that the verdict follows from it."""
    return _schema({"verdict": {"type": "string", "enum": list(_LETTERS)}})


def score_schema(rubric: Rubric) -> dict[str, object]:
    """The schema of the scores of an answer."""
    steps = list(range(rubric.scale[0], rubric.scale[1] + 1))
    return _schema({name: {"type": "integer", "enum": steps} for name in rubric.criteria})


def _schema(properties: dict[str, object]) -> dict[str, object]:
    every = {"reason": {"type": "string"}, **properties}
    return {"type": "object", "properties": every, "required": list(every), "additionalProperties": False}


def read_comparison(text: str, form: Form) -> Place | None:
    """The verdict in an answer; None: there is none, or none that is clear."""
    if form == "letter":
        found = _LETTER.fullmatch(text.strip())
        return None if found is None else _LETTERS[found[1]]
    value = _object(text)
    said = None if value is None else value.get("verdict")
    return _LETTERS.get(said) if isinstance(said, str) else None


def read_scores(text: str, form: Form, rubric: Rubric, names: Sequence[str]) -> dict[str, int] | None:
    """The score of each criterion in ``names``; None: one is missing, or not on the scale. A letter form has one."""
    low, high = rubric.scale
    if form == "letter":
        found = _NUMBER.fullmatch(text.strip())
        scores: dict[str, object] = {names[0]: None if found is None else int(found[1])}
    else:
        scores = _object(text) or {}
    kept = {}
    for name in names:
        value = scores.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            return None
        kept[name] = value
    return kept


def _object(text: str) -> dict[str, object] | None:
    try:
        value = parse_json(text.strip(), "the verdict")
    except UserError:
        return None
    return value if isinstance(value, dict) else None
