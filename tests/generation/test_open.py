"""What an opened folder tells whoever asks it: names, room for an answer, tokens that end one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests import kit

from weft.data import Message
from weft.errors import UserError
from weft.generation.open import open_target
from weft.generation.target import Target


@pytest.fixture(scope="module")
def opened(tiny_llama_dir: Path) -> Iterator[Target]:
    """The plain model, with an adapter of five virtual tokens put on."""
    found = open_target(tiny_llama_dir)
    found.adapters.add("mine", kit.method_config("prompt_tuning"))
    yield replace(found, names=("mine",))
    found.close()


def test_the_base_has_a_name_of_its_own(opened: Target) -> None:
    assert opened.adapter(None) is opened.adapter("base") is None
    assert opened.adapter("mine") == "mine"
    with pytest.raises(UserError, match="no adapter named 'other'"):
        opened.adapter("other")


def test_room_for_an_answer(opened: Target) -> None:
    """Of 256 positions: what was wanted, or what is left; learned tokens take theirs."""
    assert opened.room(100, None, 50) == 50
    assert opened.room(100, None, None) == 156
    assert opened.room(100, "mine", None) == 151
    assert opened.room(251, None, 9, clip=True) == 5
    for length, adapter, wanted in ((250, None, 7), (249, "mine", 3), (256, None, None)):
        with pytest.raises(UserError, match=f"{length} tokens.* of the model's 256 positions leave no room"):
            opened.room(length, adapter, wanted)


def test_a_question_is_a_conversation_and_raw_text_is_not(opened: Target) -> None:
    assert opened.prompt_ids("one") == opened.prompt_ids([Message("user", "one")])
    raw = opened.prompt_ids("one", raw=True)
    assert opened.base.tokenizer.decode(raw) == "one"
    assert len(raw) < len(opened.prompt_ids("one"))


def test_every_token_that_ends_an_answer(opened: Target) -> None:
    assert opened.stop_ids == {opened.base.tokenizer.eos_token_id}
    opened.base.model.generation_config.eos_token_id = [7, opened.base.tokenizer.eos_token_id]
    assert opened.stop_ids == {7, opened.base.tokenizer.eos_token_id}
