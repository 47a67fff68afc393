"""LoRA's variants against what their papers write, and what LoRA refuses. (Files: ``contracts/test_peft_lora``.)"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from torch import Tensor, nn

from weft.api import Adapters
from weft.core.route import Segment
from weft.errors import UserError
from weft.methods import BitFitConfig, LoraConfig
from weft.methods.combined import CombinedConfig
from weft.methods.dropout import seeded_dropout
from weft.models import describe
from weft.objectives.passes import evaluate_loss
from weft.ops import products
from weft.ops.lowrank import (
    loftq_factors,
    low_rank_add,
    low_rank_add_ref,
    principal_factors,
    row_norms,
    row_norms_ref,
    sketched_factors,
)
from weft.training import Job, JobConfig, Trainer

D = torch.float64


def random(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def open_llama(dtype: torch.dtype = torch.float32) -> Adapters:
    model = kit.make_model("llama", dtype)
    return Adapters(model, describe(model))


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_low_rank_add_equals_its_reference(dtype: torch.dtype, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On machines that are fast and slow in 16 bits; with a sum that lies as it is, and as a transpose."""
    monkeypatch.setattr(products, "faster_wide_from", lambda _, dtype: 1 if slow and dtype.itemsize == 2 else math.inf)
    monkeypatch.setattr(products, "_FEW", 1)
    monkeypatch.setattr(products, "_SMALL", 0)
    factors = random(3, 6, seed=2), random(5, 3, seed=3)
    for turned in (False, True):
        y, x = random(7, 5, dtype=dtype), random(7, 6, seed=1, dtype=dtype)
        y = y.t().contiguous().t() if turned else y
        found = []
        for function, wide in ((low_rank_add, dtype), (low_rank_add_ref, torch.float64)):
            given = [t.detach().to(wide).requires_grad_() for t in (y, x)]
            given += [t.detach().to(torch.promote_types(wide, torch.float32)).requires_grad_() for t in factors]
            out = function(*given, 1.7)
            out.backward(random(7, 5, seed=4).to(dtype).to(wide))
            found.append([out.detach(), *(t.grad for t in given)])
        for number, (mine, other) in enumerate(zip(*found, strict=True)):
            # z, the product, and the factors are rounded, and sums have seven terms at most.
            limit = 16 * torch.finfo(dtype).eps * max(1.0, float(other.abs().max()))
            kit.measured(f"{number}", float((mine.double() - other.double()).abs().max()), limit, derived=True)


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
        ({"layers_to_transform": [1], "target_modules": ["q_proj", "lm_head"]}, "'lm_head' is in none of the layers"),
        ({"layers_to_transform": [1], "target_modules": ["embed_tokens", "q_proj"]}, "'embed_tokens' is in none"),
        ({"rank_pattern": {"q_projj": 2}}, "rank_pattern: 'q_projj' matches no tuned module.*'q_proj'"),
        ({"alpha_pattern": {"layers.7.q_proj": 2}}, "alpha_pattern: 'layers.7.q_proj' matches no tuned module"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}}, "rank_pattern: 'k_proj' matches no"),
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
    with pytest.raises(UserError, match=message):
        LoraConfig(**settings)


def test_lora_plus_rates_in_a_job_of_several_methods() -> None:
    """Each part has its own: LoRA+ beside BitFit, and the rate of embeddings, which is no multiple."""
    adapters = open_llama()
    lora = LoraConfig(r=4, loraplus_lr_ratio=4, target_modules=["embed_tokens", "q_proj"])
    adapter = adapters.add("it", CombinedConfig(parts=(BitFitConfig(add_missing=True), lora)))
    for name, _ in adapter.named_parameters():
        wanted = 1e-2
        if "lora_embedding" in name:
            wanted = 1e-6
        elif "lora_B" in name:
            wanted = 4e-2
        assert math.isclose(adapter.scaled_learning_rate(name, 1e-2), wanted), name


@pytest.mark.parametrize(
    "layers", [{"layers_to_transform": [1]}, {"layers_to_transform": 1, "layers_pattern": "layers"}]
)
def test_chosen_layers_only(layers: dict[str, Any]) -> None:
    adapter = open_llama().add("it", LoraConfig(r=4, target_modules=["q_proj"], **layers))
    assert list(adapter.sites()) == ["model.layers.1.self_attn.q_proj"]


def test_patterns_in_peft_s_files_may_match_nothing(tmp_path: Path) -> None:
    """peft takes no notice of them, so the function is the same."""
    adapters = open_llama()
    kit.randomize(adapters.add("it", LoraConfig(r=4, target_modules=["q_proj"])))
    adapters.save("it", tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rank_pattern": {"no_such": 2}}))
    (tmp_path / "weft.json").unlink()
    again = adapters.load("again", tmp_path)
    assert all(torch.equal(again.tensors()[key], value) for key, value in adapters["it"].tensors().items())
