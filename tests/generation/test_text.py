"""Text while it comes: what was shown is never taken back, and all of it is the whole answer's text."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.tokenizers import bert_tokenizer, byte_tokenizer, fallback_tokenizer, space_tokenizer

from weft.assets import __file__ as assets
from weft.errors import UserError
from weft.generation.text import StopStrings, TextStream, decode

BYTES, SPACES = byte_tokenizer(), space_tokenizer()
SHARED = Path(os.environ.get("WEFT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
KINDS: dict[str, Callable[[], Any] | Path] = {
    "bytes": byte_tokenizer,
    "spaces": space_tokenizer,
    "fallback": fallback_tokenizer,
    "words": bert_tokenizer,
    "tiny-llama": Path(assets).parent / "tiny-llama",
    **{name: SHARED / "tokenizers" / name for name in ("llama2", "minimind", "gpt2")},
    "stories260K": SHARED / "models" / "stories260K",
}
# Texts whose signs take several tokens, or join.
TEXTS = st.one_of(
    st.text(max_size=12),
    st.text(alphabet="ab  \n.,'织机中文é🧵👨‍👩‍👧🇨🇳\u0301\u200d", max_size=20),
)


@cache
def tokenizer_of(kind: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    found = KINDS[kind]
    if not isinstance(found, Path):
        return found()
    if not (found / "tokenizer.json").is_file():
        pytest.skip(f"{found} is not there")
    return PreTrainedTokenizerFast(tokenizer_file=str(found / "tokenizer.json"))


def streamed(tokenizer: object, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("kind", KINDS)
@given(TEXTS, st.data())
@settings(max_examples=40)
def test_the_pieces_are_the_text(kind: str, text: str, data: st.DataObject) -> None:
    """Also of an answer that ends at any token, and with control tokens and ids that are no token between."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    silent = [*tokenizer.all_special_ids, len(tokenizer) + 5]
    for place in data.draw(st.lists(st.integers(0, len(ids)), max_size=3)):
        ids.insert(place, data.draw(st.sampled_from(silent)))
    whole = decode(tokenizer, ids)
    assert "".join(streamed(tokenizer, ids)) == whole.rstrip("�")
    cut = ids[: data.draw(st.integers(0, len(ids)))]
    said = "".join(streamed(tokenizer, cut))
    assert whole.startswith(said)
    # A decoder with byte tokens gives up all bytes that stand beside those of a character that was cut.
    assert len(said) >= len(decode(tokenizer, cut).replace("�", ""))


@pytest.mark.parametrize("kind", ["bytes", "tiny-llama", "minimind", "gpt2"])
@given(data=st.data())
@settings(max_examples=40)
def test_tokens_in_any_order_are_their_text(kind: str, data: st.DataObject) -> None:
    """Where bytes are decoded one by one, no answer differs, whatever it is made of."""
    tokenizer = tokenizer_of(kind)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    assert "".join(streamed(tokenizer, ids)) == decode(tokenizer, ids).rstrip("�")


def test_bytes_that_are_no_character_take_nothing_back() -> None:
    tokenizer = tokenizer_of("fallback")
    character, broken = tokenizer.convert_tokens_to_ids(["<0xE4>", "<0xB8>", "<0xAD>"]), 3 + 0x80
    after = tokenizer.convert_tokens_to_ids(["a", "▁a"])
    assert streamed(tokenizer, [*after, *character, broken, *after]) == ["a", " a", "", "", "中", "", "�a", " a", ""]
    many = streamed(tokenizer, [*after, *[broken] * 40, *after])
    assert "".join(many) == "a a" + 40 * "�" + "a a"


def test_a_token_costs_the_same_at_any_place() -> None:
    """Counted, not timed: no decoding takes more tokens than a few."""
    tokenizer = tokenizer_of("tiny-llama")
    ids = tokenizer("织机 and looms 🧵 " * 100, add_special_tokens=False)["input_ids"]
    lengths: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def decode(self, ids: list[int], **options: Any) -> str:
            lengths.append(len(ids))
            return str(tokenizer.decode(ids, **options))

    assert "".join(streamed(Counting(), ids)) == decode(tokenizer, ids)
    assert max(lengths) <= 10
    assert len(lengths) <= 6 * len(ids)


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


@given(st.text(alphabet="abc", max_size=20), st.lists(st.text(alphabet="abc", min_size=1, max_size=4)), st.data())
def test_stop_strings_in_any_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    """The answer ends where a stop string is whole for the first time, and what is held back could begin one."""
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    found = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len) if ends else None
    wanted = text if found is None else text[: ends[0] - len(found)]
    held, given, said = StopStrings(stops), 0, ""
    while given < len(text):
        size = data.draw(st.integers(1, len(text) - given))
        said += held.push(text[given : given + size])
        given += size
        if held.found is None:
            waiting = text[len(said) : given]
            assert said + waiting == text[:given]
            assert not waiting or any(stop.startswith(waiting) for stop in stops)
    assert (said + held.flush(), held.found) == (wanted, found)


def test_stop_strings_over_borders_and_none() -> None:
    held = StopStrings(["\nUser:", "。"])
    assert [held.push(piece) for piece in ["一 a", "\n", "Us", "e", "\nUser", ": b", "c"]] == [
        "一 a",
        "",
        "",
        "",
        "\nUse",
        "",
        "",
    ]
    assert held.found == "\nUser:"
    assert held.flush() == ""
    assert StopStrings(()).push("a") == "a"
    assert StopStrings("ab").push("xaby") == "x"
    for wrong in (["a", ""], [3]):
        with pytest.raises(UserError, match="expected strings that are not empty"):
            StopStrings(wrong)  # type: ignore[arg-type]
