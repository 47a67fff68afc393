"""Judged answers as samples: the prompt once, the answers behind it, cut alike, kept whole by a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import make_tokenizer

from weft.data import Renderer, Sample
from weft.data.judged import JudgedRecipe
from weft.data.pipeline import Fold, outcomes
from weft.data.problems import Problems
from weft.data.prompts import PromptRecipe
from weft.data.rendering.judged import mismatched
from weft.data.settings import ReadSettings
from weft.data.store import SampleStore
from weft.data.views import each_answer, samples_of
from weft.errors import UserError

PAIR = {"prompt": "What colour is the sky?", "chosen": "The sky is blue.", "rejected": "It is green, I think."}
VERDICT = {"prompt": "Count to two.", "completion": "one, two", "label": True}
RANKED = {"instruction": "Say a number.", "output": ["five", "four", "three"]}


def read(folder: Path, *rows: dict[str, Any], judgement: Any = "preference", **options: Any) -> list[Sample]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = JudgedRecipe(renderer=Renderer(make_tokenizer(), **options), judgement=judgement)
    fold = Fold(path, recipe, Problems())
    found = [sample for sample, _ in fold.samples(outcomes(path, recipe))]
    fold.problems.check(str(path))
    recipe.end(fold)
    return found


def test_each_answer_is_what_it_would_be_alone(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    renderer = Renderer(tokenizer)
    (sample,) = read(tmp_path, PAIR)
    for one, key in zip(sample.each, ("chosen", "rejected"), strict=True):
        path = tmp_path / "alone.jsonl"
        path.write_text(json.dumps({"prompt": PAIR["prompt"], "completion": PAIR[key]}) + "\n")
        from weft.data import load_samples

        (alone,) = load_samples(path, renderer)
        end = len(one.input_ids)
        assert (one.input_ids, one.weights) == (alone.input_ids[:end], alone.weights[:end])
        assert one.answer == alone.answer
        assert one.weights[-1] == 1.0  # the end token: a policy writes nothing behind it
        assert not any(alone.weights[end:])
    prompt = sample.branches[0]
    assert sample.shared == (0, prompt)
    assert tokenizer.decode(sample.input_ids[:prompt]).count(PAIR["prompt"]) == 1
    assert not any(sample.weights[:prompt])


def test_rankings_verdicts_and_margins(tmp_path: Path) -> None:
    (ranking,) = read(tmp_path, RANKED)
    assert len(ranking.each) == 3
    good, bad = read(tmp_path, VERDICT, {**VERDICT, "completion": "two", "label": False}, judgement="kto")
    assert (good.label, bad.label, len(good.each)) == (1, 0, 1)
    (sample,) = read(tmp_path, {**PAIR, "margin": "0.5"})
    assert sample.given == 0.5


def test_a_whole_conversation_may_be_compared(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."},
             {"role": "user", "content": "And now?"}]  # fmt: skip
    row = {"messages": turns, "chosen": {"role": "assistant", "content": "We count."},
           "rejected": {"role": "assistant", "content": "We sleep."}}  # fmt: skip
    (sample,) = read(tmp_path, row)
    text = make_tokenizer().decode(sample.input_ids[: sample.branches[0]])
    assert "Good day." in text
    assert sum(map(bool, sample.each[0].weights)) == sample.each[0].weights.count(1.0) > 2


@pytest.mark.parametrize("truncation", ["right", "left", "middle"])
def test_all_answers_are_cut_alike(truncation: str, tmp_path: Path) -> None:
    long = {**PAIR, "prompt": "Write a sentence about the weather in the north. " * 3}
    (whole,) = read(tmp_path, long)
    longest = max(len(one.input_ids) for one in whole.each)
    (cut,) = read(tmp_path, long, max_length=longest - 9, truncation=truncation)
    assert cut.cut == 9
    assert max(len(one.input_ids) for one in cut.each) == longest - 9
    prompts = {tuple(one.input_ids[: cut.branches[0]]) for one in cut.each}
    assert len(prompts) == 1
    if truncation != "right":
        assert [one.input_ids[cut.branches[0] :] for one in cut.each] == [
            one.input_ids[whole.branches[0] :] for one in whole.each
        ]
    with pytest.raises(UserError, match="max_length"):
        read(tmp_path, long, max_length=longest - 9)
    kept = read(tmp_path, long, PAIR, max_length=longest - 9, truncation="drop")
    assert len(kept) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "rejected": PAIR["chosen"]}, "are the same"),
        ({**PAIR, "margin": "much"}, "'margin' must be a number"),
        ({"prompt": "a", "completion": "b"}, "supervised"),
        ({**RANKED, "output": ["five", "five"]}, "two different answers"),
        ({**PAIR, "chosen": " "}, "empty"),
    ],
)
def test_what_cannot_be_compared_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, row)


def test_all_is_no_setting_for_judged_answers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_on: all"):
        read(tmp_path, PAIR, train_on="all")


def test_a_store_gives_back_all_of_it(tmp_path: Path) -> None:
    found = [*read(tmp_path, PAIR, RANKED, {**PAIR, "margin": 2}), *read(tmp_path, VERDICT, judgement="kto"),
             *read(tmp_path, {"prompt": "a", "completion": "b", "score": 2.5}, judgement="scores")]  # fmt: skip
    store = SampleStore(memory=64)
    for sample in found:
        store.append(sample)
    assert list(store) == found
    assert store.branched().tolist() == [True] * 5
    each, owners = each_answer(samples_of(found))
    assert owners.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 4]
    assert [one.input_ids for one in each] == [one.input_ids for sample in found for one in sample.each]


def test_mismatched_answers_are_those_of_the_record_before(tmp_path: Path) -> None:
    rows = [{**VERDICT, "prompt": f"Count to {word}.", "completion": word} for word in ("one", "two", "three")]
    samples = read(tmp_path, *rows, judgement="kto")
    tokenizer = make_tokenizer()
    texts = [tokenizer.decode(one.input_ids) for one in mismatched(samples)]
    for text, (asked, said) in zip(texts, [("one", "three"), ("two", "one"), ("three", "two")], strict=True):
        assert f"Count to {asked}." in text
        assert text.count(said) == 1
    assert all(len(one.input_ids) <= 12 for one in mismatched(samples, 12))


def test_prompts_have_their_records_with_them(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    rows = [{"instruction": "1+1?", "output": "2", "level": 3}, {"messages": [{"role": "user", "content": "Hello."}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = PromptRecipe(renderer=Renderer(make_tokenizer()), settings=ReadSettings())
    fold = Fold(path, recipe, Problems())
    found = [sample for sample, _ in fold.samples(outcomes(path, recipe))]
    assert json.loads(found[0].facts) == {"answer": "2", **rows[0]}
    assert json.loads(found[1].facts)["answer"] is None
    assert not any(found[0].weights)
    store = SampleStore()
    store.append(found[0])
    assert store[0] == found[0]


def test_scores(tmp_path: Path) -> None:
    """Beside a conversation of any format; what is no number is refused by its line."""
    talk = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    first, second = read(tmp_path, {**talk, "score": 3.5}, {"instruction": "Hi.", "output": "Hm.", "score": "-1"},
                         judgement="scores")  # fmt: skip
    assert (first.given, second.given) == (3.5, -1.0)
    assert first.branches == (first.answer,)
    for row, words in (
        (talk, "'score', a number. It has messages"),
        ({**talk, "score": "good"}, "'score' must be a number, how good the answer is; found str 'good'"),
        ({**talk, "score": True}, "must be a number"),
        ({"text": "Once.", "score": 1}, "a question and its answer were expected beside 'score'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score": 1}, "preference training"),
    ):
        with pytest.raises(UserError) as error:
            read(tmp_path, {**talk, "score": 1}, row, judgement="scores")
        assert words in str(error.value)
        assert "rows.jsonl:2" in str(error.value)
