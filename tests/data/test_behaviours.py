"""Data for a domain: refusals of what lies outside, answers from passages that BM25 finds, in English and Chinese."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from weft.data.behaviours import NOT_IN_TEXT, REFUSALS, build_grounded, build_refusals, write_records
from weft.data.formats.detect import format_of, to_example
from weft.data.reading.records import read_records
from weft.data.retrieval import Index, Passage, covered, read_passages, terms
from weft.errors import UserError

WRITTEN = [text for texts in (*REFUSALS.values(), *NOT_IN_TEXT.values()) for text in texts]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(record: dict[str, Any]) -> list[str]:
    return [turn["content"] for turn in record["messages"]]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def domain(tmp_path: Path) -> tuple[Path, Path]:
    inside = [{"instruction": f"How much is item {i}?", "output": f"{i} euros"} for i in range(16)]
    outside = [f"Who wrote book {i}?" for i in range(10)] + [f"谁写了第{i}本书？" for i in range(10)]
    (tmp_path / "outside.txt").write_text("\n".join(outside) + "\n", encoding="utf-8")
    return write(tmp_path / "inside.jsonl", inside), tmp_path / "outside.txt"


def test_the_share_of_refusals_is_exact_and_each_is_in_the_language_of_its_question(domain: tuple[Path, Path]) -> None:
    records = build_refusals(*domain, share=0.2)
    refused = [turns(record) for record in records if record["refused"]]
    assert (len(records), len(refused)) == (20, 4)
    assert {answer for _, answer in refused} <= {*REFUSALS["en"], *REFUSALS["zh"]}
    assert all((answer in REFUSALS["zh"]) == question.startswith("谁") for question, answer in refused)
    assert len({question for question, _ in refused}) == 4
    kept = [turns(record) for record in records if not record["refused"]]
    assert sorted(kept) == sorted([f"How much is item {i}?", f"{i} euros"] for i in range(16))


def test_a_seed_decides_and_an_answer_of_ones_own_is_used(domain: tuple[Path, Path]) -> None:
    assert build_refusals(*domain, seed=1) == build_refusals(*domain, seed=1)
    assert build_refusals(*domain, seed=1) != build_refusals(*domain, seed=2)
    own = build_refusals(*domain, answers="No.")
    assert {turns(record)[-1] for record in own if record["refused"]} == {"No."}


def test_the_records_are_what_training_reads(domain: tuple[Path, Path], tmp_path: Path) -> None:
    records = build_refusals(*domain)
    write_records(tmp_path / "out.jsonl", records)
    read = read_records(tmp_path / "out.jsonl")
    assert {format_of(record) for record in read} == {"messages"}
    assert [[m.content for m in to_example(record).messages] for record in read] == [turns(r) for r in records]


def test_data_of_refusals_that_cannot_be_is_named(domain: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"20 questions, and a share of 0\.6 .* takes 24"):
        build_refusals(*domain, share=0.6)
    with pytest.raises(UserError, match=r"share is 1"):
        build_refusals(*domain, share=1)
    (tmp_path / "same.txt").write_text("how much is  item 3?\n")
    with pytest.raises(UserError, match=r"same\.txt:1.*is also asked inside the domain .*inside\.jsonl:4"):
        build_refusals(domain[0], tmp_path / "same.txt")
    with pytest.raises(UserError, match="needs its answer"):
        build_refusals(domain[1], domain[1])
    with pytest.raises(UserError, match=r"no text to answer .* in the language"):
        build_refusals(*domain, answers={"fr": ["Non."]}, share=0.5)


# ----------------------------------------------------------------------------------------------------------- retrieval


def test_terms_are_words_and_pairs_of_characters() -> None:
    assert terms("The CAT’s 3.14, ok.") == ["the", "cat's", "3.14", "ok"]
    assert terms("我养猫 GPT模型") == ["我养", "养猫", "gpt", "模型"]
    assert terms("猫 と") == ["猫", "と"]
    assert covered("the cat", "a cat") == 0.5
    assert covered("", "anything") == 1


def test_passages_are_paragraphs_and_long_ones_are_cut_behind_sentences(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n\n" + "A sentence of words. " * 5)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("第一句。第二句很长很长很长很长很长很长。", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("nothing")
    write(tmp_path / "c.jsonl", [{"text": "A record."}])
    found = read_passages(tmp_path, length=45)
    told = {(Path(p.source).name, p.text) for p in found}
    assert ("a.txt#1", "One.\n\nTwo.\n\nA sentence of words.") in told
    assert ("a.txt#2", "A sentence of words. A sentence of words.") in told
    assert ("c.jsonl#1", "A record.") in told
    assert all(len(p.text) <= 45 for p in found)
    (chinese,) = [p.text for p in found if "b.md" in p.source]
    assert chinese == "第一句。第二句很长很长很长很长很长很长。"
    assert read_passages(tmp_path / "sub" / "b.md", length=6)[0].text == "第一句。"
    assert "nothing" not in str(found)


def bm25(corpus: list[list[str]], asked: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Lucene's formula, as Kamphuis et al. write it, without its constant factor."""
    mean, scores = sum(map(len, corpus)) / len(corpus), []
    for document in corpus:
        counts, score = Counter(document), 0.0
        for term in asked:
            holding = sum(term in one for one in corpus)
            idf = math.log(1 + (len(corpus) - holding + 0.5) / (holding + 0.5))
            score += idf * counts[term] / (counts[term] + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


PASSAGES = [
    Passage("Ada keeps a cat in Windport.", "1"),
    Passage("Bob keeps a dog and another dog in Hillton, far away.", "2"),
    Passage("陈洁在风港住，她养了一只猫。", "3"),
    Passage("王明在山城工作，他喜欢下雨。", "4"),
]


def test_scores_are_those_of_the_formula() -> None:
    pytest.importorskip("bm25s", reason='bm25s is not installed: pip install "weft[retrieval]"')
    index = Index(PASSAGES)
    for question in ("Who keeps a dog?", "谁在风港养猫？", "Ada Ada cat"):
        asked = [term for term in terms(question) if any(term in terms(p.text) for p in PASSAGES)]
        assert index.scores(question) == pytest.approx(bm25([terms(p.text) for p in PASSAGES], asked), rel=1e-5)
    assert [p.source for p in index.search("谁住在风港？", 3)] == ["3"]
    assert [p.source for p in index.search("the dog of Bob", 1)] == ["2"]
    assert index.search("xyzzy", 3) == []


def test_what_cannot_be_looked_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no documents at"):
        read_passages(tmp_path / "nowhere")
    with pytest.raises(UserError, match="length is 0"):
        read_passages(tmp_path, length=0)
    with pytest.raises(UserError, match=r"d\.jsonl:1"):
        read_passages(write(tmp_path / "d.jsonl", [{"body": "x"}]))
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(UserError, match=r"pip install \"weft\[retrieval\]\""):
        Index(PASSAGES)


# ------------------------------------------------------------------------------------------------------------ grounded


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [
        {"instruction": "Who keeps a dog in Hillton?", "output": "Bob"},
        {"instruction": "Where is the cat of Ada?", "output": "Windport"},
        {"instruction": "陈洁在哪里住？", "output": "风港"},
        {"instruction": "王明喜欢什么？", "output": "下雨"},
        {"instruction": "Who keeps a snake?", "output": "Zoe"},
    ]
    return write(tmp_path / "q.jsonl", rows)


def test_an_answer_stands_in_the_passages_unless_it_is_to_be_missing(questions: Path) -> None:
    pytest.importorskip("bm25s", reason='bm25s is not installed: pip install "weft[retrieval]"')
    found = build_grounded(questions, PASSAGES, count=2, unanswerable=0.25)
    assert [Path(source).name for source in found.left_out] == ["q.jsonl:5"], "no passage tells of a snake"
    assert len(found.records) == 4
    answers = {"dog": "Bob", "Ada": "Windport", "陈洁": "风港", "王明": "下雨"}
    for record in found.records:
        asked, said = turns(record)
        answer = next(value for key, value in answers.items() if key in asked.rsplit("\n", 1)[1])
        assert record["context"] in asked
        assert record["answerable"] == (covered(answer, record["context"]) == 1)
        assert said == (answer if record["answerable"] else NOT_IN_TEXT["zh" if "问题" in asked else "en"][0])
        assert 1 <= len(record["sources"]) <= 2
    assert sum(not record["answerable"] for record in found.records) == 1


def test_the_passage_with_the_answer_takes_the_place_of_the_last_where_it_is_not_among_the_best(tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason='bm25s is not installed: pip install "weft[retrieval]"')
    near = [Passage("Who keeps a snake in the town? Nobody knows.", "near"), Passage("Zoe keeps it.", "far")]
    questions = write(tmp_path / "q.jsonl", [{"instruction": "Who keeps a snake in the town?", "output": "Zoe"}])
    assert [p.source for p in Index(near).search("Who keeps a snake in the town?", 2)] == ["near", "far"]
    (record,) = build_grounded(questions, near, count=1, unanswerable=0).records
    assert record["sources"] == ["far"]
    (record,) = build_grounded(questions, near * 3, count=3, unanswerable=0).records
    assert sorted(record["sources"]) == ["far", "near", "near"], "in any order"


def test_grounded_records_are_what_training_reads(questions: Path, tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason='bm25s is not installed: pip install "weft[retrieval]"')
    found = build_grounded(questions, PASSAGES, template="{context}|{question}|{not_in_text}", not_in_text="No.")
    write_records(tmp_path / "out.jsonl", found.records)
    (first, *_) = read_records(tmp_path / "out.jsonl")
    assert format_of(first) == "messages"
    assert to_example(first).messages[0].content.endswith("|Who keeps a dog in Hillton?|No.")
    assert found == build_grounded(
        questions, PASSAGES, template="{context}|{question}|{not_in_text}", not_in_text="No."
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 0}, "count is at least 1"),
        ({"unanswerable": 1.0}, "unanswerable lies in"),
        ({"support": 0.0}, "support in"),
        ({"template": "{question}"}, "no {context}"),
        ({"passages": PASSAGES[:1], "questions": "snake"}, "for none of 1 questions does a passage hold the answer"),
    ],
)
def test_grounded_data_that_cannot_be_is_named(
    questions: Path, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    pytest.importorskip("bm25s", reason='bm25s is not installed: pip install "weft[retrieval]"')
    given = dict(wrong)
    if given.pop("questions", None):
        questions = write(tmp_path / "snake.jsonl", [{"instruction": "Who keeps a snake?", "output": "Zoe"}])
    with pytest.raises(UserError, match=message):
        build_grounded(questions, given.pop("passages", PASSAGES), **given)
