"""Named templates: what they write, which tokens they need, and the golden renderings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.data import golden
from tests.kit.tokenizers import CHATML, byte_tokenizer, learned, talk

from weft.data import PLAIN_TEMPLATE, SOFT, TEMPLATES, Conversation, Message, Renderer
from weft.data.rendering.templates import ALIASES, template_text
from weft.data.settings import DataSettings
from weft.errors import UserError

SHIPPED = ("tiny", "pad", "bytes", "spaces")
VECTORS = golden.load()


# -------------------------------------------------------------------------------------------------------------- goldens


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_golden(vector: dict[str, Any], request: pytest.FixtureRequest) -> None:
    shared = None if vector["tokenizer"] in SHIPPED else request.getfixturevalue("shared")
    renderer, example = golden.renderer(vector, shared), golden.conversation(vector)
    if "error" in vector:
        with pytest.raises(UserError, match=re.escape(vector["error"])):
            renderer.sample(example)
        return
    sample = renderer.sample(example)
    written = golden.written(sample)
    assert written == {key: vector[key] for key in ("ids", "weights", "answer", "slots") if key in vector}
    explained = renderer.explain(example)
    assert [piece.text for piece in explained.pieces() if piece.weight] == vector["learned"]
    # transformers' own rendering of the same template
    text = renderer.tokenizer.apply_chat_template(
        [{key: m[key] for key in ("role", "content", "tool_calls") if key in m} for m in vector["messages"]],
        tools=vector.get("tools"),
        chat_template=golden.template_text(vector),
        tokenize=False,
        **vector.get("template_kwargs", {}),
    )
    assert text == vector["text"]
    pieces = [piece or "" for piece, _ in renderer.encoder._pieces(renderer.script(example).text)]
    text = text.replace(SOFT, "")
    assert "".join(pieces) == text
    # What is decoded is the text, but for an automatic BOS and for ends that the template lacks. Not compared where
    # the tokenizer does not give text back as it was: a space at the head, no Chinese.
    if vector["tokenizer"] not in ("spaces", "llama2"):
        decoded = renderer.tokenizer.decode(sample.input_ids)
        bos, eos = renderer.tokenizer.decode(renderer.encoder.bos), renderer.tokenizer.eos_token
        assert decoded.removeprefix(bos).replace(eos, "") == text.removeprefix(bos).replace(eos, "")


def test_there_are_enough_goldens() -> None:
    whole = [vector for vector in VECTORS if "error" not in vector]
    assert len(whole) >= 40
    assert {vector["template"] for vector in whole} >= set(TEMPLATES)
    assert len({vector["name"] for vector in VECTORS}) == len(VECTORS)


# The formats as their makers document them, written by hand: system "S", "Q", "A", "R", then the answer is asked for.
DOCUMENTED = {
    "alpaca": "S\n\n### Instruction:\nQ\n\n### Response:\nA</s>\n\n### Instruction:\nR\n\n### Response:\n",
    "chatglm2": "S\n\n[Round 1]\n\n问：Q\n\n答：A</s>\n\n[Round 2]\n\n问：R\n\n答：",
    "chatglm3": "[gMASK]sop<|system|>\n S<|user|>\n Q<|assistant|>\n A<|user|>\n R<|assistant|>",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n",
    "deepseek": "<｜begin▁of▁sentence｜>S<｜User｜>Q<｜Assistant｜>A<｜end▁of▁sentence｜><｜User｜>R<｜Assistant｜>",
    "gemma-3": "<s><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    "<start_of_turn>user\nR<end_of_turn>\n<start_of_turn>model\n",
    "glm-4": "[gMASK]<sop><|system|>\nS<|user|>\nQ<|assistant|>\nA<|user|>\nR<|assistant|>",
    "llama-2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST]",
    "llama-3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama-3.1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "minimind": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    "<think>\n\n</think>\n\nA<|im_end|>\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "mistral": "<s>[INST] S\n\nQ[/INST] A</s>[INST] R[/INST]",
    "mistral-v1": "<s>[INST] S\n\nQ [/INST] A</s>[INST] R [/INST]",
    "phi-3": "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nR<|end|>\n<|assistant|>\n",
    "phi-4": "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>Q<|im_end|>"
    "<|im_start|>assistant<|im_sep|>A<|im_end|><|im_start|>user<|im_sep|>R<|im_end|><|im_start|>assistant<|im_sep|>",
    "vicuna": "S USER: Q ASSISTANT: A</s>USER: R ASSISTANT:",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>\n<|user|>\nR</s>\n<|assistant|>\n",
}
DOCUMENTED["qwen2"] = DOCUMENTED["qwen2.5"] = DOCUMENTED["qwen3"] = DOCUMENTED["chatml"]
DOCUMENTED["gemma"] = DOCUMENTED["gemma-3"].replace("S\n\n", "")
TURNS = [
    {"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"},
    {"role": "user", "content": "R"},
]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_formats_are_what_is_documented(name: str) -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    template, turns = TEMPLATES[name], TURNS
    options: dict[str, Any] = {"chat_template": template.text, "tokenize": False, "add_generation_prompt": True}
    if not template.system:
        with pytest.raises(Exception, match="system role"):
            tokenizer.apply_chat_template(TURNS, **options)
        turns = TURNS[1:]
    assert tokenizer.apply_chat_template(turns, **options) == DOCUMENTED[name]
    for marker in template.markers:
        assert marker in template.text or marker in DOCUMENTED[name]
    assert ("tools" in template.text and "tool_calls" in template.text) == template.tools


def test_the_default_templates_of_qwen_and_thoughts() -> None:
    tokenizer = byte_tokenizer()
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    asked = [{"role": "user", "content": "Q"}]
    for name, system in (
        ("qwen2", "You are a helpful assistant."),
        ("qwen2.5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    ):
        text = tokenizer.apply_chat_template(asked, chat_template=TEMPLATES[name].text, **options)
        assert text.startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")
    off = tokenizer.apply_chat_template(asked, chat_template=TEMPLATES["qwen3"].text, enable_thinking=False, **options)
    assert off == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


# --------------------------------------------------------------------------------------------------- finding a template


def test_names_files_and_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("<|im_end|>")
    by_name = Renderer(tokenizer, chat_template="chatml")
    assert by_name.template.name == "chatml"
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML, encoding="utf-8")
    by_file = Renderer(tokenizer, chat_template=str(path))
    assert (by_file.template.name, by_file.template.text) == ("", CHATML)
    by_text = Renderer(tokenizer, chat_template=CHATML)
    assert by_name.sample(talk("q", "a")) == by_file.sample(talk("q", "a")) == by_text.sample(talk("q", "a"))
    assert Renderer(tokenizer).template.origin == "fallback"
    assert Renderer(tokenizer).chat_template == PLAIN_TEMPLATE == TEMPLATES["alpaca"].text
    assert Renderer(byte_tokenizer(template=CHATML)).template.origin == "own"
    # the tokenizer's own is not asked where one is named
    plain = Renderer(byte_tokenizer(template=CHATML), chat_template="plain").sample(talk("q", "a"))
    assert learned(tokenizer, plain) == ["a</s>"]
    assert plain == Renderer(byte_tokenizer()).sample(talk("q", "a"))


def test_every_name_and_alias_is_found() -> None:
    for name in TEMPLATES:
        assert template_text(name).name == name
        assert template_text(name.upper().replace("-", "_")).name == name
    for alias, name in ALIASES.items():
        assert template_text(alias).name == name
        assert TEMPLATES[name].text
    files = {path.stem for path in Path(template_text.__code__.co_filename).parent.glob("chat_templates/*")}
    assert files == set(TEMPLATES)


def test_what_cannot_be_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no template 'gemma-33'\. Did you mean 'gemma-3'"):
        Renderer(byte_tokenizer(), chat_template="gemma-33")
    with pytest.raises(UserError, match=r"none\.jinja cannot be read"):
        Renderer(byte_tokenizer(), chat_template=str(tmp_path / "none.jinja"))
    (tmp_path / "latin.jinja").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"latin\.jinja cannot be read"):
        Renderer(byte_tokenizer(), chat_template=str(tmp_path / "latin.jinja"))


def test_markers_that_are_no_tokens() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(UserError, match=r"with <start_of_turn>, <end_of_turn>, which.*allow_unknown_markers"):
        Renderer(tokenizer, chat_template="gemma")
    with pytest.raises(UserError, match=r"with <\|im_sep\|>, which"):  # and not the markers that it has
        Renderer(tokenizer, chat_template="phi-4")
    pieces = Renderer(tokenizer, chat_template="gemma", allow_unknown_markers=True).sample(talk("q", "a"))
    assert tokenizer.decode(pieces.input_ids).startswith("<start_of_turn>user\nq<end_of_turn>\n")
    assert learned(tokenizer, pieces) == ["a<end_of_turn></s>"]
    for name, template in TEMPLATES.items():
        if not template.markers:
            Renderer(tokenizer, chat_template=name)


def test_a_run_takes_the_text_of_a_file_along(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML, encoding="utf-8")
    settings = DataSettings(data="d.json", chat_template=str(path))
    path.unlink()
    assert settings.chat_template == CHATML
    assert DataSettings.model_validate(settings.model_dump()) == settings
    assert DataSettings(data="d.json", chat_template="chatml").chat_template == "chatml"


def test_an_older_run_is_read() -> None:
    assert DataSettings.model_validate({"data": "d", "truncate": True}).truncation == "right"
    assert DataSettings.model_validate({"data": "d", "truncate": False}).truncation == "refuse"


# ---------------------------------------------------------------------------------------------------------- the sandbox

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ messages.append(messages[0]) }}",
    "{{ messages.clear() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self.__init__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ ('%s' | format('x')).__class__ }}",
    "{{ ''|attr('__class__') }}",
    "{% set x = namespace(__class__='a') %}",
    "{{ '{0.__class__}'.format(1) }}",
    "{% for i in range(10000000) %}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_templates_cannot_leave_the_sandbox(escape: str) -> None:
    renderer = Renderer(byte_tokenizer(), chat_template=escape + PLAIN_TEMPLATE)
    example = talk("q", "a")
    (outcome,) = renderer.outcomes([example])
    if isinstance(outcome, UserError):
        assert "the chat template refuses" in str(outcome)
    else:  # jinja renders what is not allowed as nothing, where only an attribute was asked for
        assert outcome == (Renderer(byte_tokenizer()).sample(example),)
    assert example == talk("q", "a")


def test_data_is_no_template() -> None:
    tokenizer = byte_tokenizer()
    for text in ("{{ 7 * 7 }}", "{% raw %}", "{# no #}"):
        example = Conversation((Message("user", text), Message("assistant", text)), "d:1")
        assert tokenizer.decode(Renderer(tokenizer).sample(example).input_ids).count(text) == 2
