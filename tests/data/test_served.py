"""The form of a chat template that makes other tools give the tokens of training."""

from __future__ import annotations

from typing import Any

import pytest
from tests.kit.tokenizers import CHATML, LLAMA2, byte_tokenizer, space_tokenizer, t5_tokenizer

from weft.data import SOFT, TEMPLATES, Message, Renderer
from weft.data.rendering.render import Task
from weft.data.rendering.served import ids_elsewhere, is_served_form, message_fields, served_template

ASK = [Message("user", "is it so?")]
TALK = [*ASK, Message("assistant", "no.\n"), Message("user", "is this?")]


def check(renderer: Renderer, task: Task = "causal_lm") -> Any:
    """The served template, which gives the renderer's ids by transformers' own function."""
    template = served_template(renderer, task, [ASK, TALK])
    text = template["default"] if isinstance(template, dict) else template
    for messages in (ASK, TALK):
        wanted = renderer.prompt(messages, task=task).ids
        assert ids_elsewhere(renderer.tokenizer, text, messages) == wanted
        assert wanted == renderer.tokenizer.apply_chat_template(
            message_fields(messages), chat_template=text, add_generation_prompt=True, return_dict=False
        )
    trained = renderer.chat_template or renderer.tokenizer.chat_template
    assert is_served_form(template, trained, renderer.encoder, renderer.settings.template_kwargs)
    assert not is_served_form("{{ 'other' }}", trained, renderer.encoder, {})
    return template


@pytest.mark.parametrize("made", [byte_tokenizer, space_tokenizer])
def test_a_template_that_writes_all_stays(made: Any) -> None:
    tokenizer = made()
    tokenizer.chat_template = LLAMA2 if tokenizer.bos_token else LLAMA2.replace("bos_token + ", "")
    assert check(Renderer(tokenizer)) == tokenizer.chat_template


def test_what_is_missing_is_added_and_nothing_else() -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    vicuna = check(Renderer(tokenizer, chat_template="vicuna"))
    assert vicuna.endswith(TEMPLATES["vicuna"].text)
    assert vicuna.count("{{") == TEMPLATES["vicuna"].text.count("{{") + 1
    # Training ends an answer with the EOS, which this template never writes.
    assert "'assistant'" in check(Renderer(byte_tokenizer(template=CHATML)))
    assert check(Renderer(byte_tokenizer("<|im_end|>", template=CHATML))) == CHATML


def test_blanks_at_the_head_of_a_template() -> None:
    """Jinja takes blanks before a first tag away, and must still do so behind the BOS."""
    template = "\n  {% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}\n"
    check(Renderer(byte_tokenizer(adds_bos=True), chat_template=template))
    check(Renderer(byte_tokenizer(adds_bos=True), chat_template=template.replace("{{ eos_token }}", "")))


def test_places_of_virtual_tokens_variables_and_several_templates() -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    assert SOFT not in check(Renderer(tokenizer, chat_template=SOFT + CHATML))
    given = {"mode": {"a": [None, True, "\\'\n🧵"]}, "none": 1, "for": 2, "a b": 3}
    check(Renderer(tokenizer, chat_template="{{ mode | tojson }}" + CHATML, template_kwargs=given))
    tokenizer.chat_template = {"default": CHATML, "other": LLAMA2}
    assert set(check(Renderer(tokenizer))) == {"default", "other"}


@pytest.mark.parametrize("adds_bos", [False, True])
def test_what_an_encoder_reads(adds_bos: bool) -> None:
    """Its tokenizer puts special tokens on either side of a text."""
    check(Renderer(t5_tokenizer(adds_bos=adds_bos), chat_template="chatml"), "seq2seq")
