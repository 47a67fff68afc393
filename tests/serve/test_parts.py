"""The parts of the server by themselves: forms of calls, texts of tokens, figures, identity."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kit.tokenizers import byte_tokenizer, space_tokenizer
from tests.serve.conftest import TOOLS

import weft
from weft.data import Renderer
from weft.data.rendering.templates import TEMPLATES
from weft.serve.admission import Admission
from weft.serve.envelope import ApiError, json_bytes
from weft.serve.incoming import Body
from weft.serve.logprobs import TokenTexts
from weft.serve.metrics import Histogram, Metrics
from weft.serve.registry import identity
from weft.serve.sse import event
from weft.serve.tools import FORMATS, Call, ToolSplitter, find_format

BY_NAME = {one.name: one for one in FORMATS}
TOOL: Any = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("name", [name for name, one in TEMPLATES.items() if one.tools])
def test_a_form_is_taken_only_where_it_is_proved(name: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(TEMPLATES[name].markers)})
    if name == "llama-3.1":
        tokenizer.eos_token = "<|eot_id|>"
    renderer = Renderer(tokenizer, chat_template=name)
    proved = {
        "alpaca": "plain",
        "llama-3.1": "llama3_json",
        "minimind": "hermes",
        "qwen2.5": "hermes",
        "qwen3": "hermes",
    }
    if name in proved:
        assert find_format(renderer, [TOOL]).name == proved[name]
    else:
        with pytest.raises(ApiError, match="tools"):
            find_format(renderer, [TOOL])


def test_templates_without_calls_are_refused() -> None:
    for template in ("vicuna", "{% for m in messages %}{{ m.content }}{% endfor %}"):
        with pytest.raises(ApiError, match="tools"):
            find_format(Renderer(byte_tokenizer(), chat_template=template), [TOOL])
    assert find_format(Renderer(byte_tokenizer(), chat_template=TOOLS), [TOOL]).name == "hermes"


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', ("", [Call("f", {})])),
        ("hermes", 'a <tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "g"}</tool_call>\n',
         ("a", [Call("f", {}), Call("g", {})])),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}', None),
        ("hermes", '<tool_call>{"name": "f", "arguments": []}</tool_call>', None),
        ("hermes", "<tool_call>f()</tool_call>", None),
        ("hermes", '<tool_call>{"name": "f"}</tool_call> and more', None),
        ("hermes", "none", None),
        ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', ("", [Call("f", {"a": 1})])),
        ("llama3_json", '{"name": "f", "parameters": {"a": 1}} so', None),
        ("llama3_json", '{"answer": 1}', None),
        ("plain", 'a\n### Call:\n{"name": "f", "arguments": {"a": 1}}', ("a", [Call("f", {"a": 1})])),
        ("plain", "### Call:\nf", None),
    ],
)  # fmt: skip
def test_calls_are_read_or_left(name: str, text: str, wanted: Any) -> None:
    assert BY_NAME[name].read(text) == wanted


@given(st.sampled_from(FORMATS), st.text("<tool_ca>#:{} \nCl", max_size=40), st.lists(st.integers(1, 5)), st.booleans())
def test_a_splitter_gives_the_same_text_in_any_pieces(form: Any, text: str, cuts: list[int], calls: bool) -> None:
    if calls and not form.leads:
        body = '{"name": "f", "arguments": {}}'
        text += f"<tool_call>{body}</tool_call>" if form.name == "hermes" else f"### Call:\n{body}"
    splitter, given_out, at = ToolSplitter(form), "", 0
    for size in [*cuts, len(text) + 1]:
        given_out += splitter.push(text[at : at + size])
        at += size
    rest, found = splitter.end()
    whole = form.read(text)
    if whole is None:
        assert (given_out + rest, found) == (text, [])
    else:
        assert found == whole[1]
        assert given_out.strip() == whole[0]


def test_bytes_of_tokens_make_the_text() -> None:
    for tokenizer, text in ((byte_tokenizer(), "织机 🧵 the\n\na :"), (space_tokenizer(), "a b [INST] a")):
        texts = TokenTexts(tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        raw = b"".join(texts.of(token)[1] for token in ids)
        assert raw.decode().strip() == text.strip()
    assert TokenTexts(byte_tokenizer()).of(byte_tokenizer().eos_token_id)[0] == "</s>"
    assert TokenTexts(byte_tokenizer()).top(5, float("-inf"))["logprob"] == -9999.0


@given(st.text(st.characters(categories=["Cs", "Cc", "Lo", "Zl"]), max_size=20))
def test_no_text_breaks_an_event_or_json(text: str) -> None:
    line = event({"text": text})
    assert line.count(b"\n") == 2
    assert line.endswith(b"\n\n")
    assert json.loads(json_bytes({"text": text})) == {"text": text}


def test_buckets_and_labels() -> None:
    histogram = Histogram("h", "about", (1.0, 2.0))
    for seconds in (0.5, 1.0, 1.5, 7.0):
        histogram.observe('a"\\\n', seconds)
    name = 'a\\"\\\\\\n'
    assert list(histogram.lines()) == [
        f'h_bucket{{model="{name}",le="1"}} 2', f'h_bucket{{model="{name}",le="2"}} 3',
        f'h_bucket{{model="{name}",le="+Inf"}} 4', f'h_sum{{model="{name}"}} 10', f'h_count{{model="{name}"}} 4',
    ]  # fmt: skip
    metrics = Metrics()
    metrics.written.add("gone", by=3)
    metrics.first.observe("gone", 1.0)
    metrics.forget("gone")
    assert "gone" not in metrics.text({})


def test_there_is_room_for_so_many() -> None:
    admission = Admission(2, 1)
    admission.enter(3)
    with pytest.raises(ApiError) as full:
        admission.enter(1)
    assert (full.value.status, full.value.retry_after) == (429, 2)
    admission.leave(3, 0.1)
    with pytest.raises(ApiError) as never:
        admission.enter(4)
    assert never.value.status == 400
    assert admission.rows == 0


def test_a_body_is_counted() -> None:
    async def read(sizes: list[int], limit: int) -> int:
        left = [*sizes]

        async def receive() -> Any:
            size = left.pop(0)
            return {"type": "http.request", "body": b"x" * size, "more_body": bool(left)}

        body = Body(receive, limit, 1.0)
        while not body.whole:
            await body.receive()
        return len(left)

    assert asyncio.run(read([5, 5], 10)) == 0
    with pytest.raises(ApiError) as error:
        asyncio.run(read([5, 6, 100], 10))
    assert error.value.status == 413


def test_every_part_of_an_adapter_is_in_its_hash(tiny_llama_dir: Path) -> None:
    config, tensors = weft.LoraConfig(r=4), {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    plain = identity(config, tensors, ("x",), {"chat_template": "t"})
    assert plain == identity(config, dict(reversed(tensors.items())), ("x",), {"chat_template": "t", "sha256": "data"})
    others = [
        identity(weft.LoraConfig(r=8), tensors, ("x",), {"chat_template": "t"}),
        identity(config, {**tensors, "b": torch.ones(2) * (1 + 1e-7)}, ("x",), {"chat_template": "t"}),
        identity(config, {**tensors, "a": torch.zeros(3, 2)}, ("x",), {"chat_template": "t"}),
        identity(config, {**tensors, "b": torch.ones(2, dtype=torch.bfloat16)}, ("x",), {"chat_template": "t"}),
        identity(config, {"a": tensors["a"], "c": tensors["b"]}, ("x",), {"chat_template": "t"}),
        identity(config, tensors, ("y",), {"chat_template": "t"}),
        identity(config, tensors, ("x",), {"chat_template": "u"}),
    ]
    assert len({plain, *others}) == 1 + len(others)
