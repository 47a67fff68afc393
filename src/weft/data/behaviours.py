"""Training data for behaviour in a domain: refuse what lies outside it, answer from the texts that are given."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.data.auditing.duplicates import normalise
from weft.data.formats.detect import to_example
from weft.data.formats.examples import Conversation, Message, PlainText
from weft.data.pipeline import read_all
from weft.data.reading.records import Record
from weft.data.retrieval import Index, Passage, covered, is_cjk, without
from weft.errors import UserError
from weft.files.whole import write_whole

# By language: what is answered where nobody says what should be.
REFUSALS: Mapping[str, Sequence[str]] = {
    "en": (
        "I'm sorry, but that is outside what I can help with.",
        "I can't help with that; it is not part of my field.",
        "Sorry, I am not able to answer questions on other subjects.",
    ),
    "zh": (
        "抱歉，这个问题超出了我的服务范围。",
        "很抱歉，我无法回答这方面的问题。",
        "对不起，我只能回答本领域的问题。",
    ),
}
NOT_IN_TEXT: Mapping[str, Sequence[str]] = {"en": ("The text does not say.",), "zh": ("文中没有提到。",)}
TEMPLATES = {
    "en": 'Answer from the texts below alone. If they do not hold the answer, say "{not_in_text}"\n\n{context}\n\n'
    "Question: {question}",
    "zh": "请只根据下面的材料回答问题。如果材料中没有答案，请回答“{not_in_text}”\n\n{context}\n\n问题：{question}",
}
# Deeper than this among the passages found, nobody looks for the one with the answer.
_DEEP = 50

Texts = str | Sequence[str] | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class _Asked:
    """A conversation up to the user's last turn, and its answer ("": none was given)."""

    before: tuple[Message, ...]
    answer: str
    source: str

    @property
    def question(self) -> str:
        return self.before[-1].content


def build_refusals(
    inside: str | Path, outside: str | Path, *, share: float = 0.2, answers: Texts = REFUSALS, seed: int = 0
) -> list[dict[str, Any]]:
    """Records that teach to answer inside a domain and to refuse outside it.

    Args:
        inside: conversations of the domain, in any format that training reads; all of them stay as they are.
        outside: questions from elsewhere, with answers (which are left away) or without; lines of text will do.
        share: of the records that are refusals, to the nearest whole record.
        answers: what a refusal says: a text, several to draw from, or several by language (``en``, ``zh``).
        seed: of the choice of questions and texts, and of the order.

    Returns:
        Records with ``messages``, and ``refused`` (which training does not read), in random order.

    Raises:
        UserError: ``share`` is not between 0 and 1, there are too few questions from outside, one of them is asked
            inside as well, or a record cannot be used.
    """
    if not 0 < share < 1:
        raise UserError(f"share is {share}; the share of refusals lies between 0 and 1.")
    known, others = read_all(inside, _asked), read_all(outside, _asked)
    for one in known:
        if not one.answer:
            raise UserError(f"{one.source}: a question inside the domain needs its answer.")
    same = {normalise(one.question): one.source for one in known}
    for one in others:
        if (there := same.get(normalise(one.question))) is not None:
            raise UserError(
                f"{one.source}: this question is also asked inside the domain ({there}). Remove one of them."
            )
    wanted = round(len(known) * share / (1 - share))
    if wanted > len(others):
        raise UserError(
            f"{outside}: {len(others)} questions, and a share of {share:g} beside {len(known)} records of the domain "
            f"takes {wanted}. Give more questions or a smaller share."
        )
    rng = random.Random(seed)
    records = [_record(one.before, one.answer, refused=False) for one in known]
    for one in rng.sample(others, wanted):
        records.append(_record(one.before, _say(answers, one.question, rng), refused=True))
    rng.shuffle(records)
    return records


@dataclass(frozen=True)
class Grounded:
    """Records with their texts, and the places of the questions that were left out: no passage has their answer."""

    records: list[dict[str, Any]]
    left_out: list[str]


def build_grounded(
    questions: str | Path,
    passages: Sequence[Passage],
    *,
    count: int = 3,
    unanswerable: float = 0.2,
    support: float = 1.0,
    not_in_text: Texts = NOT_IN_TEXT,
    template: str | None = None,
    seed: int = 0,
) -> Grounded:
    """Records that teach to answer from passages, and to say so where these do not hold the answer.

    The passages of a question are those that BM25 finds. If none of them covers the answer (``covered``), the best one
    that does takes the place of the last. A share of the questions gets only passages without the answer, and the
    answer ``not_in_text``.

    Args:
        questions: questions with answers, in any format that training reads.
        passages: of the documents (``read_passages``).
        count: how many passages stand before a question.
        unanswerable: the share of the records without the answer, to the nearest whole record.
        support: a passage holds an answer if it has this share of its terms.
        not_in_text: what is answered where it does not: a text, several to draw from, or several by language.
        template: with ``{context}``, ``{question}`` and, if wanted, ``{not_in_text}``; default: by language.
        seed: of what is drawn.

    Raises:
        UserError: A number is out of its range, the template lacks a place, a question has no answer, or for none of
            the questions is there a passage with the answer.
    """
    if count < 1 or not 0 <= unanswerable < 1 or not 0 < support <= 1:
        raise UserError(
            f"count {count}, unanswerable {unanswerable}, support {support}: count is at least 1, unanswerable lies in "
            "[0, 1) and support in (0, 1]."
        )
    for place in ("{context}", "{question}") if template is not None else ():
        if place not in str(template):
            raise UserError(f"the template has no {place}.")
    rng = random.Random(seed)
    found, left_out = _looked_up(read_all(questions, _asked), Index(passages), support)
    if not found:
        raise UserError(
            f"{questions}: for none of {len(left_out)} questions does a passage hold the answer. Give other documents, "
            "or a lower support."
        )
    missing = set(rng.sample(range(len(found)), round(len(found) * unanswerable)))
    records = []
    for number, (one, ranked, holding) in enumerate(found):
        says, answerable = _say(not_in_text, one.question, rng), number not in missing
        if answerable:
            chosen = _with(holding, ranked[:count], rng)
        else:
            chosen = without(ranked, one.answer, support)[:count] or without(passages, one.answer, support)[:count]
        if not chosen:
            raise UserError(
                f"{one.source}: every passage holds the answer, so none can be missing. Give more documents."
            )
        context = "\n\n".join(f"[{place}] {passage.text}" for place, passage in enumerate(chosen, 1))
        filled = {"context": context, "question": one.question, "not_in_text": says}
        shape = template or TEMPLATES[_language(one.question)]
        # In one go: a text may hold the name of another place.
        asked = re.sub(r"\{(context|question|not_in_text)\}", lambda place: filled[place[1]], shape)  # noqa: B023
        record = _record((*one.before[:-1], Message("user", asked)), one.answer if answerable else says,
                         answerable=answerable)  # fmt: skip
        records.append(record | {"context": context, "sources": [passage.source for passage in chosen]})
    return Grounded(records, left_out)


def _looked_up(
    questions: Sequence[_Asked], index: Index, support: float
) -> tuple[list[tuple[_Asked, list[Passage], Passage]], list[str]]:
    """Questions with the passages found and the best that holds the answer; the places of those without one."""
    found, left_out = [], []
    for one in questions:
        if not one.answer:
            raise UserError(f"{one.source}: a question needs its answer, to look for it in the passages.")
        ranked = index.search(one.question, _DEEP)
        best = next((passage for passage in ranked if covered(one.answer, passage.text) >= support), None)
        if best is not None:
            found.append((one, ranked, best))
        else:
            left_out.append(one.source)
    return found, left_out


def _with(holding: Passage, best: list[Passage], rng: random.Random) -> list[Passage]:
    """The best passages with the one that holds the answer, in the place of the last where it is not among them."""
    chosen = best if holding in best else [*best[:-1], holding]
    return rng.sample(chosen, len(chosen))  # else an answer would stand last wherever it was hard to find


def write_records(path: str | Path, records: Sequence[Mapping[str, object]]) -> None:
    """Write records as JSON lines, the file whole or not at all.

    Raises:
        WriteError: The machine refuses.
    """
    write_whole(Path(path), "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _asked(record: Record) -> _Asked:
    example = to_example(record)
    if isinstance(example, PlainText):
        return _Asked((Message("user", example.text.strip()),), "", record.source)
    if not isinstance(example, Conversation):
        raise UserError(f"{record.source}: expected a question, with its answer or without.")
    *before, last = example.messages
    if last.role == "user":
        return _Asked(example.messages, "", record.source)
    if last.role != "assistant" or not before or before[-1].role != "user":
        raise UserError(f"{record.source}: expected a user's question as the last turn, or before the last answer.")
    return _Asked(tuple(before), last.content, record.source)


def _record(before: Sequence[Message], answer: str, **facts: bool) -> dict[str, Any]:
    turns = [*before, Message("assistant", answer)]
    return {"messages": [{"role": turn.role, "content": turn.content} for turn in turns], **facts}


def _language(question: str) -> str:
    return "zh" if is_cjk(question) else "en"


def _say(texts: Texts, question: str, rng: random.Random) -> str:
    if isinstance(texts, str):
        return texts
    own = texts.get(_language(question), ()) if isinstance(texts, Mapping) else texts
    if not own:
        raise UserError(f"there is no text to answer {question[:60]!r} with, in the language {_language(question)}.")
    return rng.choice(list(own))
