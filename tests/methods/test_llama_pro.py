"""LLaMA-Pro: the expanded model is transformers' own model with more layers."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from tests.models.test_facts import make
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import weft
from weft.api import Adapters
from weft.core.site import site_of
from weft.core.stream import Part
from weft.data import Sample
from weft.errors import UserError
from weft.files.adapter_folder import read_tensors
from weft.generation import Request, generate
from weft.methods.combined import CombinedConfig
from weft.methods.llama_pro import LlamaProConfig
from weft.models import describe
from weft.models.attached import prove_attached
from weft.models.facts import sketch
from weft.objectives.passes import Work, forward_losses
from weft.training import Job, JobConfig, Trainer

KINDS = ["llama", "gpt2", "bloom", "qwen2", "falcon"]
CONFIG = LlamaProConfig(num_new_blocks=2)


@pytest.mark.parametrize(
    ("settings", "layers", "groups"),
    [
        ({}, 32, [3, 7, 11, 15, 19, 23, 27, 31]),
        ({}, 3, [0, 1, 2]),
        ({}, 8, [1, 3, 5, 7]),
        ({"num_new_blocks": 3}, 3, [0, 1, 2]),
        ({"num_new_blocks": 2}, 5, [1, 4]),
        ({"num_new_blocks": 4}, 6, [0, 2, 3, 5]),
    ],
)
def test_where_the_new_blocks_stand(settings: dict[str, Any], layers: int, groups: list[int]) -> None:
    assert LlamaProConfig(**settings).groups(layers) == groups


def expanded(model: Any, tensors: dict[str, Tensor]) -> Any:
    """transformers' model with the file's new blocks as layers of its own."""
    blocks = describe(model).blocks
    root = blocks[0].rpartition(".")[0]
    new = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    after = {int(match[1]) for key in new if (match := re.fullmatch(rf"{root}\.(\d+)\.inserted\.0\..*", key))}
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{root}.")}
    number = 0
    for index, block in enumerate(blocks):
        sources = [(f"{block}.", model.state_dict())] + [(f"{block}.inserted.0.", new)] * (index in after)
        for prefix, source in sources:
            state |= {f"{root}.{number}.{k.removeprefix(prefix)}": v for k, v in source.items() if k.startswith(prefix)}
            number += 1
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = number
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * number
    bigger = AutoModelForCausalLM.from_config(config).to(next(model.parameters()).dtype).eval()
    bigger.load_state_dict(state)
    assert len(describe(bigger).blocks) == number == len(blocks) + len(after)
    return bigger


@pytest.mark.parametrize("kind", KINDS)
def test_is_transformers_model_with_more_layers(kind: str, tmp_path: Path) -> None:
    """Trained, saved, and its file put into a bigger model: the same logits."""
    model = kit.make_model(kind)
    texts = kit.texts(4, 3, 20)
    adapters = Adapters(model, describe(model))
    job = JobConfig(name="it", method="llama_pro", method_settings={"num_new_blocks": 2}, steps=4, learning_rate=0.02)
    adapter = adapters.add("it", CONFIG)
    Trainer(adapters, [Job(job, adapter, kit.samples(16))]).run()
    adapters.save("it", tmp_path)
    with torch.no_grad():
        found = [adapters.logits(h, [("it", len(h))]) for h in kit.hidden_of(adapters, [Part("it", texts)])]
        plain = [adapters.logits(h, [(None, len(h))]) for h in kit.hidden_of(adapters, [Part(None, texts)])]
    adapters.close()
    bigger = expanded(model, read_tensors(tmp_path / "adapter_model.safetensors"))
    with torch.no_grad():
        wanted = [bigger(torch.tensor([ids])).logits[0] for ids in texts]
    assert kit.difference(found, plain) > 1e-2, "four steps have changed nothing"
    kit.measured(f"{kind}: logits of a bigger transformers model", kit.difference(found, wanted), 1e-5)


@pytest.mark.parametrize("options", [{}, {"exact": True, "checkpointing": True}, {"padded": True}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_the_copy_carries_nothing_of_the_neighbours(kind: str, options: dict[str, bool]) -> None:
    """Added last, beside every other method at the block it copies: no site, no parameter, one router."""
    model = kit.make_model(kind)
    adapters = kit.open_with_all(model, **options)
    adapter: Any = adapters.add("it", CONFIG)
    shape = describe(model)
    assert list(adapter.inserted_blocks()) == [shape.blocks[i] for i in CONFIG.groups(shape.num_layers)]
    per_block = sum(p.numel() for p in model.get_submodule(shape.blocks[0]).parameters())
    assert adapter.num_trainable() == 2 * per_block
    for number, ((path, (block,))) in enumerate(adapter.inserted_blocks().items()):
        assert type(block).__name__.startswith("Checkpointed") == bool(options.get("checkpointing"))
        for module in block.modules():
            assert site_of(module) is None
            routers = [v for k, v in module.__dict__.items() if k.endswith("_router")]
            assert all(router is adapters.router for router in routers)
            assert getattr(module, "layer_idx", None) in (None, shape.num_layers + number)
            assert getattr(module, "config", model.config) is getattr(model.get_submodule(path), "config", model.config)
    texts = kit.texts(2)
    with torch.no_grad():
        pairs = zip(*(kit.hidden_of(adapters, [Part(name, texts)]) for name in ("it", None)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    adapters.close()


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_float32_parameters_on_a_bf16_base(kind: str) -> None:
    """Computed in bf16, kept and differentiated in float32, also where the block is computed again."""
    found = []
    for checkpointing in (False, True):
        model = kit.make_model(kind, torch.bfloat16)
        adapters = Adapters(model, describe(model), checkpointing=checkpointing)
        adapter = kit.randomize(adapters.add("it", CONFIG))
        # Something below the first new block, so that all are computed again.
        kit.randomize(adapters.add("prompt", kit.method_config("prompt_tuning")))
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
        losses = forward_losses(adapters, [Work("prompt", kit.samples(2, seed=1)), Work("it", kit.samples(3))])
        assert kit.hidden_of(adapters, [Part("it", kit.texts(1))])[0].dtype == torch.bfloat16
        torch.autograd.backward(losses)
        grads = kit.gradients(adapter)
        assert grads.keys() == dict(adapter.named_parameters()).keys()
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
        found.append([*grads.values(), *kit.gradients(adapters["prompt"]).values()])
        adapters.close()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2", "falcon"])
def test_beside_prefixes_on_the_padded_path(kind: str) -> None:
    """The mask has columns for a neighbour's learned keys, which a new block has not."""
    model = kit.make_model(kind, torch.float64)
    adapters = Adapters(model, describe(model), padded=True)
    kit.randomize(adapters.add("it", CONFIG))
    kit.randomize(adapters.add("prefix", kit.method_config("prefix_tuning", num_virtual_tokens=7)))
    texts = kit.texts(3, 2, 9)
    parts = [Part("prefix", kit.texts(2, 12, 15, seed=3)), Part("it", texts), Part(None, kit.texts(1))]
    with torch.no_grad():
        alone = [kit.hidden_of(adapters, [Part("it", [ids])])[0] for ids in texts]
        mixed = kit.hidden_of(adapters, parts)[2:5]
    kit.measured(f"{kind} padded: beside prefixes - alone", kit.difference(alone, mixed), 1e-5)
    adapters.close()


def test_falcon_with_alibi_beside_prefixes() -> None:
    """ALiBi comes as [B, heads, 1, P + T] there (BLOOM: [B * heads, 1, P + T])."""
    model = make("falcon", alibi=True, new_decoder_architecture=False, multi_query=False, num_kv_heads=4).double()
    adapters = Adapters(model, describe(model))
    kit.randomize(adapters.add("it", CONFIG))
    kit.randomize(adapters.add("prefix", kit.method_config("prefix_tuning")))
    texts = kit.texts(3, 2, 9)
    with torch.no_grad():
        alone = [kit.hidden_of(adapters, [Part("it", [ids])])[0] for ids in texts]
        mixed = kit.hidden_of(adapters, [Part("prefix", kit.texts(2, seed=3)), Part("it", texts)])[2:]
    kit.measured("falcon, ALiBi: beside prefixes - alone", kit.difference(alone, mixed), 1e-4)
    adapters.close()


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_generation_with_several_expansions_and_rows_that_leave(kind: str) -> None:
    """Three adapters with new blocks at other places share the cache's extra layers; rows end at different times."""
    model = kit.make_model(kind, torch.float64)
    adapters = Adapters(model, describe(model))
    for count in (1, 2, 3):
        kit.randomize(adapters.add(f"pro{count}", LlamaProConfig(num_new_blocks=count)), seed=count, scale=0.3)
    kit.randomize(adapters.add("lora", kit.method_config("lora")))
    kit.randomize(adapters.add("prefix_tuning", kit.method_config("prefix_tuning")))
    names = ["pro2", None, "lora", "pro3", "pro1", "prefix_tuning", "pro2"]
    asked = [Request(ids, name, 3 + 5 * i % 11) for i, (name, ids) in
             enumerate(zip(names * 2, kit.texts(14, 1, 12), strict=True))]  # fmt: skip
    answers = [c.ids for c in generate(adapters, asked, stop_ids=())]
    assert len({tuple(a[:3]) for a in answers}) > 5
    for request, answer in zip(asked, answers, strict=True):
        assert len(answer) == request.max_new_tokens
        assert generate(adapters, [request], stop_ids=())[0].ids == answer
        (hidden,) = kit.hidden_of(adapters, [Part(request.adapter, [[*request.prompt, *answer]])])
        logits = adapters.logits(hidden, [(request.adapter, len(hidden))])
        assert logits.argmax(-1)[len(request.prompt) - 1 : -1].tolist() == answer
    adapters.close()


@pytest.mark.parametrize("other", ["lora", "bottleneck", "prompt_tuning", "full", "bitfit"])
def test_with_another_method_in_one_job(other: str, tmp_path: Path) -> None:
    """The other method acts on the base's blocks alone; saved and loaded as one."""
    model = kit.make_model("llama", torch.float64)
    adapters = Adapters(model, describe(model))
    texts = kit.texts(3)
    config = CombinedConfig(parts=(kit.method_config(other), CONFIG))
    kit.randomize(adapters.add("both", config))
    adapters.save("both", tmp_path)
    adapters.load("again", tmp_path)
    with torch.no_grad():
        both, again = (kit.hidden_of(adapters, [Part(name, texts)]) for name in ("both", "again"))
        for path, site in ((path, site_of(model.get_submodule(path))) for path in describe(model).blocks):
            if site is not None:
                site.inserted.pop("both", None)
                assert path
        without = kit.hidden_of(adapters, [Part("both", texts)])
    assert kit.difference(both, again) == 0
    assert kit.difference(both, without) > 1e-3
    adapters.close()


def norm_after(model: Any) -> Any:
    model.config.apply_residual_connection_post_layernorm = True
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: make("opt", do_layer_norm_before=False), "normalises after the residual sum"),
        (lambda: norm_after(make("bloom")), "normalises after the residual sum"),
        (lambda: make("mixtral"), "not known"),
        (lambda: quantised(kit.make_model("llama")), "quantised"),
    ],
    ids=["opt", "bloom", "mixtral", "quantised"],
)
def test_what_cannot_begin_as_the_identity_is_refused(model: Any, message: str) -> None:
    made = model()
    adapters = Adapters(made, sketch(made))  # what is quantised here by hand does not run
    with pytest.raises(UserError, match=f"llama_pro: .*{message}"):
        adapters.add("it", CONFIG)
    adapters.close()


def quantised(model: Any) -> Any:
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_quantised_weights_cannot_be_trained(method: str) -> None:
    model = quantised(kit.make_model("llama"))
    adapters = Adapters(model, sketch(model))
    with pytest.raises(UserError, match="up_proj' is quantised"):
        adapters.add("it", kit.METHODS[method](**({"num_layers_trainable": 3} if method == "freeze" else {})))
    adapters.close()


def test_prefixes_in_the_same_job_are_refused() -> None:
    model = kit.make_model("llama")
    adapters = Adapters(model, describe(model))
    with pytest.raises(UserError, match=r"prefix_tuning\+llama_pro"):
        adapters.add("it", CombinedConfig(parts=(kit.method_config("prefix_tuning"), CONFIG)))
    assert adapters.names == []
    adapters.close()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_over_a_quantised_base_the_copies_are_of_its_numbers(quantization: str, tmp_path: Path) -> None:
    """It begins as the base does, its copies are trained, and what was saved answers the same when it is loaded."""
    pytest.importorskip("bitsandbytes")
    base = weft.load_base("tiny-llama", quantization=quantization, dtype="float32", device="cpu")
    adapters = Adapters(base.model, base.architecture)
    adapter = adapters.add("it", LlamaProConfig(num_new_blocks=2))
    prove_attached(adapters, "it")
    assert all(p.is_floating_point() for p in adapter.parameters())
    samples = [Sample(list(range(5, 20 + n)), [0.0] + [1.0] * (14 + n), f"text {n}") for n in range(4)]
    config = JobConfig(name="it", method="llama_pro", steps=2, batch_size=2, learning_rate=1e-2)
    job = Job(config, adapter, samples)
    before = kit.parameters(adapter)
    Trainer(adapters, [job]).run()
    assert job.progress.ended == "finished"
    assert any(not torch.equal(value, before[name]) for name, value in kit.parameters(adapter).items())
    adapters.save("it", tmp_path / "it")
    adapters.load("again", tmp_path / "it")
    sequences = [[5, 6, 7, 8, 9], [10, 11, 12]]
    one, other = (kit.hidden_of(adapters, [Part(name, sequences)]) for name in ("it", "again"))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    adapters.close()
