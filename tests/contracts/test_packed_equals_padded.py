"""The stream, the padded batch and one sequence at a time are the same function, in values and in gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import kit
from torch import Tensor

from weft.api import Adapters
from weft.core.stream import Part
from weft.generation import Request, generate
from weft.layouts.padded_batch import Padded
from weft.models import describe


@pytest.fixture
def no_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers casts RMSNorm's input and the rotary angles to float32 inside a float64 model; here it must not."""
    from transformers.models.llama import modeling_llama as llama

    def norm(self: Any, hidden: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden * scale

    def rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(llama.LlamaRotaryEmbedding, "forward", rotary)


def batch() -> list[Part]:
    """All methods, and the plain base in the middle."""
    parts = [Part(name, kit.texts(3, high=20, seed=i), seed=11 + i) for i, name in enumerate(kit.ALL)]
    return [*parts[:2], Part(None, kit.texts(2, seed=9)), *parts[2:]]


def values_and_gradients(
    model: torch.nn.Module, groups: list[list[Part]], *, dropout: bool = False, **options: bool
) -> tuple[list[Tensor], dict[str, dict[str, Tensor]]]:
    """Logits of every sequence, and the gradients of a function of them, over all ``groups`` (one pass each)."""
    adapters = kit.open_with_all(model, dropout=dropout, **options)
    logits = []
    for parts in groups:
        names = [part.adapter for part in parts for _ in part.sequences]
        hidden = kit.hidden_of(adapters, parts)
        logits += [adapters.logits(h, [(name, len(h))]) for name, h in zip(names, hidden, strict=True)]
    torch.autograd.backward([x.square().mean() for x in logits if x.requires_grad])
    grads = {name: kit.gradients(adapters[name]) for name in kit.ALL}
    adapters.close()
    return [x.detach() for x in logits], grads


def compare(name: str, a: Any, b: Any, limit: float) -> None:
    kit.measured(f"{name} logits", kit.difference(a[0], b[0]), limit)
    for method in kit.ALL:
        assert a[1][method].keys() == b[1][method].keys()
        assert a[1][method] or method in kit.UNTRAINED, method
        kit.measured(f"{name} {method} gradients", kit.difference(a[1][method].values(), b[1][method].values()), limit)


@pytest.mark.usefixtures("no_cast")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_stream_padded_and_one_by_one(kind: str) -> None:
    model = kit.make_model(kind, torch.float64, attn_implementation="sdpa")
    parts = batch()
    stream = values_and_gradients(model, [parts])
    compare(f"{kind} stream - padded", stream, values_and_gradients(model, [parts], padded=True), 1e-12)
    single = [[Part(part.adapter, [ids])] for part in parts for ids in part.sequences]
    compare(f"{kind} stream - one by one", stream, values_and_gradients(model, single), 1e-12)
    compare(f"{kind} stream - exact", stream, values_and_gradients(model, [parts], exact=True), 1e-12)


@pytest.mark.usefixtures("no_cast")
def test_with_dropout_too() -> None:
    """Masks are drawn for tokens, not for places in a batch."""
    model = kit.make_model("llama", torch.float64)
    stream, padded = (values_and_gradients(model, [batch()], dropout=True, padded=p) for p in (False, True))
    compare("llama with dropout, stream - padded", stream, padded, 1e-12)


# Their own code computes ALiBi, norms or rotary angles in float32 whatever the model's dtype: no closer than that.
FLOAT32_INSIDE: dict[str, dict[str, Any]] = {
    "bloom": {},
    "mistral": {"sliding_window": 6},  # shorter than the texts
    "gemma": {},
    "gpt_neox": {},
    "opt": {},
    "opt as large as its embeddings": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "gpt_neox one after the other": {"use_parallel_residual": False, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("kind", FLOAT32_INSIDE)
def test_elsewhere(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "do_layer_norm_before" in FLOAT32_INSIDE[kind]:
        # Says so itself: no block can begin as the identity where the norm stands after the sum.
        others = [method for method in kit.ALL if method != "llama_pro"]
        monkeypatch.setattr(kit, "ALL", others)
        monkeypatch.setattr("tests.kit.adapters.ALL", others)
    # Not eager: in double precision its softmax makes NaN of padding whose whole window is masked.
    sdpa = {} if kind == "bloom" else {"attn_implementation": "sdpa"}
    model = kit.make_model(kind.split()[0], torch.float64, **sdpa, **FLOAT32_INSIDE[kind])
    parts = batch()
    stream, padded = (values_and_gradients(model, [parts], padded=p) for p in (False, True))
    compare(f"{kind} stream - padded", stream, padded, 2e-5)
    single = [[Part(part.adapter, [ids])] for part in parts for ids in part.sequences]
    compare(f"{kind} stream - one by one", stream, values_and_gradients(model, single), 2e-5)


@pytest.mark.parametrize("options", [{}, {"new_decoder_architecture": False, "multi_query": True}], ids=["40b", "7b"])
def test_a_model_that_only_runs_padded(options: dict[str, bool]) -> None:
    """Falcon: all methods in one batch are what they are one by one, and it generates."""
    model = kit.make_model("falcon", torch.float64)
    if options:
        config = kit.model_config("falcon")
        config.update(options)
        torch.manual_seed(0)
        model = type(model)(config).double().eval()
    parts = batch()
    single = [[Part(part.adapter, [ids])] for part in parts for ids in part.sequences]
    compare(
        "falcon batch - one by one", values_and_gradients(model, [parts]), values_and_gradients(model, single), 1e-5
    )

    adapters = kit.open_with_all(model)
    assert isinstance(adapters.layout, Padded)
    requests = [Request(ids, name, 5) for name in [None, *kit.ALL] for ids in kit.texts(2, seed=4)]
    answers = [c.ids for c in generate(adapters, requests, stop_ids=())]
    assert answers == [generate(adapters, [r], stop_ids=())[0].ids for r in requests]
    for request, answer in zip(requests, answers, strict=True):
        full = [*request.prompt, *answer]
        (hidden,) = kit.hidden_of(adapters, [Part(request.adapter, [full])])
        told = adapters.logits(hidden, [(request.adapter, len(full))]).argmax(-1)[len(request.prompt) - 1 : -1]
        assert told.tolist() == answer
    adapters.close()


def test_the_plain_model_is_what_transformers_computes() -> None:
    """The padded path is our reference, so it is held against the untouched model itself."""
    for kind in ("llama", "gpt2", "bloom", "falcon", "qwen2", "mistral", "gemma", "gpt_neox", "opt"):
        model = kit.make_model(kind)
        texts = kit.texts(4, seed=5)
        with torch.no_grad():
            wanted = [model(torch.tensor([ids])).logits[0] for ids in texts]
        for padded in {True, describe(model).install_attention is None}:
            adapters = Adapters(model, describe(model), padded=padded)
            with torch.no_grad():
                got = [adapters.logits(h, [(None, len(h))]) for h in kit.hidden_of(adapters, [Part(None, texts)])]
            adapters.close()
            kit.measured(f"{kind} plain, padded={padded}", kit.difference(wanted, got), 1e-5)
