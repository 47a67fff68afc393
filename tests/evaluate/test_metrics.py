"""Metrics on answers whose figures can be said beforehand."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from weft.errors import UserError
from weft.evaluate.metrics import METRICS, Metric, Reply
from weft.evaluate.metrics.errors import bootstrap_error, weighted_mean
from weft.evaluate.metrics.rouge import common_subsequence
from weft.objectives import class_metrics


def said(text: str | None, *references: str, **more: Any) -> Reply:
    return Reply(text, references, fields=more.pop("fields", {}), **more)


def score(metric: str, reply: Reply, **settings: Any) -> float:
    return METRICS[metric].read(settings, metric).score(reply)


def choice(logprobs: Sequence[float], choices: Sequence[str], right: int) -> Reply:
    return Reply(None, fields={}, choices=choices, right=right, logprobs=logprobs)


def test_choices_are_compared_as_they_are_by_characters_and_by_bytes() -> None:
    # Log-probabilities: -4 wins as it is; by characters (2 and 5) -9/5 wins; by bytes (6 and 5) -4/6 wins.
    reply = choice([-4.0, -9.0], ["中文", "a dog"], 0)
    assert [score(name, reply) for name in ("acc", "acc_norm", "acc_bytes")] == [1, 0, 1]


def test_of_equal_choices_the_first_counts() -> None:
    assert score("acc", choice([-2.0, -2.0], ["x", "y"], 0)) == 1
    assert score("acc", choice([-2.0, -2.0], ["x", "y"], 1)) == 0


def test_an_exact_match_folds_white_space_and_ignores_what_it_is_told_to() -> None:
    assert score("exact_match", said(" a\n b ", "a b")) == 1
    assert score("exact_match", said("A b", "a b")) == 0
    assert score("exact_match", said("A b", "a b"), ignore_case=True) == 1
    assert score("exact_match", said("a, b!", "a b"), ignore_punctuation=True) == 1
    assert score("exact_match", said("$1,000.", "so\n#### 1000"), ignore=[",", r"\$", "(?s).*#### ", r"\.$"]) == 1
    assert score("exact_match", said(None, "")) == 0  # nothing was found in the answer
    assert score("exact_match", said("y", "x", "y")) == 1  # any reference is right


@pytest.mark.parametrize(("answer", "reference", "right"), [
    ("1,000", "1000.0", 1), ("$18", "18", 1), ("-3", "3", 0), ("50%", "50", 1), ("1e3", "1000", 1),
    ("about 18", "18", 0), ("", "0", 0), ("0.1", "0.10000001", 0), ("18.", "18", 1),
])  # fmt: skip
def test_numbers_are_compared_as_numbers(answer: str, reference: str, right: float) -> None:
    assert score("numeric_match", said(answer, reference)) == right


def test_f1_counts_words_and_of_chinese_characters() -> None:
    # Two of two words are right, of three that were wanted: 2 * 2 / 5.
    assert score("f1", said("The cat sat.", "a cat sat down")) == pytest.approx(4 / 5)
    assert score("f1", said("北京市", "北京")) == pytest.approx(4 / 5)
    assert score("f1", said("", "x")) == 0


def test_rouge_by_hand() -> None:
    reply = said("the cat sat", "the cat is sat on")
    # 3 words in common of 3 and 5; 1 pair of 2 and 4; the subsequence is all 3.
    assert score("rouge1", reply) == pytest.approx(6 / 8)
    assert score("rouge2", reply) == pytest.approx(2 / 6)
    assert score("rougeL", reply) == pytest.approx(6 / 8)
    # Two characters of three stand in the same order: 2 * 2 / 6.
    assert score("rougeL", said("甲乙丙", "乙甲丙")) == pytest.approx(4 / 6)
    assert score("rouge1", said("甲乙丙", "乙甲丙")) == 1


def test_the_longest_subsequence_is_that_of_the_usual_table() -> None:
    drawn = random.Random(0)
    for _ in range(50):
        a, b = ([drawn.choice("abcd") for _ in range(drawn.randrange(70))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, one in enumerate(a, 1):
            for j, other in enumerate(b, 1):
                table[i][j] = table[i - 1][j - 1] + 1 if one == other else max(table[i - 1][j], table[i][j - 1])
        assert common_subsequence(a, b) == table[-1][-1]


def test_rouge_of_english_is_that_of_rouge_score() -> None:
    module = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    scorer = module.RougeScorer(["rouge1", "rouge2", "rougeL"])
    pairs = [("A man, a plan.", "The man had a plan; 42 of them."), ("x", "y"), ("same words", "same words")]
    for answer, reference in pairs:
        theirs = scorer.score(reference, answer)
        for name in theirs:
            assert score(name, said(answer, reference)) == pytest.approx(theirs[name].fmeasure)


def test_bleu_and_chrf_are_sacrebleus_of_the_corpus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason='sacrebleu is not installed: pip install "weft[evaluate]"')
    answers, references = ["the cat sat on a mat", "dogs bark"], ["the cat sat on the mat", "the dogs bark loudly"]
    replies = [said(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    for name, theirs in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
        metric = METRICS[name].read({}, name)
        figure = metric.figure(replies, [metric.score(reply) for reply in replies], 0)
        assert figure.value == pytest.approx(theirs(answers, [references]).score)
        assert figure.stderr is not None
    chinese = [said("今天天气很好", "今天天气不错")] * 2
    bleu = METRICS["bleu"].read({}, "bleu").figure(chinese, [0, 0], 0)
    assert bleu.value == pytest.approx(sacrebleu.corpus_bleu(
        ["今天天气很好"] * 2, [["今天天气不错"] * 2], tokenize="zh").score)  # fmt: skip


def test_a_schema_is_kept_or_not() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    assert score("json_schema", said('{"a": 1}'), schema=schema) == 1
    assert score("json_schema", said('{"a": "x"}'), schema=schema) == 0
    assert score("json_schema", said("no json"), schema=schema) == 0
    own = said('{"a": 1}', fields={"shape": '{"type": "array"}'})
    assert score("json_schema", own, schema_field="shape") == 0


def test_texts_count_by_their_length() -> None:
    replies = [
        Reply("ab", fields={}, logprobs=(-2.0,), tokens=1), Reply("中中中", fields={}, logprobs=(-30.0,), tokens=9),
    ]  # fmt: skip
    figures = {}
    for name in ("bits_per_byte", "perplexity", "loss", "byte_perplexity", "word_perplexity"):
        metric = METRICS[name].read({}, name)
        figures[name] = metric.figure(replies, [metric.score(reply) for reply in replies], 0).value
    assert figures["bits_per_byte"] == pytest.approx(32 / math.log(2) / 11)
    assert figures["loss"] == pytest.approx(3.2)
    assert figures["perplexity"] == pytest.approx(math.exp(3.2))
    assert figures["byte_perplexity"] == pytest.approx(math.exp(32 / 11))
    assert figures["word_perplexity"] == pytest.approx(math.exp(16))
    assert not METRICS["loss"].higher_is_better


def test_classes_have_the_figures_of_training_and_a_confusion() -> None:
    pairs = [("yes", "yes"), ("no", "yes"), ("no", "no"), ("yes", "no"), ("yes", "yes")]
    replies = [said(answer, right) for answer, right in pairs]
    number = {"no": 0, "yes": 1}
    theirs = class_metrics([number[a] for a, _ in pairs], [number[b] for _, b in pairs])
    for name, key in (("accuracy", "accuracy"), ("macro_f1", "macro_f1"), ("mcc", "mcc")):
        metric = METRICS[name].read({}, name)
        figure = metric.figure(replies, [metric.score(reply) for reply in replies], 0)
        assert figure.value == pytest.approx(theirs[key])
        assert figure.stderr
    # Rows are what was right: of two "no" one was called so; of three "yes" two.
    confusion = METRICS["accuracy"].read({}, "accuracy").details(replies)["confusion"]
    assert confusion == {"classes": ["no", "yes"], "counts": [[1, 1], [1, 2]]}


def test_the_error_of_a_mean_is_the_closed_form() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    mean, error = weighted_mean(values, [1] * 5)
    assert mean == 0.6
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert weighted_mean([0.5], [3]) == (0.5, None)
    assert weighted_mean([1.0, 0.0], [3, 1])[0] == 0.75


def test_a_bootstrap_finds_the_error_of_a_mean() -> None:
    drawn = random.Random(1)
    values = [drawn.gauss(0, 1) for _ in range(400)]
    found = bootstrap_error(lambda places: statistics.fmean(values[i] for i in places), 400, seed=0)
    # The error of a deviation over 1,000 samples is 1/sqrt(2,000), 2.2 %; five of these.
    assert found == pytest.approx(statistics.stdev(values) / 20, rel=0.11)
    again = bootstrap_error(lambda places: statistics.fmean(values[i] for i in places), 400, seed=0)
    assert again == found


def test_a_wrong_setting_of_a_metric_is_named() -> None:
    with pytest.raises(UserError, match=r"unknown key 'ignore_cases'. Did you mean 'ignore_case'"):
        METRICS["exact_match"].read({"ignore_cases": True}, "task x")


def test_conduct_in_a_domain_is_a_metric_by_name() -> None:
    def reply(text: str, reference: str = "") -> Reply:
        return Reply(text, (reference,), fields={"context": "The mill was built in 1,850.", "note": "It has 3 floors."})

    def metric(name: str, **settings: object) -> Metric:
        return METRICS[name].read(settings, name)

    refusal = "I can't help with that."
    assert metric("refusal").score(reply(refusal)) == 1.0
    assert metric("refusal_right").score(reply(refusal, "In 1850.")) == 0.0
    assert metric("refusal_right").score(reply(refusal, refusal)) == 1.0
    assert metric("numbers_supported").score(reply("1850, with 3 floors")) == 0.5
    assert metric("numbers_supported", context_field="note").score(reply("3 floors")) == 1.0
    assert metric("supported").score(reply("The mill was built.")) == 1.0
    style = metric("style", max_length=3, form="one_line", forbidden=["mill"])
    texts = ("In 1850.", "The mill.", "one two three four", "a\nb")
    assert [style.score(reply(text)) for text in texts] == [1, 0, 0, 0]
    with pytest.raises(UserError, match="min_length 3 is more than max_length 1"):
        metric("style", min_length=3, max_length=1)
