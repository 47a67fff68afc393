"""The registry of formats: every entry reads its own example; every real file is recognised; the docs list them all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.kit.tokenizers import byte_tokenizer

from weft.data import (
    FORMATS,
    EmptyAnswerError,
    Record,
    Renderer,
    describe,
    format_of,
    formats_table,
    known_formats,
    load_labelled,
    read_records,
    to_example,
)
from weft.data.formats.detect import _plan
from weft.data.formats.registry import ACCEPTS, ALIASES, SPELLINGS, TRAINING
from weft.errors import UserError


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_its_example(name: str) -> None:
    entry = FORMATS[name]
    record = Record(entry.example, "d.json:7")
    assert format_of(record) == name
    assert format_of(record, format=name) == name
    for purpose, accepted in ACCEPTS.items():
        if entry.purpose in accepted:
            example = to_example(record, purpose=purpose)
            assert example.source == "d.json:7"
            assert "d.json:7" in describe(example)
        else:
            with pytest.raises(UserError, match=r"d\.json:7: this is .* does not read it"):
                to_example(record, purpose=purpose)


def test_known_formats_lists_what_a_purpose_reads() -> None:
    assert [line.split()[0] for line in known_formats().splitlines()] == list(FORMATS)
    assert "alpaca (instruction, output" in known_formats("sft")
    assert "chosen" not in known_formats("sft")
    assert set(ALIASES.values()) <= set(FORMATS)
    names = {name for entry in FORMATS.values() for name in entry.names()}
    assert set(SPELLINGS.values()) <= names
    assert {entry.purpose for entry in FORMATS.values()} == set(TRAINING)


def test_the_docs_hold_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert formats_table() in text, (
        'docs/data.md: put in what `python -c "from weft.data import formats_table; print(formats_table())"` prints'
    )


def test_detection_is_done_once_per_set_of_fields() -> None:
    _plan.cache_clear()
    for number in range(1000):
        to_example(Record({"instruction": "i", "output": "o", "input": None if number % 2 else "x"}, "d:1"))
    assert _plan.cache_info().misses == 2


def test_an_unknown_purpose() -> None:
    with pytest.raises(UserError, match=r"purpose is 'sfd'.*Did you mean 'sft'"):
        to_example(Record({"text": "t"}, "d:1"), purpose="sfd")  # type: ignore[call-overload]


# ------------------------------------------------------------------------------------------------------------ real data

# file: format, records, and the lines of those that are refused one by one (empty answers, nothing to compare).
FILES: dict[str, tuple[str, int, int]] = {
    "sft/alpaca_en.json": ("alpaca", 42_148, 21),
    "sft/alpaca_gpt4_zh.json": ("alpaca", 1_000, 0),
    "sft/gsm8k_train.jsonl": ("question_answer", 7_473, 0),
    "sft/huatuo_med_zh.json": ("alpaca", 8_658, 0),
    "sft/identity.json": ("alpaca", 91, 0),
    "sft/lima.json": ("alpaca", 1_029, 0),
    "sft/oasst_zh.json": ("alpaca", 689, 0),
    "sft/openai_messages.jsonl": ("messages", 128, 0),
    "sft/toolcall_en_sharegpt.json": ("sharegpt", 300, 0),
    "preference/dpo_en.json": ("preference", 300, 0),
    "preference/kto_en.json": ("kto", 300, 0),
    "preference/oasst_zh.json": ("ranked", 775, 3),  # three whose answers are all the same
    "formats/axolotl_alpaca.json": ("alpaca", 2, 0),
    "formats/axolotl_conversation.json": ("sharegpt", 1, 0),
    "formats/axolotl_conversation.missingturns.json": ("sharegpt", 1, 1),
    "formats/axolotl_conversation.tokenized.json": ("tokenised", 1, 0),
    "formats/axolotl_conversation.tokenized_llama2chat.json": ("tokenised", 1, 0),
    "formats/litgpt_alpaca.json": ("alpaca", 23, 0),
    "formats/litgpt_dolly.json": ("dolly", 12, 0),
    "formats/torchtune_alpaca_tiny.json": ("alpaca", 100, 0),
    "formats/torchtune_chat_tiny.json": ("sharegpt", 1, 0),
    "formats/torchtune_hh_rlhf_tiny.json": ("preference", 1, 0),
    "formats/torchtune_instruct_tiny.json": ("instruct", 2, 0),
    "formats/torchtune_stack_exchange_paired_tiny.json": ("two_responses", 25, 0),
    "text/c4.jsonl": ("text", 300, 0),
    "text/tinyshakespeare.txt": ("text", 7_222, 0),  # paragraphs
    "text/wiki.txt": ("text", 1, 0),  # there is no blank line
}
LABELLED = {
    "nlu/CoLA/dev.tsv": (1_043, ("0", "1")),
    "nlu/CoLA/train.tsv": (8_551, ("0", "1")),
    "nlu/MRPC/dev.tsv": (408, ("0", "1")),
    "nlu/MRPC/train.tsv": (3_668, ("0", "1")),
    "nlu/RTE/dev.tsv": (277, ("entailment", "not_entailment")),
    "nlu/RTE/train.tsv": (2_490, ("entailment", "not_entailment")),
    "nlu/SST-2/dev.tsv": (872, ("0", "1")),
    "nlu/SST-2/train.tsv": (6_920, ("0", "1")),
}


def test_every_real_file_is_in_the_table(shared: Path) -> None:
    folders = ("sft", "preference", "formats", "text", "nlu")
    files = [path for folder in folders for path in (shared / folder).rglob("*") if path.is_file()]
    assert {str(path.relative_to(shared)) for path in files} == {*FILES, *LABELLED}


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_real_files(shared: Path, name: str) -> None:
    format, count, refused = FILES[name]
    found: Counter[str] = Counter()
    problems: list[UserError] = []
    places: list[bool] = []
    for record in read_records(shared / name):
        found[format_of(record)] += 1
        try:
            to_example(record, purpose="any")
        except UserError as error:
            problems.append(error)
            places.append(str(error).startswith(record.source))
    assert found == {format: count}
    assert all(places)
    assert all(isinstance(error, EmptyAnswerError) or "they are all the same" in str(error) for error in problems)
    assert len(problems) == refused


@pytest.mark.long
@pytest.mark.parametrize("name", LABELLED)
def test_real_labelled_files(shared: Path, name: str) -> None:
    count, labels = LABELLED[name]
    samples, names = load_labelled(shared / name, Renderer(byte_tokenizer()))
    assert (len(samples), names) == (count, labels)


@pytest.mark.parametrize("name", [name for name, (format, *_) in FILES.items() if FORMATS[format].purpose != "sft"])
def test_real_judged_files_are_refused_for_supervised_training(shared: Path, name: str) -> None:
    for record in read_records(shared / name):
        with pytest.raises(UserError, match="supervised training does not read it"):
            to_example(record)


def test_counts_by_other_means(shared: Path) -> None:
    """The counts of the table, by a plain JSON parser."""
    for name, (_, records, _) in FILES.items():
        text = (shared / name).read_text(encoding="utf-8")
        rows: Any
        try:
            rows = json.loads(text)
            rows = rows if isinstance(rows, list) else [rows]
        except ValueError:  # an object a line, whatever the suffix; or paragraphs of text
            rows = [row for row in text.split("\n\n" if name.endswith(".txt") else "\n") if row.strip()]
        assert len(rows) == records, name
    for name, (records, _) in LABELLED.items():
        rows = (shared / name).read_text(encoding="utf-8").rstrip("\n").split("\n")
        header = name.split("/")[1] in ("MRPC", "RTE")
        assert len(rows) - header == records, name
