"""Records that say which tokens are learned: ids with labels, and segments; how they are rendered."""

from __future__ import annotations

from typing import Any

import pytest
from tests.kit.tokenizers import byte_tokenizer, learned, space_tokenizer

from weft.data import SOFT, Record, Renderer, Segments, TokenisedText, load_samples, to_example
from weft.errors import UserError


def read(fields: dict[str, Any]) -> Any:
    return to_example(Record(fields, "d.json:7"))


def test_tokenised_records_are_taken_as_they_stand() -> None:
    example = read({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]})
    assert example == TokenisedText((5, 6, 7, 8), (-100, -100, 7, 8), "d.json:7")
    sample = Renderer(byte_tokenizer(adds_bos=True)).sample(example)
    assert (sample.input_ids, sample.weights, sample.answer) == ([5, 6, 7, 8], [0.0, 0.0, 1.0, 1.0], None)


def test_the_first_token_is_never_learned() -> None:
    sample = Renderer(byte_tokenizer()).sample(read({"input_ids": [5, 6], "labels": [5, 6]}))
    assert sample.weights == [0.0, 1.0]


def test_padding_is_taken_off() -> None:
    ids, labels, mask = [0, 5, 6, 0, 0], [-100, -100, 6, -100, -100], [0, 1, 1, False, False]
    example = read({"input_ids": ids, "labels": labels, "attention_mask": mask})
    assert (example.input_ids, example.labels) == ((5, 6), (-100, 6))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, "equally long.*2, 1 and 2"),
        ({"input_ids": [], "labels": []}, "1 or more"),
        ({"input_ids": [1, 2], "labels": [-100, 1]}, "place 1 the id is 2 and the label 1"),
        ({"input_ids": [-1], "labels": [-1]}, "ids are 0 or more"),
        ({"input_ids": [1.0], "labels": [1]}, "'input_ids' must be a list of integers"),
        ({"input_ids": [True], "labels": [1]}, "'input_ids' must be a list of integers"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, "'attention_mask' is 0 at place 1"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 2]}, "'attention_mask' is 2 at place 1"),
        ({"input_ids": [1, 2, 3], "labels": [1, -100, 3], "attention_mask": [1, 0, 1]}, "in one stretch"),
        ({"input_ids": [1], "labels": [-100], "attention_mask": [0]}, "in one stretch"),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "lacks 'labels'"),
        ({"segments": [{"text": "a", "label": False}]}, "no segment is learned"),
        ({"segments": [{"text": "a", "label": 1}]}, "segment 1 must be an object"),
        ({"segments": [{"text": "a", "label": True}, "b"]}, "segment 2 must be an object"),
    ],
)
def test_what_is_wrong(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part) as error:
        read(fields)
    assert str(error.value).startswith("d.json:7: ")


def test_ids_of_another_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    assert Renderer(tokenizer).sample(read({"input_ids": [1, size - 1], "labels": [-100, size - 1]})).weights[1] == 1.0
    with pytest.raises(UserError, match=rf"d\.json:7: 'input_ids' holds {size} at place 1"):
        Renderer(tokenizer).sample(read({"input_ids": [1, size], "labels": [-100, size]}))


def test_nothing_learned_and_too_long() -> None:
    renderer = Renderer(byte_tokenizer(), max_length=3)
    with pytest.raises(UserError, match=r"d\.json:7: nothing of this record would be learned"):
        renderer.sample(read({"input_ids": [1, 2], "labels": [1, -100]}))
    with pytest.raises(UserError, match="4 tokens long"):
        renderer.sample(read({"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}))


def segments(*pieces: tuple[str, bool]) -> Segments:
    return read({"segments": [{"text": text, "label": label} for text, label in pieces]})


@pytest.mark.parametrize("adds_bos", [False, True])
def test_segments(adds_bos: bool) -> None:
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    sample = Renderer(tokenizer).sample(segments(("<|im_start|>q\n", False), ("a</s>", True), ("\nr", False)))
    assert tokenizer.decode(sample.input_ids) == ("<s>" if adds_bos else "") + "<|im_start|>q\na</s>\nr"
    assert learned(tokenizer, sample) == ["a</s>"]
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in sample.input_ids  # here the text is the template


def test_segments_have_one_bos_and_no_made_up_spaces() -> None:
    tokenizer = space_tokenizer()
    sample = Renderer(tokenizer).sample(segments(("<s>ab", False), ("a</s>", True)))
    assert tokenizer.convert_ids_to_tokens(sample.input_ids) == ["<s>", "a", "b", "a", "</s>"]


def test_weft_s_own_marks_in_segments_are_text() -> None:
    tokenizer = byte_tokenizer()
    odd = f"x{SOFT}y\ufdd0999\ufdd1z"
    sample = Renderer(tokenizer).sample(segments((odd, False), ("a", True)))
    assert tokenizer.decode(sample.input_ids) == odd + "a"
    assert sample.slots == ()


def test_seq2seq_refuses_both() -> None:
    with pytest.raises(UserError, match="Segments holds no question and answer"):
        Renderer(byte_tokenizer()).seq2seq(segments(("a", True)))


def test_files_of_them_are_loaded(tmp_path: Any) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"input_ids": [1, 2], "labels": [-100, 2]}\n{"segments": [{"text": "ab", "label": true}]}\n')
    samples = load_samples(path, Renderer(byte_tokenizer()))
    assert [sample.weights for sample in samples] == [[0.0, 1.0], [0.0, 1.0]]


def test_the_real_ones_equal_their_text(shared: Any) -> None:
    """axolotl's tokens of a conversation, in Llama 2's tokenizer: what is learned holds no question."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2")
    name = "axolotl_conversation.tokenized_llama2chat.json"
    sample = load_samples(shared / "formats" / name, Renderer(tokenizer))[0]
    assert sample.input_ids[0] == tokenizer.bos_token_id
    assert len(sample.input_ids) < 4096  # its padding is gone
    stretches = learned(tokenizer, sample)
    assert len(stretches) > 1
    assert all("[INST]" not in text for text in stretches)
