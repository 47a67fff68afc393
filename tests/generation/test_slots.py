"""The slots of a template reach generation: the rows of a prompt lie where training laid them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from tests.conftest import make_tokenizer
from torch import nn

from weft.api import Adapters
from weft.cli.chat import Conversation as Talk
from weft.core.adapter import Adapter, BuildContext, MethodConfig, Run
from weft.core.stream import Part
from weft.data import SOFT, Conversation, Message, Renderer, Sample
from weft.evaluate.exact_match import Question, answer_questions
from weft.generation import Engine, Request, generate
from weft.generation.open import open_target
from weft.generation.sampling import Sampling
from weft.models import describe

TEMPLATE = (
    "{{ '" + SOFT + "' }}{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% if m.role == 'user' %}{{ '" + SOFT
    + "' }}{% else %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)  # fmt: skip


class Slotted(MethodConfig):
    """A stub: two virtual tokens at the template's first slot, one at its second, one after the prompt."""

    method = "slotted"
    peft_type = "SLOTTED"

    def build(self, name: str, context: BuildContext) -> Adapter:
        return _Slotted(self, name, context)


class _Slotted(Adapter):
    num_virtual_tokens = 4

    def __init__(self, config: MethodConfig, name: str, context: BuildContext) -> None:
        super().__init__(config, name)
        self.prompt = nn.Parameter(context.normal(4, context.architecture.hidden_size, std=1.0))

    def places(self, length: int, answer: int | None, slots: Sequence[int]) -> Sequence[Run]:
        assert answer is not None
        assert len(slots) == 2, "the slots did not come along"
        return [(slots[0], 2), (slots[1], 1), (answer, 1)]

    def virtual_tokens(self, seed: int | None = None) -> torch.Tensor:
        return self.prompt


@pytest.fixture
def renderer() -> Renderer:
    return Renderer(make_tokenizer(), chat_template=TEMPLATE)


def opened(**options: bool) -> Adapters:
    model = _model()
    adapters = Adapters(model, describe(model), **options)
    adapters.add("soft", Slotted())
    kit.randomize(adapters.add("lora", kit.method_config("lora")), 1)
    return adapters


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.float64).eval()


def samples(renderer: Renderer, questions: Sequence[str]) -> list[tuple[Sample, Request]]:
    out = []
    for question in questions:
        asked = Message("user", question)
        prompt = renderer.prompt([asked])
        sample = renderer.sample(Conversation((asked, Message("assistant", "one, two")), "t:1"))
        out.append((sample, Request(prompt.ids, "soft", 5, slots=prompt.slots)))
    return out


QUESTIONS = ["Count.", "What colour is the sky?", "a"]


def test_training_and_generation_lay_out_the_same_rows(renderer: Renderer) -> None:
    adapters = opened()
    for sample, request in samples(renderer, QUESTIONS):
        assert sample.answer == len(request.prompt)
        trained = adapters.stream([Part("soft", [sample.input_ids], 1, answers=[sample.answer], slots=[sample.slots])])
        asked = adapters.stream(
            [Part("soft", [request.prompt], None, answers=[len(request.prompt)], slots=[request.slots])]
        )
        length = len(request.prompt) + 4
        assert asked.lengths == (length,)
        assert torch.equal(trained.input_ids[:length], asked.input_ids)
        assert torch.equal(trained.position_ids[:length], asked.position_ids)
        assert list(trained.rows[0][: len(request.prompt)]) == list(asked.rows[0])
        assert torch.equal(trained.virtual_rows[0], asked.virtual_rows[0])
        # Two at the head, one after the question, one right before the answer.
        first, second = request.slots
        assert asked.virtual_rows[0].tolist() == [first, first + 1, second + 2, length - 1]


@pytest.mark.parametrize("padded", [False, True], ids=["cache", "padded"])
def test_generation_equals_teacher_forcing(padded: bool, renderer: Renderer) -> None:
    """What is generated after a virtual token is what a pass over the whole sample predicts there."""
    adapters = opened(padded=padded)
    asked = [request for _, request in samples(renderer, QUESTIONS)]
    others = [Request(request.prompt, name, 5) for request in asked for name in ("lora", None)]
    answers = [c.ids for c in generate(adapters, [*asked, *others], stop_ids=())]
    for request, answer in zip(asked, answers, strict=False):
        whole = [*request.prompt, *answer]
        stream = adapters.stream([Part("soft", [whole], None, answers=[len(request.prompt)], slots=[request.slots])])
        with torch.no_grad():
            logits = adapters.logits(adapters.forward(stream))
        before = [row - 1 for row in stream.rows[0][len(request.prompt) :]]
        assert logits[before].argmax(-1).tolist() == answer
        assert generate(adapters, [request], stop_ids=())[0].ids == answer


def test_chat_generate_and_exact_match_pass_them(
    renderer: Renderer, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Request] = []

    check = Engine._check

    def record(self: Engine, request: Request, what: str) -> None:
        seen.append(request)
        check(self, request, what)

    monkeypatch.setattr(Engine, "_check", record)
    opened = open_target(str(tiny_llama_dir))
    opened = replace(opened, renderer=Renderer(opened.base.tokenizer, chat_template=TEMPLATE))
    asked = (Message("user", "Count."),)
    wanted = opened.renderer.prompt(asked)
    assert len(wanted.slots) == 2
    assert opened.prompt("Count.") == opened.prompt(asked) == wanted
    assert opened.prompt_ids("Count.") == wanted.ids

    Talk(opened, None, None, Sampling(), 3).take("Count.")
    answer_questions(opened.adapters, opened.renderer, [Question(asked, "one", "q:1")], [None])
    from weft.cli.main import main

    monkeypatch.setattr("weft.generation.open.open_target", lambda *a, **k: opened)
    out = tmp_path / "out.jsonl"
    assert main(["generate", "it", "--prompt", "Count.", "--output", str(out)]) == 0
    assert json.loads(out.read_text())["prompt_tokens"] == len(wanted.ids)
    assert [(list(r.prompt), tuple(r.slots)) for r in seen] == [(wanted.ids, wanted.slots)] * 3
