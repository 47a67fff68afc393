"""LoRA's variants on quantised bases, beside each other, in one batch and in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from tests.contracts.test_packed_equals_padded import no_cast  # noqa: F401 (a fixture)
from tests.methods.test_lora import layer_of, open_llama, random
from torch import Tensor

import weft.models.fused
import weft.models.proof
from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.methods import LoraConfig
from weft.methods.dense import dense_weight
from weft.models import describe
from weft.objectives.passes import Work, forward_losses
from weft.training import Job, JobConfig, Trainer

D = torch.float64


def nf4(adapters: Adapters, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Put Linear4bit where the named linears were; returns the weights from before."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    before = {}
    for path in adapters.architecture.linears:
        owner, _, last = path.rpartition(".")
        if last in names:
            linear = adapters.model.get_submodule(path)
            before[path] = linear.weight.detach().clone()
            new = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
            new.weight = Params4bit(before[path].clone(), requires_grad=False, quant_type="nf4").to("cpu")
            new.support_avx512bf16_for_cpu = False  # that path wants larger matrices, and writes into the base
            setattr(adapters.model.get_submodule(owner), last, new.eval())
    return before


def test_loftq_makes_up_for_quantisation(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    texts = kit.texts(4)
    names = ("up_proj", "down_proj")
    adapters = open_llama()
    wanted = kit.hidden_of(adapters, [Part(None, texts)])
    adapters.close()
    before = nf4(adapters, names)
    adapters = Adapters(adapters.model, describe(adapters.model))
    config = LoraConfig(r=8, lora_alpha=5, init_lora_weights="loftq", target_modules=list(names))
    with pytest.raises(UserError, match="needs the weights from before quantisation"):
        adapters.add("it", config)
    adapters.close()
    adapters = Adapters(adapters.model, describe(adapters.model), original_weight=before.__getitem__)
    adapters.add("it", config)
    for path, weight in before.items():
        layer, base = layer_of(adapters, "it", path), adapters.model.get_submodule(path)
        quantized = dense_weight(base, torch.float32)
        left = torch.linalg.norm(weight - quantized - layer.scaling * layer.lora_B @ layer.lora_A)
        best = torch.linalg.norm(torch.linalg.svdvals(weight - quantized)[8:])
        kit.measured(f"{path}: error - best of rank 8", float((left - best).abs() / best), 1e-4)
    plain, ours = (kit.hidden_of(adapters, [Part(name, texts)]) for name in (None, "it"))
    assert kit.difference(ours, wanted) < 0.9 * kit.difference(plain, wanted)
    # Its file is a plain LoRA's, for the same quantised base.
    adapters.save("it", tmp_path)
    adapters.close()
    adapters = Adapters(adapters.model, describe(adapters.model))
    adapters.load("again", tmp_path)
    again = kit.hidden_of(adapters, [Part("again", texts)])
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_variants_begin_as_the_identity_on_a_quantised_base(settings: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    adapters = open_llama()
    adapters.close()
    nf4(adapters, ("up_proj", "down_proj"))
    adapters = Adapters(adapters.model, describe(adapters.model))
    adapters.add("it", LoraConfig(r=4, **settings))
    texts = kit.texts(4)
    plain, ours = (kit.hidden_of(adapters, [Part(name, texts)]) for name in (None, "it"))
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    with pytest.raises(UserError, match="quantised; its weights cannot be trained"):
        adapters.add("whole", LoraConfig(modules_to_save=["up_proj"]))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_nf4_weights_that_were_repacked_are_read_back(nested: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = bitsandbytes.nn.Linear4bit(64, 32, bias=False)
    weight = bitsandbytes.nn.Params4bit(
        random(32, 64, dtype=torch.float32), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    linear.weight = weight.to("cpu")
    before = dense_weight(linear, torch.float32)
    packed, state = bitsandbytes.functional._convert_weight_packed_for_cpu(linear.weight.data, weight.quant_state)
    linear.weight.data = packed
    assert state is linear.weight.quant_state
    for _ in range(2):  # reading changes nothing
        kit.measured("bf16 scales", kit.difference([dense_weight(linear, torch.float32)], [before]), 2e-2)


def test_int8_weights_are_read_back() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = random(12, 16, dtype=torch.float32)
    linear = bitsandbytes.nn.Linear8bitLt(16, 12, bias=False, has_fp16_weights=False)
    linear.load_state_dict({"weight": weight})
    linear = linear.to("cpu")
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((dense_weight(linear, torch.float32) - weight).abs() <= step).all()
    linear(random(2, 16, dtype=torch.float32))
    assert ((dense_weight(linear, torch.float32) - weight).abs() <= step).all()


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True, "lora_dropout": 0.2},
    "pissa": {"init_lora_weights": "pissa", "lora_dropout": 0.2},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_dora": True},
    "whole": {"bias": "all", "modules_to_save": ["lm_head", "norm"]},
}


def open_variants(kind: str, dtype: torch.dtype, **options: Any) -> Adapters:
    model = kit.make_model(kind, dtype)
    adapters = Adapters(model, describe(model), **options)
    for seed, (name, settings) in enumerate(VARIANTS.items()):
        kit.randomize(adapters.add(name.replace(" ", "-"), LoraConfig(r=4, **settings), seed=seed), seed)
    return adapters


def norms_only(model: Any) -> dict[str, type]:
    return {path: kind for path, kind in weft.models.fused.recognise(model).items() if "Norm" in kind.__name__}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_fused_modules_take_only_plain_lora_for_plain_lora(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant, beside every other, gives what the model's own modules give."""
    found = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(weft.models.proof, "recognise", norms_only)
        adapters = open_variants(kind, D)
        hidden = kit.hidden_of(adapters, [Part(n, kit.texts(3, seed=i), seed=9) for i, n in enumerate(adapters.names)])
        torch.stack([h.square().sum() for h in hidden]).sum().backward()
        found.append([*hidden, *(g for n in adapters.names for g in kit.gradients(adapters[n]).values())])
        adapters.close()
    kit.measured(f"{kind} fused - own", kit.difference(*found), 1e-9)


def variant_settings(kind: str) -> dict[str, dict[str, Any]]:
    table, norm = {"llama": ("embed_tokens", "norm"), "bloom": ("word_embeddings", "ln_f"), "gpt2": ("wte", "ln_f")}[
        kind
    ]
    dense = {"llama": "q_proj", "bloom": "dense", "gpt2": "c_fc"}[kind]
    return {
        **VARIANTS,
        "embedding and head": {"target_modules": [table, "lm_head", dense], "use_dora": True},
        "whole": {"bias": "all", "modules_to_save": ["lm_head", norm]},
    }


@pytest.mark.usefixtures("no_cast")
@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_variants_on_padded_batches(kind: str) -> None:
    """All of them in one batch, with dropout: losses and gradients as in the stream."""
    found = []
    for padded in (False, True):
        model = kit.make_model(kind, D)
        adapters = Adapters(model, describe(model), padded=padded)
        work = []
        for seed, (name, settings) in enumerate(variant_settings(kind).items()):
            key = name.replace(" ", "-")
            kit.randomize(adapters.add(key, LoraConfig(r=4, **settings), seed=seed), seed)
            work.append(Work(key, kit.samples(3, seed=seed), seed=seed))
        losses = forward_losses(adapters, work)
        torch.autograd.backward(losses)
        found.append([torch.stack(losses), *(g for w in work for g in kit.gradients(adapters[w.adapter]).values())])
        adapters.close()
    kit.measured(f"{kind} padded - stream", kit.difference(*found), 1e-10 if kind != "bloom" else 2e-5)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_variants_train_together_as_alone(kind: str) -> None:
    """Weights after training, to the bit in exact mode; and every one of them moves."""
    settings = variant_settings(kind)

    def train(names: list[str]) -> dict[str, dict[str, Tensor]]:
        model = kit.make_model(kind)
        adapters = Adapters(model, describe(model), exact=True)
        jobs = []
        for seed, name in enumerate(VARIANTS):
            if name in names:
                config = JobConfig(
                    name=name.replace(" ", "-"), method="lora", method_settings={"r": 4, **settings[name]}, steps=4,
                    batch_size=2, seed=seed, learning_rate=1e-2,
                )  # fmt: skip
                adapter = adapters.add(config.name, config.method_config(), seed=seed)
                jobs.append(Job(config, adapter, kit.samples(6, seed=seed)))
        before = {job.name: kit.parameters(job.adapter) for job in jobs}
        Trainer(adapters, jobs).run()
        after = {job.name: kit.parameters(job.adapter) for job in jobs}
        adapters.close()
        for name, values in after.items():
            still = [key for key, value in values.items() if torch.equal(value, before[name][key])]
            assert not still, (name, still)
        return after

    together = train(list(settings))
    for name in settings:
        key = name.replace(" ", "-")
        alone = train([name])[key]
        assert all(torch.equal(alone[n], together[key][n]) for n in alone), name


def test_tied_embeddings_stay_tied_in_the_base_only() -> None:
    """A head of its own on a base whose head is its table: the table, and what enters the model, do not change."""
    model = kit.make_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    before = model.lm_head.weight.detach().clone()
    adapters = Adapters(model, describe(model))
    adapter = adapters.add("it", LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"]))
    texts = kit.texts(2)
    plain = kit.hidden_of(adapters, [Part(None, texts)])
    with torch.no_grad():
        adapter.tensors()["base_model.model.lm_head.weight"].mul_(2)
    ours = kit.hidden_of(adapters, [Part("it", texts)])
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    mine, base = adapters.logits(ours[0], [("it", len(ours[0]))]), adapters.logits(plain[0], [(None, len(plain[0]))])
    torch.testing.assert_close(mine, 2 * base)
    assert torch.equal(model.lm_head.weight, before)


def test_the_padding_token_is_not_trained() -> None:
    """As in peft: where the base's table has a padding token, its column of A gets no gradient."""
    for kind, table, padded in (("llama", "embed_tokens", True), ("gpt2", "wte", False)):
        model = kit.make_model(kind)
        adapters = Adapters(model, describe(model))
        adapter = kit.randomize(adapters.add("it", LoraConfig(r=4, target_modules=[table])))
        kit.hidden_of(adapters, [Part("it", [[7, 0, 9, 0]])])[0].square().sum().backward()
        (gradient,) = (p.grad for name, p in adapter.named_parameters() if "embedding_A" in name)
        assert gradient[:, [7, 9]].any(dim=0).all()
        assert bool(gradient[:, 0].any()) != padded
