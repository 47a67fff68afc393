"""Tokens with the text that each adds: together they are the text, whatever the tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import make_tokenizer
from tests.kit import tokenizers as kit

from weft.data import Renderer
from weft.data.auditing.pieces import decoded, pieces, visible

BYTES, SPACES = make_tokenizer(), kit.space_tokenizer()


@settings(deadline=None, max_examples=150)
@given(st.text(alphabet="ab \n你好😀é\u200d\ufffd", max_size=30))
def test_texts_add_up(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert "".join(part for part, _ in decoded(BYTES, ids)) == text


def test_sentencepiece_keeps_its_spaces() -> None:
    ids = SPACES("the sea is a b", add_special_tokens=False)["input_ids"]
    found = [part for part, _ in decoded(SPACES, ids)]
    assert "".join(found) == SPACES.decode(ids)
    assert len(found) == len(ids)


def test_a_character_of_several_tokens() -> None:
    ids = BYTES("好")["input_ids"]
    assert len(ids) == 3
    assert decoded(BYTES, ids) == [("", True), ("", True), ("好", True)]
    assert "".join(part for part, _ in decoded(BYTES, ids[:2])) == "\ufffd"  # cut in the middle


@pytest.mark.parametrize("tokenizer", [BYTES, kit.byte_tokenizer(adds_bos=True)])
def test_pieces_of_a_sample(tokenizer: Any) -> None:
    sample = Renderer(tokenizer).sample(kit.talk("hi", "yes"))
    found = pieces(tokenizer, sample)
    assert [piece.id for piece in found] == sample.input_ids
    assert [piece.weight for piece in found] == sample.weights
    assert "".join(piece.text for piece in found) == tokenizer.decode(sample.input_ids)
    assert [piece.special for piece in found if piece.text == tokenizer.eos_token][-1]


def test_visible() -> None:
    assert visible("a\n\tb\x1b[0m\u200b\u202e 你　好\xa0é") == "a⏎⇥b⟨001B⟩[0m⟨200B⟩⟨202E⟩ 你　好⟨00A0⟩é"
