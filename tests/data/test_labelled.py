"""Classification data: which columns are read, which number a label gets, how texts are encoded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.kit.tokenizers import CHATML, bert_tokenizer, byte_tokenizer, t5_tokenizer
from transformers import AutoTokenizer

from weft.data import SOFT, Renderer, load_labelled
from weft.errors import UserError

BYTES, BERT = byte_tokenizer(None), bert_tokenizer()


def load(tmp_path: Path, text: str, name: str = "d.tsv", renderer: Renderer | None = None, **options: Any) -> Any:
    """Per record the decoded text and the label's number, and the labels."""
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    renderer = renderer or Renderer(BYTES)
    samples, labels = load_labelled(path, renderer, **options)
    for sample in samples:
        assert len(sample.weights) == len(sample.input_ids)
        assert not any(sample.weights)
        assert not sample.target_ids
        assert sample.answer is None
        assert sample.source.startswith(f"{path}:")
    return [(renderer.tokenizer.decode(sample.input_ids), sample.label) for sample in samples], labels


@pytest.mark.parametrize(
    ("name", "text", "texts"),
    [
        ("sst.tsv", "sentence\tlabel\na b\t1\nc\t0\n", ["a b", "c"]),
        ("rte.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n1\tc\td\t0\n", ["a\nb", "c\nd"]),
        ("qnli.tsv", "index\tquestion\tsentence\tlabel\n0\ta\tb\t1\n1\tc\td\t0\n", ["a\nb", "c\nd"]),
        ("qqp.csv", "id,question1,question2,is_duplicate\n0,a,b,1\n1,c,,0\n", ["a\nb", "c\n"]),
        ("mrpc.tsv", '\ufeffQuality\t#1 ID\t#1 String\t#2 String\n1\t7\t"a\tb\n0\t8\tc\td\n', ['"a\nb', "c\nd"]),
        ("cola.tsv", "gj04\t1\t\ta\ngj04\t0\t?*\tc\n", ["a", "c"]),
        ("plain.tsv", "a b\t1\nc\t0\n", ["a b", "c"]),
        ("plain.csv", '1,"a, ""b"""\n0,c\n', ['a, "b"', "c"]),
        ("imdb.csv", "Review,Sentiment\na,1\nc,0\n", ["a", "c"]),
        ("d.jsonl", '{"text": "a", "label": 1, "idx": 0}\n{"text": "c", "label": 0.0}\n', ["a", "c"]),
        ("d.json", '[{"premise": "a", "hypothesis": "b", "label": 1},\n{"premise": "c", "hypothesis": "d", "label":0}]',
         ["a\nb", "c\nd"]),
    ],
)  # fmt: skip
def test_usual_files(tmp_path: Path, name: str, text: str, texts: list[str]) -> None:
    assert load(tmp_path, text, name) == ([(texts[0], 1), (texts[1], 0)], ("0", "1"))


def test_columns_may_be_named(tmp_path: Path) -> None:
    text = "title,text,kind,label\na,b,x,0\nc,d,y,1\n"
    assert load(tmp_path, text, "d.csv", label_column="kind") == ([("b", 0), ("d", 1)], ("x", "y"))
    both = load(tmp_path, text, "d.csv", text_columns=["title", "text"], label_column="kind", pair_separator=" | ")
    assert both[0] == [("a | b", 0), ("c | d", 1)]
    assert load(tmp_path, text, "d.csv", text_columns=["title"], label_column="text")[1] == ("b", "d")
    cola = load(tmp_path, "s\t1\t\ta\ns\t0\t*\tc\n", text_columns=["sentence"], label_column="label")
    assert cola[0] == [("a", 1), ("c", 0)]


def test_labels_and_limit(tmp_path: Path) -> None:
    rows = "text\tlabel\n" + "".join(f"a\t{label}\n" for label in ("10", "9", " -1 ", "9"))
    assert load(tmp_path, rows) == ([("a", 2), ("a", 1), ("a", 0), ("a", 1)], ("-1", "9", "10"))
    assert load(tmp_path, rows, limit=1) == ([("a", 2)], ("-1", "9", "10"))  # the labels do not hang on the limit
    assert load(tmp_path, rows, limit=2, labels=["9", "10", "7"]) == ([("a", 1), ("a", 0)], ("9", "10", "7"))
    rows = '{"text": "a", "label": true}\n{"text": "b", "label": false}\n'
    assert load(tmp_path, rows, "d.jsonl") == ([("a", 1), ("b", 0)], ("false", "true"))


NAMES = st.sampled_from(["yes", "no", "maybe", "1", "2", "10", "-3", "Z"])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(st.text(alphabet="ab<>/s ", max_size=8), NAMES), min_size=2, max_size=12))
def test_property_labels_do_not_hang_on_the_order(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    if len({label for _, label in rows}) < 2 or not all(text.strip() for text, _ in rows):
        return
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    loaded, labels = load(tmp_path, "\n".join(lines), "d.jsonl")
    assert set(labels) == {label for _, label in rows}
    assert [(text, labels[number]) for text, number in loaded] == rows
    again, same = load(tmp_path, "\n".join(lines[::-1]), "d.jsonl")
    assert (same, again) == (labels, loaded[::-1])


def test_encoders_use_their_own_special_tokens(tmp_path: Path) -> None:
    path = tmp_path / "d.tsv"
    path.write_text("sentence1\tsentence2\tlabel\na b\tc\t1\na [SEP]\tc\t0\n")
    (first, second), _ = load_labelled(path, Renderer(BERT))
    assert BERT.decode(first.input_ids) == "[CLS] a b [SEP] c [SEP]"
    assert first.token_types == (0, 0, 0, 0, 1, 1)
    assert second.input_ids.count(BERT.sep_token_id) == 2  # a typed [SEP] is no separator
    assert load_labelled(path, Renderer(bert_tokenizer(types=False)))[0][0].token_types == ()
    (first, _), _ = load_labelled(path, Renderer(BERT), text_columns=["sentence1"])
    assert BERT.decode(first.input_ids) == "[CLS] a b [SEP]"
    assert first.token_types == ()
    (first, _), _ = load_labelled(path, Renderer(BERT), encoder=False)
    assert BERT.decode(first.input_ids) == "a b c"
    t5 = t5_tokenizer()
    assert t5.decode(load_labelled(path, Renderer(t5), text_columns=["sentence2"])[0][0].input_ids) == "c</s>"


def test_decoders_get_one_bos_and_no_end(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    loaded, _ = load(tmp_path, "text\tlabel\na</s>\t1\nc\t0\n", renderer=Renderer(tokenizer))
    assert loaded == [("<s>a</s>", 1), ("<s>c", 0)]
    samples, _ = load_labelled(tmp_path / "d.tsv", Renderer(tokenizer))
    assert tokenizer.eos_token_id not in samples[0].input_ids


def test_as_chat(tmp_path: Path) -> None:
    renderer = Renderer(BYTES, chat_template=CHATML + SOFT)
    loaded, _ = load(tmp_path, "text\tlabel\na\t1\nc\t0\n", renderer=renderer, as_chat=True)
    assert loaded[0][0] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    samples, _ = load_labelled(tmp_path / "d.tsv", renderer, as_chat=True)
    assert samples[0].slots == (len(samples[0].input_ids),)  # after the last token
    with pytest.raises(UserError, match="exclude each other"):
        load_labelled(tmp_path / "d.tsv", renderer, as_chat=True, encoder=True)
    refusing = Renderer(BYTES, chat_template="{{ raise_exception('no') }}")
    with pytest.raises(UserError, match=r"d\.tsv:2: the chat template refuses"):
        load_labelled(tmp_path / "d.tsv", refusing, as_chat=True)


def test_too_long(tmp_path: Path) -> None:
    path = tmp_path / "d.tsv"
    path.write_text("sentence1\tsentence2\tlabel\na b a b a b\tc d\t1\na\tc\t0\n")
    for tokenizer, length in ((BYTES, 13), (BERT, 11)):
        with pytest.raises(UserError, match=rf"d\.tsv:2: the record is {length} tokens long, max_length is 7"):
            load_labelled(path, Renderer(tokenizer, max_length=7))
    (cut, _), _ = load_labelled(path, Renderer(BERT, max_length=7, truncate=True))
    assert BERT.decode(cut.input_ids) == "[CLS] a b [SEP] c d [SEP]"  # the special tokens stay
    assert cut.token_types == (0, 0, 0, 0, 1, 1, 1)
    (cut, _), _ = load_labelled(path, Renderer(BYTES, max_length=7, truncate=True))
    assert BYTES.decode(cut.input_ids) == "a b a b a"
    with pytest.raises(UserError, match=r"d\.tsv:2: max_length 4 leaves no room"):
        load_labelled(path, Renderer(BERT, max_length=4, truncate=True))


@pytest.mark.parametrize(
    ("text", "options", "parts"),
    [
        ("body\tlabel\na\t1\n", {}, [":2:", "no column has a usual name of a text", "'body', 'label'", "text_columns"]),
        ("text\tsentence\tlabel\na\tb\t1\n", {}, [":2:", "more than one column could be the text", "'text'"]),
        ("sentence1\tsentence2\tscore\na\tb\t1\n", {}, ["no column has a usual name of a label", "label_column"]),
        ("text\tlabel\tclass\na\tb\t1\n", {}, ["more than one column could be the label", "'class'"]),
        ("a\tb\t1\nc\td\t0\n", {}, ["header row"]),
        ("text\tlabel\na\t1\n", {"text_columns": ["txt"]}, ["no column 'txt'", "Did you mean 'text'"]),
        ("text\tlabel\na\t1\n", {"text_columns": []}, ["text_columns is []"]),
        ("text\tlabel\na\t1\n", {"text_columns": ["text"], "label_column": "text"}, ["both a text and the label"]),
        ("text\tlabel\na\tx\nb\tz\n", {"labels": ["x", "y"]}, [":3:", "'z' is none of the labels x, y"]),
        ("text\tlabel\na\tx\nb\tx\n", {}, [":2:", "every record has the label 'x'"]),
        ("text\tlabel\na\t1.5\nb\t2\n", {}, [":2:", "'label' is 1.5", "score"]),
        ("text\tlabel\na\t1\nb\t\n", {}, [":3:", "'label' must be a label", "''"]),
        ("text\tlabel\na\t1\n \t0\n", {}, [":3:", "'text' is empty"]),
        ("text\tlabel\na\t1\n", {"labels": ["x"]}, ["labels is ['x']", "two names"]),
        ("text\tlabel\na\t1\n", {"labels": ["x", "x"]}, ["each once"]),
    ],
)
def test_errors(tmp_path: Path, text: str, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, text, **options)
    for part in parts:
        assert part in str(error.value)


def test_errors_of_json_values(tmp_path: Path) -> None:
    for row, what in (
        ({"text": 3, "label": 1}, "'text' must be a string, found 3"),
        ({"label": 1}, "'text' must be a string, found None"),
        ({"text": "a", "label": None}, "'label' must be a label"),
        ({"text": "a", "label": ["x"]}, "'label' must be a label"),
    ):
        rows = [{"text": "a", "label": 0}, row]
        with pytest.raises(UserError, match=rf"d\.jsonl:2: {what}"):
            load(tmp_path, "\n".join(map(json.dumps, rows)), "d.jsonl")
    with pytest.raises(UserError, match="names 3 columns; an encoder"):
        load(tmp_path, "a,b,c,label\na,b,c,0\n", "d.csv", Renderer(BERT), text_columns=["a", "b", "c"])


@pytest.mark.long
@pytest.mark.parametrize(
    ("task", "count", "labels", "begins"),
    [
        ("RTE", {0: 146, 1: 131}, ("entailment", "not_entailment"), ["Dana Reeve, ", "\nChristopher Reeve had an acc"]),
        ("MRPC", {1: 279, 0: 129}, ("0", "1"), ["He said the ", '\n"The foodservice pie business does not fit']),
        ("CoLA", {1: 721, 0: 322}, ("0", "1"), ["The sailors rode the breeze clear of the rocks."]),
        ("SST-2", {1: 444, 0: 428}, ("0", "1"), ["one long string of cliches"]),
    ],
)
def test_real_glue(shared: Path, task: str, count: dict[int, int], labels: tuple[str, ...], begins: list[str]) -> None:
    folder = shared / "nlu" / task
    if not folder.is_dir():
        pytest.skip(f"{task} is not at {folder}")
    renderer = Renderer(AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2"))
    samples, names = load_labelled(folder / "dev.tsv", renderer)
    assert (Counter(sample.label for sample in samples), names) == (count, labels)
    text = renderer.tokenizer.decode(samples[0].input_ids)
    assert text.startswith(begins[0])
    assert begins[-1] in text
    train, _ = load_labelled(folder / "train.tsv", renderer, labels=names, limit=100)
    assert len(train) == 100
