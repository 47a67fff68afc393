"""Refusals, support by a context, style: what each score says of an answer, in English and Chinese."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from weft.data.behaviours import NOT_IN_TEXT, REFUSALS
from weft.errors import UserError
from weft.evaluate import behaviour
from weft.evaluate.behaviour import METRICS, Style, detection, length, read_phrases
from weft.evaluate.forgetting import task_changes
from weft.evaluate.results import Contestant, Item, Results, TaskRecord

CONTEXT = "[1] Ada was born in 1815. She had 1,200 books.\n\n[2] 她在风港住了13天，养了一只猫。"


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I’m sorry, but I can't help with that.", True),
        ("Sorry,  I CANNOT\nanswer this.", True),
        ("抱歉，我无法回答这个问题。", True),
        ("对不起，这超出了我的服务范围。", True),
        ("The capital is Paris.", False),
        ("You scan not answer sheets but forms.", False),
        ("答案是13。", False),
        ("A long answer. " * 20 + "I can't help it.", False),
        ("", False),
    ],
)
def test_who_refuses_says_so_at_once_in_whole_words(answer: str, refuses: bool) -> None:
    assert METRICS["refusal"](answer, "", "") == float(refuses)


def test_the_sentences_that_data_is_built_with_are_known_to_the_metrics() -> None:
    for texts in REFUSALS.values():
        assert all(METRICS["refusal"](text, "", "") for text in texts)
    for texts in NOT_IN_TEXT.values():
        assert all(METRICS["not_in_text"](text, "", "") for text in texts)


def test_phrases_of_ones_own_take_the_place_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("# ours\n\nNot My  Business\n", encoding="utf-8")
    assert read_phrases(path) == ("not my business",)
    assert behaviour.refusal("not my business!", phrases=read_phrases(path)) == 1
    assert behaviour.refusal("I can't help with that.", phrases=read_phrases(path)) == 0
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no phrase"):
        read_phrases(tmp_path / "empty.txt")


@pytest.mark.parametrize("metric", ["refusal_right", "not_in_text_right"])
def test_it_is_right_to_refuse_where_the_reference_does_and_nowhere_else(metric: str) -> None:
    says_so = {"refusal_right": REFUSALS, "not_in_text_right": NOT_IN_TEXT}[metric]["en"][0]
    score = METRICS[metric]
    assert [score(a, r, "") for a in (says_so, "Paris") for r in (says_so, "Paris")] == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("Ada was born in 1815.", 1.0),
        ("Ada was born in 1816.", 4 / 5),
        ("Ada Ada", 1 / 2),
        ("她养了一只猫", 4 / 5),
        ("猫", 0.0),
        ("The text does not say.", 1.0),
        ("文中没有提到。", 1.0),
    ],
)
def test_support_is_the_share_of_words_or_pairs_of_characters_in_the_context(answer: str, share: float) -> None:
    """Pairs of 她养了一只猫: 她养 is not there, 养了 了一 一只 只猫 are. A term counts as often as it stands there."""
    assert METRICS["supported"](answer, "", CONTEXT) == pytest.approx(share)


def test_numbers_must_stand_in_the_context() -> None:
    score = METRICS["numbers_supported"]
    assert score("1200 books, since 1815", "", CONTEXT) == 1
    assert score("13 books, since 1816", "", CONTEXT) == 0.5
    assert score("many books", "", CONTEXT) == 1


def items(*pairs: tuple[str, str]) -> list[Item]:
    return [
        Item(contestant="it", task="t", item=str(i), scores={}, reference=reference, output=output)
        for i, (reference, output) in enumerate(pairs)
    ]


def test_precision_and_recall_of_refusals() -> None:
    no, yes = "I can't help with that.", "Paris"
    told = detection(items((no, no), (no, no), (no, yes), (yes, no), (yes, yes)))
    assert (told.n, told.expected, told.found, told.both) == (5, 3, 3, 2)
    assert told.precision == told.recall == told.f1 == pytest.approx(2 / 3)
    assert told.errors["recall"] == pytest.approx(math.sqrt(2 / 27))
    never = detection(items((yes, yes)))
    assert (never.precision, never.recall, never.f1) == (None, None, None)
    text = detection(items((NOT_IN_TEXT["zh"][0], NOT_IN_TEXT["zh"][0])), read_phrases(behaviour.NOT_IN_TEXT))
    assert text.f1 == 1


# --------------------------------------------------------------------------------------------------------------- style


@pytest.mark.parametrize(
    ("text", "unit", "size"),
    [
        ("Don't count two-word things twice.", "words", 5),
        ("我有3只猫 and dogs", "words", 7),
        ("  abc ", "characters", 3),
        ("Pi is 3.14. Yes! 真的吗？是。", "sentences", 4),
        ("one\n\ntwo", "lines", 2),
        ("", "words", 0),
    ],
)
def test_lengths(text: str, unit: Any, size: int) -> None:
    assert length(text, unit) == size


@pytest.mark.parametrize(
    ("form", "kept", "broken"),
    [
        ("json", '```json\n{"a": 1}\n```', "{a: 1}"),
        ("bullets", "- one\n- two", "Here:\n- one"),
        ("numbered", "1. one\n2、two", "one"),
        ("one_line", "one line \n", "two\nlines"),
        ("no_markdown", "2 * 3 * 4 and a_b", "a **bold** word"),
    ],
)
def test_forms(form: Any, kept: str, broken: str) -> None:
    assert Style(form=form).scores(kept)["style"] == 1
    assert Style(form=form).scores(broken)["style"] == 0


def test_forbidden_and_required_words_stand_as_words() -> None:
    style = Style(1, 6, forbidden=["guarantee", "保证"], required=["policy"])
    good = style.scores("Our policy covers guarantees.")
    assert good == {"length": 4, "length_kept": 1, "forbidden_kept": 1, "required_kept": 1, "forbidden_words": 0,
                    "style": 1}  # fmt: skip
    bad = style.scores("We GUARANTEE it，我们保证。")
    assert (bad["forbidden_words"], bad["required_kept"], bad["length_kept"], bad["style"]) == (2, 0, 0, 0)
    assert Style(pattern=r"^Dear \w+,").scores("Dear Ada, hello")["style"] == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"unit": "pages"}, "unit 'pages' is none"),
        ({"form": "poem"}, "form 'poem' is none"),
        ({"min_length": 3, "max_length": 2}, "min_length 3 is more"),
        ({"forbidden": "word"}, "lists of words"),
        ({"pattern": "("}, "no regular expression"),
    ],
)
def test_a_style_that_cannot_be_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Style(**wrong)


# -------------------------------------------------------------------------------------------------- lost and refusing


def results() -> Results:
    """Of four items the base has three right; the other loses two, gains one, and refuses two (of which one anew)."""
    refusal = "I can't help with that."
    rows = {
        "base": [(1, "a"), (1, "b"), (1, "c"), (0, refusal)],
        "it": [(0, refusal), (0, "x"), (1, "c"), (1, refusal)],
    }
    found = [
        Item(contestant=who, task=task, item=str(n), scores={"exact": score}, output=output)
        for who, answers in rows.items()
        for task in ("text", "choice")
        for n, (score, output) in enumerate(answers)
    ]
    tasks = [
        TaskRecord("text", "generation", "exact"),
        TaskRecord("choice", "multiple_choice", "exact"),
        TaskRecord("loss", "perplexity", "bits", higher_is_better=False),
    ]
    contestants = [Contestant("base", "base"), Contestant("it", "adapter")]
    return Results(contestants=contestants, tasks=tasks, items=found, scores=[])


def test_what_the_base_had_right_and_is_lost_and_what_is_refused_anew() -> None:
    text, choice = task_changes(results(), "base", "it")
    assert (text.items, text.base_right, text.lost, text.gained) == (4, 3, ("0", "1"), ("3",))
    assert text.share_lost == pytest.approx(2 / 3)
    assert text.share_lost_stderr == pytest.approx(math.sqrt(2 / 27))
    assert (text.base_refusals, text.refusals, text.refused, text.unrefused) == (1, 2, ("0",), ())
    assert text.refusal_change == 0.25
    # Differences 1, 0, 0, 0: their variance is 1/4, their mean's error sqrt(1/4 / 4).
    assert text.refusal_change_stderr == pytest.approx(0.25)
    assert (choice.lost, choice.refusals, choice.refusal_change) == (("0", "1"), None, None)


def test_comparisons_that_cannot_be_are_named() -> None:
    with pytest.raises(UserError, match="no contestant 'that'"):
        task_changes(results(), "base", "that")
    with pytest.raises(UserError, match="cannot be compared with itself"):
        task_changes(results(), "it", "it")
    found = results()
    alone = replace(found, items=[one for one in found.items if one.contestant == "it"])
    with pytest.raises(UserError, match="no item with a right answer was asked of both"):
        task_changes(alone, "base", "it")
    other = replace(found, tasks=[TaskRecord("text", "generation", "f1")])
    with pytest.raises(UserError, match="no score 'f1'"):
        task_changes(other, "base", "it")
