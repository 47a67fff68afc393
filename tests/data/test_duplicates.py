"""Near duplicates: against sets in plain Python, and recall and precision on planted ones."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.data.auditing import duplicates
from weft.data.auditing.duplicates import SHINGLE, Shingles, near, normalise

ENGLISH = """the a of river mountain answer because people often write about light water under seven old houses where
nobody lives and every morning begins with bread cold tea or a long walk to school while birds sing in tall trees"""
WORDS = ENGLISH.split()
CHINESE = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所"
    "民得经"
)


def shingles_ref(text: str) -> set[str]:
    """The definition: five characters, of which one of Chinese counts as two."""
    letters = "".join(
        c * 2 if "\u2e80" <= c < "\ufb00" or "\U00020000" <= c < "\U00040000" else c for c in normalise(text)
    )
    if len(letters) < SHINGLE:
        return {letters} if letters else set()
    return {letters[i : i + SHINGLE] for i in range(len(letters) - SHINGLE + 1)}


def jaccard_ref(one: str, other: str) -> float:
    a, b = shingles_ref(one), shingles_ref(other)
    return len(a & b) / len(a | b) if a | b else 0.0


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="ab 你好\n\u3000😀é\ud800", max_size=40), st.text(alphabet="ab 你好\n\u3000😀é", max_size=40))
def test_jaccard_is_the_definition(one: str, other: str) -> None:
    (found,) = Shingles([normalise(one), normalise(other)]).similarities(np.array([[0, 1]]))
    assert found == pytest.approx(jaccard_ref(one, other))


def text_of(generator: random.Random, chinese: bool, length: int) -> str:
    if chinese:
        return "".join(generator.choice(CHINESE) for _ in range(length))
    return " ".join(generator.choice(WORDS) for _ in range(length // 4))


def changed(generator: random.Random, text: str, chinese: bool, edits: int) -> str:
    """The text with some words or characters replaced, dropped or put in."""
    parts = list(text) if chinese else text.split()
    for _ in range(edits):
        place = generator.randrange(len(parts))
        other = generator.choice(CHINESE if chinese else WORDS)
        parts[place : place + generator.randrange(2)] = [other] * generator.randrange(2)
        parts = parts or [other]
    return "".join(parts) if chinese else " ".join(parts)


@pytest.mark.long
def test_recall_and_precision_on_planted_pairs() -> None:
    """1,200 planted pairs of all similarities among 6,000 texts; those of 0.8 and more are to be found, no others."""
    generator = random.Random(0)
    texts = [text_of(generator, number % 2 == 0, generator.randrange(40, 600)) for number in range(4800)]
    planted = []
    for number in range(1200):
        edits = generator.randrange(1, max(2, len(texts[number]) // 25))
        planted.append((number, len(texts)))
        texts.append(changed(generator, texts[number], number % 2 == 0, edits))
    truth = {pair for pair in planted if jaccard_ref(texts[pair[0]], texts[pair[1]]) >= 0.8}
    assert 300 < len(truth) < 1100  # neither trivial nor empty
    close = sum(jaccard_ref(texts[a], texts[b]) < 0.86 for a, b in truth)
    assert close > 50  # where MinHash could miss one
    found = near(texts)
    pairs = {(pair.first, pair.second) for pair in found}
    assert len(truth & pairs) / len(truth) >= 0.99
    right = sum(jaccard_ref(texts[a], texts[b]) >= 0.8 for a, b in pairs)
    assert right / len(pairs) >= 0.95
    for pair in found[::50]:
        assert pair.similarity == pytest.approx(jaccard_ref(texts[pair.first], texts[pair.second]), abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("count", "limit"), [(500, 50_000), pytest.param(3000, 500_000, marks=pytest.mark.slow)])
def test_many_alike_are_all_found_in_little_time(count: int, limit: int) -> None:
    """A template filled in 500 times would be 125,000 pairs, and 3,000 times 4.5 million."""
    texts = [
        f"Please write a friendly reminder about the meeting in room {n:04d}, and thank everybody."
        for n in range(count)
    ]
    found = near(texts)
    assert {place for pair in found for place in (pair.first, pair.second)} == set(range(count))
    assert len(found) < limit


@pytest.mark.parametrize("texts", [[], ["a"], ["", ""], ["", "a", ""]])
def test_nothing_to_compare(texts: list[str]) -> None:
    assert near(texts) == []


def test_short_texts() -> None:
    assert [(p.first, p.second, p.similarity) for p in near(["a", "b", "a", "你好", "你好"])] == [
        (0, 2, 1.0),
        (3, 4, 1.0),
    ]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(1)
    texts = [text_of(generator, number % 3 == 0, 60) for number in range(300)] * 2
    whole = near(texts)
    assert len(whole) >= 300
    monkeypatch.setattr(duplicates, "_CHUNK", 500)
    assert near(texts) == whole


def test_minima_estimate_the_similarity() -> None:
    generator = random.Random(2)
    text = text_of(generator, False, 2000)
    other = changed(generator, text, False, 40)
    held = Shingles([normalise(text), normalise(other)])
    estimate = float((held.minima()[0] == held.minima()[1]).mean())
    assert estimate == pytest.approx(jaccard_ref(text, other), abs=0.15)
    assert np.array_equal(held.minima(), held.minima())


def test_normalise_reads_full_width_as_plain() -> None:
    assert normalise("Hello  World") == normalise("hello\nworld ")
    assert normalise("Ｈｅｌｌｏ　ＷＯＲＬＤ") == "hello world"
    assert unicodedata.normalize("NFKC", "①") == normalise("①")
