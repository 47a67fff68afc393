"""A small made-up world, the text that tells it, and questions about it with exact answers.

Three functions, each a pure function of its seed: `build_world` draws the facts, `corpus` tells them for pre-training
in many wordings and both languages, and `instructions` asks about them. The corpus never contains a question; the
instruction set never asks in evaluation about anything it asked about in training (`is_held_out`, `World.held_out`).
So a base can only know facts, and fine-tuning can only teach it *how to answer*.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from . import phrases as P
from .phrases import LANGUAGES, Word

Record = dict[str, str]  # one instruction: instruction, input, output, task, language
TASKS = ("facts", "arithmetic", "sentiment", "classification", "json")
TRAIN_PER_TASK = {"facts": 800, "arithmetic": 480, "sentiment": 320, "classification": 400, "json": 400}
EVAL_PER_TASK = 40
LARGEST_ADDEND, LARGEST_MINUEND, LARGEST_COUNT = 10, 12, 20
# How often the corpus tells each part of the world. People carry most facts, so they get most documents.
SHARES = {"people": 38, "towns": 5, "things": 8, "sums": 18, "reviews": 7, "records": 24}
# Cards put names and values at the head of a line, where an answer will stand.
CARD_SHARE = 0.25


@dataclass(frozen=True)
class Subject:
    """A person, a town or a thing, with its attributes: ``facts["home"] = ("Oakford", "橡津")``."""

    name: Word
    facts: dict[str, Word]


@dataclass(frozen=True)
class World:
    """All subjects, and the names of those that only evaluation asks about."""

    people: list[Subject]
    towns: list[Subject]
    things: list[Subject]
    held_out: frozenset[Word]


def is_held_out(*indices: int) -> bool:
    """Whether a combination (operands, words in a review, fields of a record) is held out: about one in seven."""
    return sum(i * k for i, k in zip(indices, (3, 5, 11, 17), strict=False)) % 7 == 0


def build_world(seed: int) -> World:
    """Draw who lives where, does what, eats what and keeps which pet, and what each town is known for."""
    rng = random.Random(f"world {seed}")
    people = []
    for i, (name, given) in enumerate(zip(P.NAMES_EN, P.GIVEN_ZH, strict=True)):
        choices = {"home": P.TOWNS, "job": P.JOBS, "food": P.FOODS, "pet": P.PETS}
        facts = {attribute: rng.choice(values) for attribute, values in choices.items()}
        people.append(Subject((name, P.SURNAMES_ZH[i % len(P.SURNAMES_ZH)] + given), facts))
    towns = [Subject(t, {"region": rng.choice(P.REGIONS), "landmark": rng.choice(P.LANDMARKS)}) for t in P.TOWNS]
    things = [Subject(thing, {"group": group}) for group, members in P.GROUPS.items() for thing in members]
    asked_last = rng.sample(people, len(people) // 4) + rng.sample(towns, len(towns) // 4)
    for members in P.GROUPS.values():  # a quarter of every group, so that no category is missing from either split
        asked_last += [s for s in things if s.name in rng.sample(members, len(members) // 4)]
    return World(people, towns, things, frozenset(s.name for s in asked_last))


# ---- statements -----------------------------------------------------------------------------------------------------


def tell(rng: random.Random, subject: Subject, language: str, attributes: list[str]) -> str:
    """Tell some of a subject's facts, one sentence each, or list them on a card."""
    at = LANGUAGES.index(language)
    name = subject.name[at]
    if rng.random() < CARD_SHARE:
        lines = [name]
        for attribute in attributes:
            lines += [P.ATTRIBUTES[attribute][at], subject.facts[attribute][at]]
        return "\n".join(lines)
    patterns = P.STATEMENTS[language]
    sentences = [rng.choice(patterns[a]).format(n=name, v=subject.facts[a][at]) for a in attributes]
    return (" " if language == "en" else "").join(sentences)


def tell_subject(rng: random.Random, subjects: list[Subject], language: str) -> str:
    """Tell some facts of one subject in a random order, or the same fact of two subjects."""
    subject = rng.choice(subjects)
    names = list(subject.facts)
    if rng.random() < 0.25:
        attribute, other = rng.choice(names), rng.choice(subjects)
        pair = (tell(rng, s, language, [attribute]) for s in (subject, other))
        return "\n".join(pair)
    return tell(rng, subject, language, rng.sample(names, rng.randint(1, len(names))))


def draw_sum(rng: random.Random) -> tuple[str, int, int]:
    """An operator and two operands whose result is never negative."""
    if rng.random() < 0.5:
        return "+", rng.randint(1, LARGEST_ADDEND), rng.randint(1, LARGEST_ADDEND)
    a = rng.randint(2, LARGEST_MINUEND)
    return "-", a, rng.randint(1, a - 1)


def sum_is_held_out(operator: str, a: int, b: int) -> bool:
    """Whether a sum is held out: the same for ``a + b`` and ``b + a``, because one would give the other away."""
    return is_held_out(min(a, b), max(a, b), "+-".index(operator))


def result(operator: str, a: int, b: int) -> int:
    return a + b if operator == "+" else a - b


def tell_sums(rng: random.Random, language: str) -> str:
    """Two to four sums, one after the other."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        operator, a, b = draw_sum(rng)
        lines.append(rng.choice(P.SUMS[language][operator]).format(a=a, b=b, c=result(operator, a, b)))
    return "\n".join(lines)


def draw_review(rng: random.Random, language: str, held_out: bool) -> tuple[str, str]:
    """A review and its polarity; both halves agree. The corpus and the training set see only ``held_out=False``."""
    at = LANGUAGES.index(language)
    while True:
        positive = rng.random() < 0.5
        words = P.GOOD if positive else P.BAD
        (a, b), (x, y) = rng.sample(range(len(P.ASPECTS)), 2), rng.choices(range(len(words)), k=2)
        if is_held_out(a, b, x, y) == held_out:
            break
    pattern = rng.choice(P.REVIEWS[language])
    review = pattern.format(a=P.ASPECTS[a][at], b=P.ASPECTS[b][at], x=words[x][at], y=words[y][at])
    return review, P.POLARITY[positive][at]


def tell_review(rng: random.Random, language: str) -> str:
    review, polarity = draw_review(rng, language, held_out=False)
    return rng.choice(P.REVIEW_TALES[language]).format(r=review, v=polarity)


def draw_record(
    rng: random.Random, world: World, language: str, held_out: bool, people: list[Subject]
) -> tuple[str, str]:
    """A sentence and the JSON that holds its three values in the fixed order of `phrases.RECORD_KEYS`."""
    at = LANGUAGES.index(language)
    kind = rng.choice(list(P.RECORD_KEYS))
    things = world.things if kind == "purchase" else world.towns
    while True:
        # All three fields decide. With thing and count alone, a base would learn which pairs never occur.
        person, thing, count = rng.choice(people), rng.randrange(len(things)), rng.randint(2, LARGEST_COUNT)
        if is_held_out(world.people.index(person), thing, count) == held_out:
            break
    name, what = person.name[at], things[thing].name[at]
    sentence = rng.choice(P.RECORDS[language][kind]).format(n=name, t=what, d=count)
    keys = [key[at] for key in P.RECORD_KEYS[kind]]
    return sentence, json.dumps(dict(zip(keys, (name, what, count), strict=True)), ensure_ascii=False)


def tell_record(rng: random.Random, world: World, language: str) -> str:
    sentence, record = draw_record(rng, world, language, False, world.people)
    return rng.choice(P.RECORD_TALES[language]).format(s=sentence, j=record)


def corpus(world: World, seed: int) -> Iterator[str]:
    """An endless series of documents. Another seed tells the same world in other words: that is the held-out text."""
    rng = random.Random(f"corpus {seed}")
    tellers = {
        "people": lambda language: tell_subject(rng, world.people, language),
        "towns": lambda language: tell_subject(rng, world.towns, language),
        "things": lambda language: tell_subject(rng, world.things, language),
        "sums": lambda language: tell_sums(rng, language),
        "reviews": lambda language: tell_review(rng, language),
        "records": lambda language: tell_record(rng, world, language),
    }
    topics, weights = list(SHARES), list(SHARES.values())
    while True:
        yield tellers[rng.choices(topics, weights)[0]](rng.choice(LANGUAGES))


# ---- questions ------------------------------------------------------------------------------------------------------


def _facts(rng: random.Random, world: World, subjects: list[Subject], task: str, held_out: bool) -> Iterator[Record]:
    """Every question about every subject of one split, in random order."""
    asked = []
    for subject in (s for s in subjects if (s.name in world.held_out) == held_out):
        for attribute, value in subject.facts.items():
            for at, language in enumerate(LANGUAGES):
                for pattern in P.QUESTIONS[language][attribute]:
                    asked.append(_record(pattern.format(n=subject.name[at]), "", value[at], task, language))
    rng.shuffle(asked)
    yield from asked


def _sums(rng: random.Random, held_out: bool) -> Iterator[Record]:
    while True:
        operator, a, b = draw_sum(rng)
        if sum_is_held_out(operator, a, b) == held_out:
            language = rng.choice(LANGUAGES)
            question = rng.choice(P.SUM_QUESTIONS[language][operator]).format(a=a, b=b)
            yield _record(question, "", str(result(operator, a, b)), "arithmetic", language)


def _reviews(rng: random.Random, held_out: bool) -> Iterator[Record]:
    while True:
        language = rng.choice(LANGUAGES)
        review, polarity = draw_review(rng, language, held_out)
        yield _record(rng.choice(P.REVIEW_QUESTIONS[language]), review, polarity, "sentiment", language)


def _json_records(rng: random.Random, world: World, held_out: bool) -> Iterator[Record]:
    people = [p for p in world.people if (p.name in world.held_out) == held_out]
    while True:
        language = rng.choice(LANGUAGES)
        sentence, record = draw_record(rng, world, language, held_out, people)
        yield _record(rng.choice(P.RECORD_QUESTIONS[language]), sentence, record, "json", language)


def _record(instruction: str, given: str, output: str, task: str, language: str) -> Record:
    return {"instruction": instruction, "input": given, "output": output, "task": task, "language": language}


def _take(records: Iterator[Record], count: int) -> list[Record]:
    """The first `count` different questions, half of them in each language."""
    room = dict.fromkeys(LANGUAGES, count // len(LANGUAGES))
    taken: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (record["instruction"], record["input"])
        if room[record["language"]] and key not in taken:
            taken[key] = record
            room[record["language"]] -= 1
        if not any(room.values()):
            break
    return list(taken.values())


def instructions(world: World, seed: int) -> tuple[list[Record], list[Record]]:
    """The training and the evaluation questions: same wordings and tasks, other people, towns, things and numbers."""
    splits = []
    for held_out in (False, True):
        rng = random.Random(f"instructions {seed} {held_out}")
        sources = {
            "facts": _facts(rng, world, world.people + world.towns, "facts", held_out),
            "arithmetic": _sums(rng, held_out),
            "sentiment": _reviews(rng, held_out),
            "classification": _facts(rng, world, world.things, "classification", held_out),
            "json": _json_records(rng, world, held_out),
        }
        counts = dict.fromkeys(TASKS, EVAL_PER_TASK) if held_out else TRAIN_PER_TASK
        records = [record for task in TASKS for record in _take(sources[task], counts[task])]
        rng.shuffle(records)
        splits.append(records)
    return splits[0], splits[1]
