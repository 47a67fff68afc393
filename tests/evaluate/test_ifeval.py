"""IFEval's instructions: an answer that follows each kind, and one that does not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from weft.errors import UserError
from weft.evaluate.ifeval import CHECKS, follows, follows_loosely
from weft.evaluate.ifeval.wording import sentences
from weft.evaluate.metrics import METRICS, Reply
from weft.evaluate.metrics.instructions import instructions

SHARED = Path(os.environ.get("WEFT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
AT_LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["dog", "day"]}, "A Dog's day.", "A dog."),
    ("keywords:frequency", {**AT_LEAST, "keyword": "story", "frequency": 2}, "Story, story.", "A story."),
    ("keywords:frequency", {**LESS, "keyword": "story", "frequency": 2}, "A story.", "Story, story."),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "Rocket.", "The Rock fell."),
    ("keywords:letter_frequency", {"let_relation": "at least", "letter": "J", "let_frequency": 2}, "Jj", "j"),
    ("length_constraints:number_sentences", {**LESS, "num_sentences": 3}, "One. Two!", "One. Two! Three?"),
    ("length_constraints:number_words", {**AT_LEAST, "num_words": 3}, "one two three", "one two"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:nth_paragraph_first_word", {"first_word": "It", "num_paragraphs": 2, "nth_paragraph": 2},
     "a\n\n\"It's\" so", "it\n\nis"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] and [place]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye\nP. P. S more", "Bye\nP.S. more"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\np.s. more", "Bye"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b\n**no**", "* a"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and ** **"),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     "SECTION 1\na\nSECTION 2\nb", "SECTION 1\na"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >>\ntext"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. Yes", "Yes. Say it."),
    ("startend:end_checker", {"end_phrase": "So what?"}, 'He said "so what?"', "So what? No."),
    ("startend:quotation", {}, '"all of it"', '"some" of it'),
    ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2}, "A BIG dog",
     "a BIG dog"),
    ("punctuation:no_comma", {}, "a and b", "a, b"),
]  # fmt: skip
SPEAKING: list[tuple[str, dict[str, Any], str, str]] = [
    ("language:response_language", {"language": "de"}, "Das ist ein schöner Tag, und wir gehen in den Wald.",
     "This is a fine day and we walk to the woods."),
    ("change_case:english_capital", {}, "THIS IS A FINE DAY AND WE WALK.", "This is a fine day and we walk."),
    ("change_case:english_lowercase", {}, "this is a fine day and we walk.", "This is a fine day and we walk."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "good", "bad"), CASES)
def test_an_answer_follows_or_not(name: str, settings: dict[str, Any], good: str, bad: str) -> None:
    assert follows(good, name, settings)
    assert not follows(bad, name, settings)
    assert not follows(" ", name, settings)  # nothing follows nothing


@pytest.mark.parametrize(("name", "settings", "good", "bad"), SPEAKING)
def test_languages_are_told(name: str, settings: dict[str, Any], good: str, bad: str) -> None:
    pytest.importorskip("langdetect", reason='langdetect is not installed: pip install "weft[evaluate]"')
    assert follows(good, name, settings)
    assert not follows(bad, name, settings)


def test_all_25_kinds_are_there_and_tested() -> None:
    assert {name for name, *_ in (*CASES, *SPEAKING)} == set(CHECKS)
    assert len(CHECKS) == 25


def test_loosely_an_answer_counts_without_its_first_line_its_last_line_or_its_stars() -> None:
    quoted = 'Sure, here it is:\n"all of it"\nAnything else?'
    assert not follows(quoted, "startend:quotation", {})
    assert follows_loosely(quoted, "startend:quotation", {})
    assert follows_loosely('**"all of it"**', "startend:quotation", {})
    assert not follows_loosely('a\nb\n"c"\nd\ne', "startend:quotation", {})


@pytest.mark.parametrize(("text", "count"), [
    ("One. Two! Three?", 3), ("Mr. Smith came. He left", 2), ("He has 3.5 dogs.", 1), ("今天好。明天呢？", 2),
    ("...", 0),
])  # fmt: skip
def test_sentences_are_counted(text: str, count: int) -> None:
    assert sentences(text) == count


def test_figures_by_prompt_and_by_instruction() -> None:
    names, settings = ["punctuation:no_comma", "startend:quotation", "detectable_format:title"], [{}, {}, None]
    one = Reply('"<<a>>"', fields={"instruction_id_list": names, "kwargs": settings})
    other = Reply("a, b", fields={"instruction_id_list": names[:1], "kwargs": settings[:1]})
    strict = METRICS["prompt_level_strict_acc"].read({}, "x")
    assert [strict.score(one), strict.score(other)] == [1, 0]
    each = METRICS["inst_level_strict_acc"].read({}, "x")
    figure = each.figure([one, other], [each.score(one), each.score(other)], 0)
    assert figure.value == 3 / 4  # three of four instructions, and not the mean of 1 and 0


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(UserError, match=r"no instruction 'startend:quotations'. Did you mean 'startend:quotation'"):
        follows("x", "startend:quotations", {})


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the data at {SHARED} is not there")
def test_every_instruction_of_the_published_file_can_be_checked() -> None:
    pytest.importorskip("langdetect", reason='langdetect is not installed: pip install "weft[evaluate]"')
    lines = (SHARED / "evaluation" / "ifeval_input_data.jsonl").read_text(encoding="utf-8").splitlines()
    found = set()
    for row in map(json.loads, lines):
        for name, settings in instructions(row):
            follows("Some text that is an answer.", name, settings)
            found.add(name)
    assert found == set(CHECKS)
