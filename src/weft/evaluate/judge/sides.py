"""The answers that are judged: a contestant of ``weft eval``'s results, or a file of ``weft generate --output``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weft.errors import UserError, nearest
from weft.evaluate.judge.figures import Winner
from weft.evaluate.judge.judging import Pair
from weft.evaluate.results import ITEMS, Results
from weft.files.whole import sha256_of
from weft.foreign import expect, json_lines
from weft.paths import local_path

_LINE = 64 << 20
_ITEM, _TEXT, _QUESTION = ("item", "index"), ("text", "output", "answer"), ("prompt", "question")


@dataclass(frozen=True)
class Answered:
    """One answer. ``question`` is "" where it is not known, ``whole`` whether it is all of it."""

    text: str
    question: str = ""
    reference: str = ""
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Side:
    """The answers of one who is judged.

    Attributes:
        name: of who answered. ``said``: the words of the command line.
        answers: item -> its answer.
        model: that answered, where it is known.
        digest: of the file.
    """

    name: str
    said: str
    answers: Mapping[str, Answered]
    model: str = ""
    digest: str = ""


def read_side(said: str) -> Side:
    """The answers that ``PATH`` or ``PATH#NAME`` holds.

    Raises:
        UserError: Nothing is there, the file is damaged, it has no such contestant, or several and none is named.
    """
    path, _, wanted = (said, "", "") if local_path(said).exists() else said.partition("#")
    place = local_path(path)
    if place.is_dir():
        return _of_results(place, said, wanted)
    if not place.is_file():
        raise UserError(
            f"there is no folder and no file {path}. Give results of `weft eval`, or answers (FILE.jsonl) of "
            "`weft generate --output`, with #NAME behind it where several answered."
        )
    return _of_lines(place, said, wanted)


def _of_results(folder: Path, said: str, wanted: str) -> Side:
    results = Results.read(folder)
    name = _chosen([one.name for one in results.contestants], said, wanted)
    facts = next(one.facts for one in results.contestants if one.name == name)
    several = len({one.task for one in results.items}) > 1
    answers = {
        f"{one.task}/{one.item}" if several else one.item: Answered(one.output, one.asked, one.reference)
        for one in results.items
        if one.contestant == name
    }
    if not answers:
        raise UserError(f"{said}: '{name}' has no items there.")
    model, digest = str(facts.get("model", "")), sha256_of(folder / ITEMS)
    return Side(name=name, said=said, answers=answers, model=model, digest=digest)


def _of_lines(path: Path, said: str, wanted: str) -> Side:
    rows = list(json_lines(path, limit=_LINE))
    if not rows:
        raise UserError(f"{path} holds no answers.")
    names = list(dict.fromkeys(str(row.get("adapter", path.stem)) for row in rows))
    name = _chosen(names, said, wanted)
    answers: dict[str, Answered] = {}
    for number, row in enumerate(rows, 1):
        if str(row.get("adapter", path.stem)) != name:
            continue
        where = f"{path}:{number}"
        item = _item(row, number)
        text = _first(row, _TEXT)
        if not isinstance(text, str):
            raise UserError(f"{where}: no answer is there; expected 'text', as `weft generate --output` writes it.")
        if item in answers:
            raise UserError(f"{where}: item {item} has an answer already. Each item may have one.")
        question, reference = _first(row, _QUESTION), row.get("reference", "")
        answers[item] = Answered(text, "" if question is None else _question(question, where), str(reference), True)
    model = str(rows[0].get("model", ""))
    return Side(name=name, said=said, answers=answers, model=model, digest=sha256_of(path))


def _chosen(names: Sequence[str], said: str, wanted: str) -> str:
    if wanted in names:
        return wanted
    if wanted:
        raise UserError(f"{said}: there is no '{wanted}'.{nearest(wanted, names)} There are: {', '.join(names)}.")
    if len(names) != 1:
        raise UserError(f"{said} has answers of several: {', '.join(names)}. Name one behind it: {said}#{names[0]}.")
    return names[0]


def _first(row: Mapping[str, object], keys: Sequence[str]) -> object:
    return next((row[key] for key in keys if key in row), None)


def _item(row: Mapping[str, object], number: int) -> str:
    """What an answer answers: its item, or its place in the file; with the number of its sample."""
    found = _first(row, _ITEM)
    sample = row.get("sample", 0)
    return str(number - 1 if found is None else found) + (f"/{sample}" if sample else "")


def _question(value: object, where: str) -> str:
    """A text, or the turns of a conversation as text: of one turn its words alone."""
    if isinstance(value, str):
        return value
    turns = [expect(turn, dict, f"{where}: prompt") for turn in expect(value, list, f"{where}: prompt")]
    if len(turns) == 1:
        return str(turns[0].get("content", ""))
    return "\n\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)


def read_prompts(path: Path) -> dict[str, Answered]:
    """item -> question and right answer, of a file with ``item`` (or ``index``), ``prompt`` and perhaps ``reference``.

    Raises:
        UserError: A line has no prompt.
    """
    found = {}
    for number, row in enumerate(json_lines(path, limit=_LINE), 1):
        question = _first(row, _QUESTION)
        if question is None:
            raise UserError(f"{path}:{number}: 'prompt' is missing.")
        reference = str(row.get("reference", ""))
        found[_item(row, number)] = Answered("", _question(question, f"{path}:{number}"), reference, True)
    return found


def pairs_of(a: Side, b: Side | None, prompts: Mapping[str, Answered] | None = None) -> list[Pair]:
    """The answers of both to each item, in A's order; without B those of A alone.

    Raises:
        UserError: The two do not answer the same items or questions, a question is not known, or one of them has no
            answer that is not empty.
    """
    for side in (a, b):
        if side is not None and not any(one.text.strip() for one in side.answers.values()):
            raise UserError(f"{side.said}: every answer of '{side.name}' is empty; there is nothing to judge.")
    if b is not None:
        _check_same(a, b)
    pairs = []
    for item, one in a.answers.items():
        other = Answered("") if b is None else b.answers[item]
        known = (prompts or {}).get(item)
        if prompts is not None and known is None:
            raise UserError(f"--prompts: there is no prompt of item {item}, which {a.said} answers.")
        if b is not None and known is None and one.whole and other.whole and one.question != other.question:
            raise UserError(f"item {item} is another question in each: {_cut(one.question)} in {a.said}, "
                            f"{_cut(other.question)} in {b.said}.")  # fmt: skip
        question = (known or one).question or other.question
        if not question:
            raise UserError(
                f"item {item} of {a.said}: its question is not known. Give the questions by --prompts FILE.jsonl."
            )
        reference = (known.reference if known else "") or one.reference or other.reference
        pairs.append(Pair(item, question, one.text, b=other.text, reference=reference))
    return pairs


def _check_same(a: Side, b: Side) -> None:
    for one, other in ((a, b), (b, a)):
        missing = [item for item in one.answers if item not in other.answers]
        if missing:
            raise UserError(
                f"{a.said} and {b.said} do not answer the same items: {one.said} has {len(missing):,} that "
                f"{other.said} has not, such as {missing[0]}. Let both answer the same questions."
            )


def _cut(text: str) -> str:
    return json.dumps(text if len(text) <= 60 else f"{text[:60]}…", ensure_ascii=False)


def read_labels(path: Path, items: Sequence[str]) -> dict[str, Winner]:
    """item -> who wins as people say, of a file with ``item`` (or ``index``) and ``label``: A, B or tie.

    Raises:
        UserError: A line has no such label, an item has two, or none of the ``items`` has one.
    """
    words: dict[str, Winner] = {"a": "a", "b": "b", "tie": "tie", "c": "tie"}
    found: dict[str, Winner] = {}
    for number, row in enumerate(json_lines(path), 1):
        item, label = _item(row, number), words.get(str(row.get("label", "")).lower())
        if label is None:
            raise UserError(f"{path}:{number}: label: expected A, B or tie, found {row.get('label')!r}.")
        if found.setdefault(item, label) != label:
            raise UserError(f"{path}:{number}: item {item} has another label already.")
    if not set(items) & set(found):
        raise UserError(
            f"{path}: it labels none of the items that are judged; they are called {', '.join(items[:3])} …."
        )
    return found
