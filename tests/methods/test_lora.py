"""LoRA's variants against what their papers write, and what LoRA refuses. (Files: ``contracts/test_peft_lora``.)"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.contracts import kit
from tests.contracts.test_packed_equals_padded import no_cast  # noqa: F401 (a fixture)
from torch import Tensor, nn

import weft.models.fused
from weft.core.adapters import Adapters
from weft.core.route import Segment
from weft.core.stream import Part
from weft.errors import UserError
from weft.methods import LoraConfig
from weft.models import describe
from weft.ops.lowrank import (
    loftq_factors,
    low_rank_add,
    low_rank_add_ref,
    principal_factors,
    row_norms,
    row_norms_ref,
    sketched_factors,
)
from weft.train import Job, JobConfig, Trainer
from weft.train.step import Work, evaluate_loss, forward_losses

D = torch.float64


def random(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def open_llama(dtype: torch.dtype = torch.float32) -> Adapters:
    model = kit.make_model("llama", dtype)
    return Adapters(model, describe(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_low_rank_add_equals_its_reference(dtype: torch.dtype) -> None:
    y, x = random(7, 5, dtype=dtype), random(7, 6, seed=1, dtype=dtype)
    a, b = random(3, 6, seed=2).requires_grad_(), random(5, 3, seed=3).requires_grad_()
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.2}[dtype]
    found, wanted = low_rank_add(y, x, a, b, 1.7), low_rank_add_ref(y, x, a, b, 1.7)
    torch.testing.assert_close(found, wanted, atol=bound, rtol=bound)
    for mine, other in zip(*(torch.autograd.grad(z.sum(), (a, b)) for z in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, other, atol=10 * bound, rtol=bound)


def test_row_norms_equal_their_reference() -> None:
    weight, a, b = random(9, 6), random(3, 6, seed=1), random(9, 3, seed=2)
    kit.measured("norms", kit.difference([row_norms(weight, a, b, 0.7)], [row_norms_ref(weight, a, b, 0.7)]), 1e-12)
    gone = row_norms(-b @ a, a, b, 1.0)  # W + B A is nothing
    assert torch.isfinite(gone).all()
    assert float(gone.max()) < 1e-6


def test_principal_factors_are_the_best_of_their_rank() -> None:
    """The error of the best rank-r approximation is the norm of the singular values that are left (Eckart-Young)."""
    weight = random(12, 8)
    values = torch.linalg.svdvals(weight)
    for a, b in (
        principal_factors(weight, 3, 0.4),
        sketched_factors(weight, 3, 0.4, 6, torch.Generator().manual_seed(1)),
    ):
        assert a.shape == (3, 8)
        assert b.shape == (12, 3)
        error = torch.linalg.norm(weight - 0.4 * b @ a)
        kit.measured("error - best", float(error - torch.linalg.norm(values[3:])), 1e-6)
        kit.measured("A and B share the values", float((a.norm(dim=1) - b.norm(dim=0)).abs().max()), 1e-9)


def test_loftq_alternates() -> None:
    """Against NF4: the first round is one decomposition, later ones leave less of the weight out."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random(128, 64, dtype=torch.float32)

    def quantize(matrix: Tensor) -> Tensor:
        return functional.dequantize_4bit(*functional.quantize_4bit(matrix.contiguous(), quant_type="nf4"))

    errors = []
    for rounds in (1, 5):
        quantized, a, b = loftq_factors(weight, 16, 2.0, quantize, rounds)
        errors.append(float(torch.linalg.norm(weight - quantized - 2.0 * b @ a)))
    left = torch.linalg.svdvals(weight - quantize(weight))[16:]
    kit.measured("first round", abs(errors[0] - float(torch.linalg.norm(left))), 1e-4)
    assert errors[1] < 0.97 * errors[0]


def layer_of(adapters: Adapters, name: str, path: str) -> Any:
    return adapters[name].sites()[path]


PATH = "model.layers.1.mlp.down_proj"


def test_dora_is_the_papers_equation_and_its_norm_has_no_gradient() -> None:
    adapters = open_llama(D)
    kit.randomize(adapters.add("it", LoraConfig(r=4, use_dora=True, target_modules=["down_proj"])), scale=0.5)
    layer, base = layer_of(adapters, "it", PATH), adapters.model.get_submodule(PATH)
    x = random(5, 48)
    y = layer(x, base(x), Segment("it", 5, 1))
    a, b, m = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    change = base.weight + layer.scaling * b @ a
    wanted = x @ (m[:, None] * change / torch.linalg.norm(change, dim=1, keepdim=True).detach()).t()
    kit.measured("DoRA", kit.difference([y], [wanted]), 1e-12)
    mine = torch.autograd.grad(y.square().sum(), (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    kit.measured("DoRA's gradients", kit.difference(mine, torch.autograd.grad(wanted.square().sum(), (a, b, m))), 1e-10)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dora_with_dropout_drops_the_whole_input(kind: str) -> None:
    """As in peft: the rows that the new lengths stretch are those of the dropped input."""
    model = kit.make_model(kind, D)
    adapters = Adapters(model, shape := describe(model))
    path = shape.mlp_output[0]
    name = path.rsplit(".", 1)[-1]
    kit.randomize(
        adapters.add("it", LoraConfig(r=4, use_dora=True, target_modules=[name], lora_dropout=0.5)), scale=0.3
    )
    layer, base = layer_of(adapters, "it", path), model.get_submodule(path)
    x = random(6, 48 if kind == "llama" else 128)
    y = layer(x, base(x), Segment("it", 6, 1, seed=3))
    weight = base.weight if isinstance(base, nn.Linear) else base.weight.t()
    length = (layer.lora_magnitude_vector / layer.norms()) - 1
    from weft.core.route import seeded_dropout

    dropped = seeded_dropout(x, 0.5, Segment("it", 6, 1, seed=3), path)
    update = layer.scaling * dropped @ layer.lora_A.t() @ layer.lora_B.t()
    wanted = base(x) + length * (dropped @ weight.t()) + (length + 1) * update
    kit.measured("DoRA with dropout", kit.difference([y], [wanted]), 1e-12)


def test_pissa_is_training_the_principal_part() -> None:
    """The same steps of descent as with W - s B0 A0 for a base and A0, B0 for a beginning."""
    adapters = open_llama(D)
    adapters.add("it", LoraConfig(r=3, init_lora_weights="pissa", target_modules=["down_proj"]))
    layer = layer_of(adapters, "it", PATH)
    weight = adapters.model.get_submodule(PATH).weight
    a, b = principal_factors(weight.detach(), 3, layer.scaling)
    kit.measured("A and B", kit.difference([layer.lora_A, layer.lora_B], [a, b]), 1e-12)
    residual = weight.detach() - layer.scaling * b @ a
    a.requires_grad_(), b.requires_grad_()
    x, target = random(8, 48, seed=4), random(8, 32, seed=5)
    for _ in range(3):
        mine = layer(x, x @ weight.t(), Segment("it", 8, 1))
        other = x @ residual.t() + layer.scaling * x @ a.t() @ b.t()
        kit.measured("PiSSA", kit.difference([mine], [other]), 1e-10)
        (mine - target).square().mean().backward()
        (other - target).square().mean().backward()
        with torch.no_grad():
            for parameter in (layer.lora_A, layer.lora_B, a, b):
                parameter -= 0.5 * parameter.grad
                parameter.grad = None


def test_pissa_goes_on_after_loading_as_if_it_had_not_been_saved(tmp_path: Path) -> None:
    config = LoraConfig(r=3, init_lora_weights="pissa_niter_2", use_rslora=True)
    ends = []
    for saved in (False, True):
        adapters = open_llama()
        job = JobConfig(name="it", method="lora", steps=3, batch_size=2, optimizer="sgd", learning_rate=0.1)
        adapter = adapters.add("it", config, seed=5)
        Trainer(adapters, [Job(job, adapter, kit.samples(6))]).run()
        if saved:
            adapters.save("it", tmp_path)
            adapters.remove("it")
            adapter = adapters.load("it", tmp_path)
            assert adapter.config == config
        Trainer(adapters, [Job(job, adapter, kit.samples(6, seed=1))]).run()
        ends.append(list(adapter.state_dict().values()))
        adapters.close()
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_pissa_converges_faster_than_lora_at_first() -> None:
    """What it is for; and that the way through it trains at all."""
    losses = {}
    for how in (True, "pissa"):
        adapters = open_llama()
        config = JobConfig(
            name="it", method="lora", method_settings={"r": 4, "init_lora_weights": how}, steps=12, batch_size=8,
            learning_rate=3e-3, lr_scheduler_type="constant",
        )  # fmt: skip
        job = Job(config, adapters.add("it", config.method_config()), kit.samples(8), kit.samples(8))
        Trainer(adapters, [job]).run()
        losses[how] = evaluate_loss(adapters, "it", kit.samples(8))
        adapters.close()
    assert losses["pissa"] < losses[True]


def test_lora_plus_rates() -> None:
    """B and vectors at the ratio, A at the job's rate, embeddings at their own: as peft's create_loraplus_optimizer."""
    adapters = open_llama()
    settings = {
        "r": 4, "loraplus_lr_ratio": 16, "use_dora": True, "bias": "all", "modules_to_save": ["norm", "lm_head"],
        "target_modules": ["embed_tokens", "q_proj"], "loraplus_lr_embedding": 1e-5,
    }  # fmt: skip
    config = JobConfig(name="it", method="lora", method_settings=settings, learning_rate=1e-3, steps=2)
    adapter = adapters.add("it", config.method_config())
    job = Job(config, adapter, kit.samples(4))
    rates = {id(p): group["peak_lr"] for group in job.optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in adapter.named_parameters()}
    assert found
    for name, rate in found.items():
        wanted = 1e-3
        if name.startswith(f"layers.{adapter.paths.index('model.embed_tokens')}."):
            wanted = 1e-5
        elif "lora_B" in name or adapter.get_parameter(name).ndim == 1:
            wanted = 16e-3
        assert math.isclose(rate, wanted), (name, rate)
    assert len(set(found.values())) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 33}, r"r is 33, but at module 'model\.layers\.0\.self_attn\.q_proj' it can be 1 to 32"),
        ({"r": 4, "rank_pattern": {"k_proj": 17}}, r"rank_pattern .*k_proj.* is 17, .* 1 to 16"),
        ({"target_modules": ["embed_tokens"], "r": 40}, "1 to 32"),
        ({"target_modules": ["input_layernorm"]}, r"input_layernorm.* \w*LlamaRMSNorm.*What can match: .*lm_head"),
        ({"target_modules": ["mlp"]}, r"'model\.layers\.0\.mlp' is of the kind \w*LlamaMLP.*down_proj"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}, "nothing is left to tune"),
        ({"modules_to_save": ["lm_heda"]}, "modules_to_save: 'lm_heda' matches no module"),
        ({"modules_to_save": ["act_fn"]}, "holds no weights"),
        ({"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"}, "'model.embed_tokens' is an embedding"),
        ({"init_lora_weights": "loftq"}, "is not quantised to 4 bits"),
        ({"layers_to_transform": [1], "layers_pattern": "blocks"}, "layers_pattern 'blocks'.*model.layers.0"),
    ],
)
@pytest.mark.parametrize("meta", [False, True], ids=["loaded", "meta"])
def test_what_cannot_be_is_refused_at_build(settings: dict[str, Any], message: str, meta: bool) -> None:
    """Also before the weights are there, on the meta device, except for what only weights can say."""
    if meta and settings.get("init_lora_weights") == "loftq":
        pytest.skip("whether the base is quantised is not known yet")
    model = kit.make_model("llama").to("meta" if meta else "cpu")
    adapters = Adapters(model, describe(model))
    with pytest.raises(UserError, match=message):
        adapters.add("it", LoraConfig(**settings), blank=meta)
    assert adapters.names == []


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True, "modules_to_save": ["lm_head"], "bias": "all", "target_modules": ["embed_tokens", "q_proj"]},
        {"init_lora_weights": "pissa", "use_dora": True},
        {"init_lora_weights": "loftq"},
    ],
)
def test_it_can_be_checked_on_the_meta_device(settings: dict[str, Any]) -> None:
    model = kit.make_model("llama").to("meta")
    adapters = Adapters(model, describe(model))
    adapters.add("it", LoraConfig(**settings), blank=True)
    adapters.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pizza"}, "none of true, false, gaussian, pissa"),
        ({"init_lora_weights": "pissa_niter_x"}, "pissa_niter_<number>"),
        ({"layers_pattern": "layers"}, "give layers_to_transform too"),
        ({"bias": "some"}, "bias"),
    ],
)
def test_settings_that_no_model_allows(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LoraConfig(**settings)


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
    adapters.original_weight = before.__getitem__
    adapters.add("it", config)
    for path, weight in before.items():
        layer, base = layer_of(adapters, "it", path), adapters.model.get_submodule(path)
        from weft.core.weights import dense_weight

        quantized = dense_weight(base, torch.float32)
        left = torch.linalg.norm(weight - quantized - layer.scaling * layer.lora_B @ layer.lora_A)
        best = torch.linalg.norm(torch.linalg.svdvals(weight - quantized)[8:])
        kit.measured(f"{path}: error - best of rank 8", float((left - best).abs() / best), 1e-4)
    plain, ours = (kit.hidden_of(adapters, [Part(name, texts)]) for name in (None, "it"))
    assert kit.difference(ours, wanted) < 0.9 * kit.difference(plain, wanted)
    # Its file is a plain LoRA's, for the same quantised base.
    adapters.save("it", tmp_path)
    adapters.original_weight = None
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
    from weft.core.weights import dense_weight

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
    from weft.core.weights import dense_weight

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


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_fused_modules_take_only_plain_lora_for_plain_lora(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant, beside every other, gives what the model's own modules give."""
    found = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(
                weft.models.fused, "_FUSED", {k: v for k, v in weft.models.fused._FUSED.items() if "Norm" in k}
            )
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
    mine, base = adapters.logits(ours[0], [("it", len(ours[0]))]), adapters.logits(plain[0])
    torch.testing.assert_close(mine, 2 * base)
    assert torch.equal(model.lm_head.weight, before)
