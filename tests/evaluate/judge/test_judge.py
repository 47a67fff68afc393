"""A planted judge is exposed by its figures; verdicts are read strictly; what cannot be read counts for nothing."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from weft.data import Message
from weft.errors import UserError
from weft.evaluate.judge import Compared, Judge, JudgePrompts, JudgeReward, Pair, Rubric
from weft.evaluate.judge.figures import Rate, compare_figures, kappa
from weft.evaluate.judge.length import length_controlled_minimal
from weft.evaluate.judge.verdicts import read_comparison, read_scores
from weft.generators import Budget, Ledger, ScriptedGenerator

ANSWERS = re.compile(r"\[Answer A\]\n(.*?)\n\[End of answer A\].*\[Answer B\]\n(.*?)\n\[End of answer B\]", re.DOTALL)


def planted(
    seed: int, *, place: float = 0.0, length: float = 0.0, quality: float = 0.0, ties: float = 0.0
) -> ScriptedGenerator:
    """A judge whose logit for the first answer is ``place`` + ``length`` per log-ratio of the lengths + ``quality``
    per letter "!" more."""
    draw = random.Random(seed)

    def script(turns: Sequence[Message], _: int) -> str:
        found = ANSWERS.search(turns[-1].content)
        assert found is not None
        first, second = found.groups()
        logit = place + length * math.log(len(first) / len(second)) + quality * (first.count("!") - second.count("!"))
        if draw.random() < ties:
            return "C"
        return "A" if draw.random() < 1 / (1 + math.exp(-logit)) else "B"

    return ScriptedGenerator(script)


def pairs_of(seed: int, count: int = 400, more: float = 0.4) -> list[Pair]:
    """Answers of two systems that differ in length alone: the first's are longer by e^more, each by chance."""
    draw = random.Random(seed)
    lengths = [(draw.lognormvariate(4 + more, 0.5), draw.lognormvariate(4, 0.5)) for _ in range(count)]
    return [
        Pair(str(i), f"question {i}", "a" * max(2, round(one)), b="b" * max(2, round(other)))
        for i, (one, other) in enumerate(lengths)
    ]


def judged(generator: ScriptedGenerator, pairs: Sequence[Pair]) -> list[Compared]:
    return Judge(generator, form="letter").compare(pairs)


SEEDS = range(12)


def scores_of(values: Sequence[tuple[float | None, float | None]], truth: float) -> list[float]:
    """By how many standard errors values are off."""
    assert all(value is not None and error for value, error in values)
    return [(float(value or 0) - truth) / float(error or 1) for value, error in values]


def centred(scores: Sequence[float]) -> bool:
    """Whether the mean of standard scores is 0, as far as chance explains: it has an error of 1/√n."""
    return abs(float(np.mean(scores))) < 3 / math.sqrt(len(scores)) and max(map(abs, scores)) < 4


def test_length_control_ranks_two_systems_that_differ_in_length_alone_as_equal() -> None:
    found = [compare_figures(judged(planted(seed, place=0.8, length=1.5), pairs_of(seed))) for seed in SEEDS]
    control = [(one.length_controlled.value, one.length_controlled.stderr) for one in found]
    assert centred(scores_of(control, 0.5))
    raw = scores_of([(one.win_rate.value, one.win_rate.stderr) for one in found], 0.5)
    assert min(raw) > 3, "without the control the longer one wins each time"


def test_the_biases_of_a_planted_judge_are_measured_and_those_of_a_fair_one_are_none() -> None:
    biased = [compare_figures(judged(planted(seed, place=0.8, length=1.5), pairs_of(seed))) for seed in SEEDS]
    fair = [compare_figures(judged(planted(seed, quality=1.0), pairs_of(seed))) for seed in SEEDS]
    for one in biased:
        assert scores_of([(one.first.value, one.first.stderr)], 0.5)[0] > 3
        assert scores_of([(one.longer.value, one.longer.stderr)], 0.5)[0] > 3
        assert one.length_controlled.weight is not None
        assert one.length_controlled.weight_stderr is not None
        assert one.length_controlled.weight > 3 * one.length_controlled.weight_stderr
    assert centred(scores_of([(one.first.value, one.first.stderr) for one in fair], 0.5))
    assert centred(scores_of([(one.longer.value, one.longer.stderr) for one in fair], 0.5))
    # Two coins name one place twice in half of all cases.
    assert centred(scores_of([(one.follows_place.value, one.follows_place.stderr) for one in fair], 0.5))


def test_a_better_system_wins_also_at_equal_length() -> None:
    better = [Pair(one.item, one.question, one.a + "!!", b=one.b) for one in pairs_of(5)]
    found = compare_figures(judged(planted(5, place=0.5, length=1.0, quality=1.0), better))
    control = found.length_controlled
    assert control.value is not None
    assert control.stderr is not None
    assert control.value - 3 * control.stderr > 0.5


def test_the_error_of_length_control_is_that_of_many_repetitions() -> None:
    """Its standard error is the spread of its estimates over data sets, within the 2.5 errors of a spread."""
    draw = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(200):
        gaps = draw.normal(0.5, 1, 300)
        logits = 0.4 + 0.8 * np.tanh(gaps / gaps.std())
        votes = draw.random((2, 300)) < 1 / (1 + np.exp(-logits))
        found = length_controlled_minimal(votes.mean(0).tolist(), gaps.tolist())
        values.append(found.value or 0)
        errors.append(found.stderr or 0)
    spread = float(np.std(values, ddof=1))
    assert abs(float(np.mean(errors)) / spread - 1) < 2.5 / math.sqrt(2 * 199)
    assert abs(float(np.mean(values)) - 1 / (1 + math.exp(-0.4))) < 3 * spread / math.sqrt(200)


@pytest.mark.parametrize(
    ("values", "gaps", "value", "has_error"),
    [([1, 0], [0, 1], None, False), ([1, 1, 1, 1], [1, 2, -1, 0], "high", False),
     ([1, 0, 0.5, 0.5], [0] * 4, 0.5, True), ([1, 0, 1, 1], [7] * 4, None, False),
     ([1, 1, 0, 0], [3, 2, -2, -3], 0.5, True)],
)  # fmt: skip
def test_length_control_where_little_is_known(
    values: list[float], gaps: list[float], value: float | str | None, has_error: bool
) -> None:
    found = length_controlled_minimal(values, gaps)
    if value == "high":
        assert found.value is not None
        assert found.value > 0.9
    else:
        assert found.value == (None if value is None else pytest.approx(value))
    assert (found.stderr is not None) == has_error


# What counts.


def one_pair(*said: str, form: str = "letter") -> Compared:
    answers = iter(said)
    (found,) = Judge(ScriptedGenerator(lambda *_: next(answers)), form=form).compare(  # type: ignore[arg-type]
        [Pair("1", "question", "one", b="two")]
    )
    return found


@pytest.mark.parametrize(
    ("said", "winner"),
    [(("A", "B"), "a"), (("B", "A"), "b"), (("A", "A"), "tie"), (("B", "B"), "tie"), (("C", "C"), "tie"),
     (("A", "C"), "tie"), (("C", "A"), "tie"), (("A.", "**B**"), "a"), (("A", "I like B"), None), (("?", "B"), None)],
)  # fmt: skip
def test_both_orders_decide_and_disagreement_is_a_tie(said: tuple[str, str], winner: str | None) -> None:
    assert one_pair(*said).winner == winner


def test_what_is_no_verdict_is_neither_tie_nor_loss_and_is_counted() -> None:
    answers = iter(["A", "B", "both are good", "B", "A", "", "B", "A"])
    found = Judge(ScriptedGenerator(lambda *_: next(answers)), form="letter").compare(
        [Pair(str(i), "question", "one", b="two") for i in range(4)]
    )
    figures = compare_figures(found)
    assert (figures.wins, figures.ties, figures.losses, figures.unparsed) == (1, 0, 1, 2)
    assert figures.failures == {"unparsed": 1, "empty": 1}
    assert figures.win_rate == Rate.of([1.0, 0.0])


@pytest.mark.parametrize(
    ("text", "form", "place"),
    [(" B\n", "letter", "second"), ("(A)", "letter", "first"), ("AB", "letter", None), ("a", "letter", None),
     ("Answer A", "letter", None), ("A or B", "letter", None), ('{"reason": "x", "verdict": "C"}', "json", "tie"),
     ('{"verdict": "D"}', "json", None), ("A", "json", None), ('["A"]', "json", None)],
)  # fmt: skip
def test_a_verdict_is_read_strictly(text: str, form: str, place: str | None) -> None:
    assert read_comparison(text, form) == place  # type: ignore[arg-type]


def test_scores_are_whole_numbers_on_the_scale() -> None:
    rubric = Rubric({"right": "Is it right?", "kind": "Is it kind?"})
    read = [
        read_scores(text, "json", rubric, ["right", "kind"])
        for text in ('{"right": 5, "kind": 1}', '{"right": 6, "kind": 1}', '{"right": 5}', '{"right": true, "kind": 1}')
    ]
    assert read == [{"right": 5, "kind": 1}, None, None, None]
    assert [read_scores(text, "letter", rubric, ["kind"]) for text in ("4", " 4.", "9", "-1", "4 of 5", "x")] == [
        {"kind": 4}, {"kind": 4}, None, None, None, None,
    ]  # fmt: skip


def test_a_judge_that_is_broken_off_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    calls = 0

    def script(turns: object, seed: int) -> str:
        nonlocal calls
        calls += 1
        return "A"

    pairs = pairs_of(1, 10)
    with ScriptedGenerator(script, ledger=Ledger(tmp_path / "l.jsonl"), budget=Budget(requests=7)) as generator:
        first = compare_figures(judged(generator, pairs))
    assert (first.items, first.ties, first.unasked, first.unparsed) == (10, 3, 7, 0)
    with ScriptedGenerator(script, ledger=Ledger(tmp_path / "l.jsonl")) as generator:
        assert compare_figures(judged(generator, pairs)).ties == 10
    assert calls == 20


def test_kappa_is_that_of_a_table_by_hand() -> None:
    """Cohen 1960's form: p = 0.7, chance 0.5·0.6 + 0.5·0.4 = 0.5, so 0.4; weighted with two steps it is the same."""
    one = ["a"] * 25 + ["b"] * 25
    other = ["a"] * 20 + ["b"] * 5 + ["a"] * 10 + ["b"] * 15
    found = kappa(one, other)
    assert found.value == pytest.approx(0.4)
    assert found.stderr == pytest.approx(math.sqrt(0.7 * 0.3 / 50) / 0.5)
    assert kappa(one, other, steps=["a", "b"]).value == pytest.approx(0.4)
    assert kappa(["a"], ["a"]).value is None
    figures = compare_figures([one_pair("A", "B"), one_pair("A", "A")], labels={"1": "a"}, own="b")
    assert figures.agreement is not None
    assert figures.agreement.value == 0.5
    assert figures.own is not None
    assert figures.own.value == 0.25


# Prompts, rubrics, rewards.


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("form", ["json", "letter"])
def test_prompts_hold_the_question_both_answers_and_the_criteria(language: str, form: str) -> None:
    rubric = Rubric({"right": "Is it right?"}, (0, 7))
    judge = Judge(ScriptedGenerator(lambda *_: ""), JudgePrompts.read(language), rubric=rubric, form=form)  # type: ignore[arg-type]
    pair = Pair("1", "the {{question}}", "one {% x %}", b="", reference="known")
    first, second = (one.turns[0].content for one in judge.comparison_requests([pair]))
    for part in ("the {{question}}", "one {% x %}", "Is it right?", "known"):
        assert part in first
        assert part in second
    assert first.index("one {% x %}") < second.index("one {% x %}")
    assert ("empty" in first) if language == "en" else ("空的" in first)
    (scoring,) = (one.turns[0].content for one in judge.score_requests([pair]))
    for part in ("the {{question}}", "one {% x %}", "Is it right?", "known", "0", "7"):
        assert part in scoring
    assert ("JSON" in scoring) == (form == "json")


def test_a_prompt_of_a_users_own_takes_the_place_of_ours_and_its_mistakes_are_named(tmp_path: Path) -> None:
    from weft.evaluate.judge.prompts import copy_prompts

    copy_prompts(tmp_path / "mine")
    own = tmp_path / "mine" / "compare.en.jinja"
    own.write_text("Which? {{ first }} {{ second }}")
    assert JudgePrompts.read("en", tmp_path / "mine").render("compare", {"first": "x", "second": "y"}) == "Which? x y"
    for text in ("line\n{% if %}", "{{ 'x' * 10**9 }}", "{% for x in range(10**9) %}{% endfor %}", " "):
        own.write_text(text)
        with pytest.raises(UserError, match=r"compare\.en\.jinja"):
            JudgePrompts.read("en", tmp_path / "mine").render("compare", {})
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no prompt of a judge"):
        JudgePrompts.read("en", tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "said"),
    [("criteria: {}", "at least one"), ("criteria: {a: b}\nscale: [5, 1]", "lower one first"),
     ("criteria: {a: b}\nscal: [1, 5]", "Did you mean 'scale'"), ("criteria: {reason: b}", "reason"),
     ("criteria: {a: 3}", "criteria: a"), ("- a", "an object"), ("criteria: {a: b}\nscale: [1]", "two whole numbers")],
)  # fmt: skip
def test_a_rubric_that_is_none_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        Rubric.read(tmp_path / "r.yaml")
    assert "r.yaml" in str(caught.value)


def test_a_judge_is_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.rewards.registry import REWARDS, Rewarder, RewardSettings, register_reward

    def script(turns: Sequence[Message], _: int) -> str:
        return "4" if "good" in turns[-1].content else "hm"

    judge = Judge(ScriptedGenerator(script), rubric=Rubric({"right": "Is it right?"}), form="letter")
    register_reward("planted_judge")(JudgeReward(judge))
    try:
        settings = [RewardSettings.of("planted_judge")]
        found = Rewarder(settings, {})(["q", "q"], ["good", "bad"], answer=["x", None])
    finally:
        del REWARDS["planted_judge"]
    assert found.totals == [0.75, None]
    assert not found.failures


def test_the_json_form_is_held_to_its_schema() -> None:
    answers = iter([json.dumps({"reason": "x", "verdict": "A"}), json.dumps({"verdict": "B"})])
    (found,) = Judge(ScriptedGenerator(lambda *_: next(answers))).compare([Pair("1", "q", "one", b="two")])
    assert found.winner is None
    assert found.failures == ("", "wrong_schema")
