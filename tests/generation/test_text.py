"""Text while it comes: what was shown is never taken back, and all of it is the whole answer's text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.tokenizers import byte_tokenizer, space_tokenizer

from weft.generation.text import TextStream, decode

BYTES, SPACES = byte_tokenizer(), space_tokenizer()


def streamed(tokenizer: object, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.flush()]


@given(st.text(max_size=12))
@settings(max_examples=60)
def test_the_pieces_are_the_text(text: str) -> None:
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    assert "".join(streamed(BYTES, ids)) == text


def test_a_character_appears_when_it_is_whole() -> None:
    ids = BYTES("a€", add_special_tokens=False)["input_ids"]
    assert streamed(BYTES, ids) == ["a", "", "", "€", ""]
    # An answer that is cut off inside one ends without it.
    assert streamed(BYTES, ids[:-1]) == ["a", "", "", ""]


@pytest.mark.parametrize("text", ["a b", " a  b ", "ab a"])
def test_spaces_are_those_of_the_whole_text(text: str) -> None:
    ids = SPACES(text, add_special_tokens=False)["input_ids"]
    assert "".join(streamed(SPACES, ids)) == decode(SPACES, ids)


def test_control_tokens_are_not_shown() -> None:
    ids = [*BYTES("hi", add_special_tokens=False)["input_ids"], BYTES.eos_token_id]
    assert "".join(streamed(BYTES, ids)) == "hi"
