"""One number, three ways: what the engine says of a token, what a training pass says, what peft says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests import kit
from tests.contracts import test_seq2seq as seq2seq

from weft.api import Adapters
from weft.core.stream import Part
from weft.generation import Engine, Limits, Request
from weft.generation.request import Completion
from weft.generation.sampling import Sampling
from weft.methods import METHODS
from weft.models import describe

# In float32, of log-probabilities of a few units; ten times what three kinds of kernels gave.
LIMIT = 1e-5
# Prompts in pieces, blocks of four tokens and shared beginnings: every path of the cache is taken.
LIMITS = Limits(prefill_tokens=11, block_tokens=4, max_rows=12)


def trained(adapters: Adapters, request: Request, answer: list[int]) -> list[float]:
    """log p of the answer's tokens, as a training pass over prompt and answer computes them."""
    rows = [request.adapter, len(answer)]
    with torch.no_grad():
        if adapters.architecture.task == "seq2seq":
            stream, hidden = adapters.run([Part(request.adapter, [list(request.prompt)], None, targets=[answer])])
        else:
            answers = [len(request.prompt)]
            part = Part(request.adapter, [[*request.prompt, *answer]], None, answers=answers, slots=[()])
            stream, hidden = adapters.run([part])
            places = [stream.rows[0][len(request.prompt) + i] - 1 for i in range(len(answer))]
            hidden = hidden[torch.tensor(places)]
        return (-adapters.losses(hidden, torch.tensor(answer), [tuple(rows)])).tolist()  # type: ignore[list-item]


def opened(kind: str, padded: bool | None) -> Adapters:
    if kind in seq2seq.KINDS:
        adapters = Adapters(model := seq2seq.make_model(kind), describe(model))
        for index, method in enumerate(m for m, config in METHODS.items() if "seq2seq" in config.tasks):
            kit.randomize(adapters.add(method, kit.method_config(method), seed=index), index)
        return adapters
    return kit.open_with_all(kit.make_model(kind), padded=padded)


@pytest.mark.parametrize(
    ("kind", "padded"), [("llama", None), ("gpt2", None), ("bloom", None), ("llama", True), ("t5", None)]
)
def test_the_engine_says_what_training_says(kind: str, padded: bool | None) -> None:
    adapters = opened(kind, padded)
    (opening,) = kit.texts(1, 13, 13, seed=4)
    requests = []
    for index, name in enumerate([None, *adapters.names]):
        (own,) = kit.texts(1, 1, 9, seed=index)
        warm = Sampling(0.0 if index % 2 else 1.0, seed=index)
        requests += [Request(own, name, 5, sampling=warm, logprobs=3), Request([*opening, *own], name, 4, logprobs=0)]
    with Engine(adapters, limits=LIMITS) as engine:
        found: list[Completion] = engine.generate(requests)
    worst = 0.0
    for request, done in zip(requests, found, strict=True):
        told = [token.logprob for token in done.tokens]
        wanted = trained(adapters, request, done.ids)
        worst = max([worst, *(abs(a - b) for a, b in zip(told, wanted, strict=True) if a is not None)])
        assert None not in told
        for token in done.tokens:
            assert len(token.top) == request.logprobs
            if request.sampling.temperature == 0 and request.logprobs:
                assert token.top[0] == (token.id, token.logprob)
    kit.measured(f"log-probabilities, {kind}", worst, LIMIT)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_they_are_of_the_temperature_and_of_all_tokens(temperature: float) -> None:
    """Cuts, penalties and biases choose; they do not change what is told."""
    adapters = kit.open_with_all(kit.make_model("llama"))
    how = Sampling(temperature, 5, 0.8, seed=3, repetition_penalty=1.5, logit_bias={7: 3.0})
    request = Request([5, 6, 7, 8], "lora", 6, sampling=how, logprobs=kit.VOCABULARY)
    with Engine(adapters) as engine:
        (done,) = engine.generate([request])
    with torch.no_grad():
        (hidden,) = kit.hidden_of(adapters, [Part("lora", [[*request.prompt, *done.ids]])])
        logits = adapters.logits(hidden, [("lora", len(hidden))])[len(request.prompt) - 1 : -1]
        wanted = (logits / temperature).log_softmax(-1)
    for token, row in zip(done.tokens, wanted, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=LIMIT)
        told = torch.full_like(row, float("nan"))
        for other, logprob in token.top:
            told[other] = logprob
        kit.measured("the whole vocabulary", float((told - row).abs().max()), LIMIT)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "adalora", "ia3", "prompt_tuning", "p_tuning", "prefix_tuning", "vera"])
def test_greedy_as_peft_and_transformers_generate(kind: str, method: str, tmp_path: Path) -> None:
    model = kit.make_model(kind)
    adapters = Adapters(model, describe(model))
    kit.randomize(adapters.add(method, kit.method_config(method)), 3)
    adapters.save(method, tmp_path / method, base_name="x")
    prompts = kit.texts(3, 2, 12, seed=5)
    with Engine(adapters, limits=LIMITS) as engine:
        ours = [done.ids for done in engine.generate([Request(prompt, method, 12) for prompt in prompts])]
    adapters.close()
    theirs: Any = peft.PeftModel.from_pretrained(kit.make_model(kind), str(tmp_path / method)).eval()
    assert len({tuple(ids) for ids in ours}) > 1
    for prompt, ids in zip(prompts, ours, strict=True):
        assert greedy_in_peft(theirs, prompt, 12, generates=method not in kit.NOT_IDENTITY) == ids


def greedy_in_peft(model: Any, prompt: list[int], count: int, *, generates: bool) -> list[int]:
    """What ``generate`` gives. Where peft 0.21 puts learned tokens or keys before the text, its ``generate``
    contradicts its own forward under transformers 5.24: there the forward is asked, token by token."""
    ids = list(prompt)
    with torch.no_grad():
        if generates:
            given = torch.tensor([ids])
            how = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            ids = model.generate(input_ids=given, attention_mask=torch.ones_like(given), **how)[0].tolist()
        while len(ids) < len(prompt) + count:
            given = torch.tensor([ids])
            ids.append(int(model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0, -1].argmax()))
    return ids[len(prompt) :]
