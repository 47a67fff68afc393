"""Ways to ask the base: examples that are first, drawn or similar, an instruction, an instruction that was searched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
from tests.evaluate.asked import opened

from weft.errors import UserError
from weft.evaluate.baselines import Wanted, pools_of, prompting_entrants, wanted_of
from weft.evaluate.baselines.search import SearchSettings, searched
from weft.evaluate.baselines.similarity import Similarity
from weft.evaluate.prompting import Prompter
from weft.evaluate.running import EvaluationSettings, evaluate_entrants
from weft.evaluate.tasks import Exercise, Task, find_tasks
from weft.generation.target import Target


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with opened(lora=0.05) as made:
        yield made


@pytest.fixture(scope="module")
def embedded() -> tuple[Task, dict[str, list[Exercise]]]:
    named = find_tasks(["embedded"])
    pools = pools_of([Wanted("random", count=2)], named)
    task = named[0].load()
    return replace(task, exercises=task.exercises[:6]), {"embedded": list(pools["embedded"])[:200]}


def test_likeness_is_the_cosine_of_rare_words() -> None:
    found = Similarity(["the cat", "the dog", "the cat sat"]).likeness("cat")
    rare, rarer = math.log(3 / 2), math.log(3)
    assert found[0] == pytest.approx(1.0), "a word that all texts have counts nothing"
    assert found[2] == pytest.approx(rare / math.hypot(rare, rarer))
    assert 1 not in found
    chinese = Similarity(["北京的天气", "上海的人口", "天安门"]).likeness("天气怎么样")
    assert chinese[0] > chinese[2] > 0, "a pair of characters counts beside single ones"


def test_examples_are_others_than_the_question(
    target: Target, embedded: tuple[Task, dict[str, list[Exercise]]]
) -> None:
    task, pools = embedded
    pools = {"embedded": [*pools["embedded"], task.exercises[0]]}
    wanted = [wanted_of(word) for word in ("first:2", "random:2", "similar:2")]
    first, drawn, similar = (
        [entrant.frame(task, one).examples for one in task.exercises]
        for entrant in prompting_entrants(target, wanted, [task], pools, seed=1)
    )
    assert all(examples == tuple(pools["embedded"][:2]) for examples in first)
    assert len({tuple(one.prompts for one in examples) for examples in drawn}) > 1
    again = prompting_entrants(target, wanted[1:2], [task], pools, seed=1)[0]
    assert [again.frame(task, one).examples for one in task.exercises] == drawn
    for exercise, examples in zip(task.exercises, similar, strict=True):
        assert exercise.prompts not in [one.prompts for one in examples]
        likeness = Similarity([one.prompts[0] for one in pools["embedded"]]).likeness(exercise.prompts[0])
        by_prompt = {pools["embedded"][place].prompts: value for place, value in likeness.items()}
        others = [value for prompts, value in by_prompt.items() if prompts != exercise.prompts]
        assert by_prompt[examples[-1].prompts] == max(others), "the nearest stands next to the question"


def test_an_instruction_stands_before_the_question(
    target: Target, embedded: tuple[Task, dict[str, list[Exercise]]]
) -> None:
    task, _ = embedded
    (entrant,) = prompting_entrants(target, [wanted_of("instruction:Say one word.")], [task], {})
    asked = Prompter(target, task).messages(entrant.frame(task, task.exercises[0]), task.exercises[0])
    assert asked[-1].content == f"Say one word.\n\n{task.exercises[0].prompts[0]}"
    results = evaluate_entrants(target, [entrant], [task], EvaluationSettings(limit=1))
    (contestant,) = results.contestants
    assert (contestant.kind, contestant.name) == ("prompt", "base, instruction: Say one word.")
    assert contestant.facts["instruction"] == "Say one word."


def test_the_search_keeps_the_best_on_other_questions(
    target: Target, embedded: tuple[Task, dict[str, list[Exercise]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from weft.evaluate.kinds.generation import Generation

    task, pools = embedded
    asked: set[str] = set()

    def scored(self: Generation, entrant, exercise, text, turn, **more):  # type: ignore[no-untyped-def]
        asked.add(exercise.prompts[0])
        right = exercise.references[0] if entrant.frame(task, exercise).instruction.startswith("请用") else "x"
        return answered(self, entrant, exercise, right, turn, **more)

    answered = Generation._answered
    monkeypatch.setattr(Generation, "_answered", scored)
    settings = SearchSettings(proposals=2, shown=2, held_out=4)
    found = searched(target, replace(task, settings=task.settings.model_copy(update={"max_new_tokens": 2})),
                     pools["embedded"], settings)  # fmt: skip
    assert found.instruction == "请用最少的字回答。"
    assert found.tried[0] == (found.instruction, 1.0)
    assert ("", 0.0) in found.tried, "having no instruction takes part"
    assert len(asked) == 4
    assert not asked & {one.prompts[0] for one in task.exercises}, "the questions that are evaluated are not used"
    assert found.tokens > 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("similr:2", "Did you mean 'similar'"),
        ("first:0", "a number above 0"),
        ("random", "a number above 0"),
        ("instruction:", "the instruction is missing"),
    ],
)
def test_other_words_are_refused(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        wanted_of(word)


def test_too_few_examples_are_refused(target: Target, embedded: tuple[Task, dict[str, list[Exercise]]]) -> None:
    task, pools = embedded
    few = {"embedded": pools["embedded"][:3]}
    with pytest.raises(UserError, match="task embedded has 3 examples"):
        prompting_entrants(target, [wanted_of("random:4")], [task], few)
    with pytest.raises(UserError, match="6 are needed"):
        searched(target, task, few["embedded"])
