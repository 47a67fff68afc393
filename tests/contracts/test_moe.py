"""Mixtures of experts: PEFT's ``target_parameters`` both ways, and files that mean the same in peft whatever it takes
``all-linear`` for on these bases."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests import kit
from tests.kit.experts import (
    EXPERTS,
    TEXTS,
    TYPES,
    largest,
    make_moe,
    open_moe,
    our_logits,
    their_gradients,
    their_logits,
)
from torch import Tensor

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.files.adapter_folder import read_json, read_tensors
from weft.methods import METHODS
from weft.methods.combined import CombinedConfig
from weft.models import describe
from weft.models.interface import install_interface
from weft.models.reach import left_out

# Both sides compute in double precision, but for what the models themselves do in single (routers, norms: 3e-7 seen).
LIMIT = 1e-5
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "both": {"target_parameters": EXPERTS, "use_rslora": True, "alpha_pattern": {"experts.down_proj": 5}},
}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def lora(**settings: Any) -> Any:
    return METHODS["lora"](r=2, **settings)


def in_peft(kind: str, folder: Path, base: Any = None) -> Any:
    """peft's model with our folder, which must hold all that peft looks for and nothing else."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base or make_moe(kind), folder, is_trainable=True).eval()
    assert not [w for w in told if "adapter keys" in str(w.message)], [str(w.message) for w in told]
    return model


def compare_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor | None], limit: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for key, parameter in ours.items():
        other = theirs[key]
        assert (parameter.grad is None) == (other is None), key
        if parameter.grad is not None and other is not None:
            # Norms are float32 in peft's model and float64 in ours, so what differs grows with the gradient.
            scale = max(1.0, float(other.abs().max()))
            kit.measured(f"gradient of {key}", largest([parameter.grad], [other]) / scale, limit)


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        pytest.param(kind, variant, marks=[pytest.mark.slow] * (variant != "both" and (place + turn) % 2))
        for place, kind in enumerate(TYPES)
        for turn, variant in enumerate(SETTINGS)
        if variant != "both" or kind in ("glm4_moe", "gpt_oss")
    ],
)
def test_our_file_in_peft_and_back(kind: str, variant: str, tmp_path: Path) -> None:
    adapters = open_moe(kind)
    adapter = kit.randomize(adapters.add("it", lora(**SETTINGS[variant])), scale=0.1)
    adapters.save("it", tmp_path / "ours")
    entries = read_json(tmp_path / "ours" / "adapter_config.json")
    assert isinstance(entries["target_modules"], list)
    theirs = in_peft(kind, tmp_path / "ours")
    ours, wanted = our_logits(adapters, "it"), their_logits(theirs)
    kit.measured(f"{kind} {variant}, ours - peft", largest(ours, wanted), LIMIT)
    assert largest(ours, our_logits(adapters, None)) > 1e-2, "the adapter does nothing"
    for logits in (ours, wanted):
        torch.autograd.backward([x.square().mean() for x in logits])
    compare_gradients(dict(adapter.tensors()), their_gradients(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    adapters.load("again", tmp_path / "theirs")
    kit.measured(f"{kind} {variant}, peft - ours", largest(our_logits(adapters, "again"), wanted), LIMIT)


def test_patterns_reach_what_the_file_names_as_parameters(tmp_path: Path) -> None:
    adapters = open_moe("glm4_moe")
    patterns = {"rank_pattern": {"mlp.down_proj": 1}, "alpha_pattern": {"shared_experts.up_proj": 5, ".*proj": 3}}
    kit.randomize(adapters.add("it", lora(**patterns, lora_dropout=0.1)), scale=0.1)
    adapters.save("it", tmp_path)
    wanted = their_logits(in_peft("glm4_moe", tmp_path))
    kit.measured("patterns", largest(our_logits(adapters, "it"), wanted), LIMIT)
    (tmp_path / "weft.json").unlink()
    adapters.load("again", tmp_path)
    kit.measured("patterns, by peft's file alone", largest(our_logits(adapters, "again"), wanted), LIMIT)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_single_precision_and_transformers_own_kernels(kind: str, tmp_path: Path) -> None:
    adapters = open_moe(kind, torch.float32)
    kit.randomize(adapters.add("it", lora(target_parameters=EXPERTS)), scale=0.05)
    adapters.save("it", tmp_path)
    theirs = in_peft(kind, tmp_path, make_moe(kind, torch.float32))
    kit.measured(f"{kind}, float32", largest(our_logits(adapters, "it"), their_logits(theirs)), LIMIT)


PEFTS: dict[str, tuple[str, dict[str, Any]]] = {
    # Which peft makes of it: q, k, v, o, the router's weight, and both of the experts' parameters, one of rank 2 r.
    "all-linear, converted": ("qwen3_moe", {"target_modules": "all-linear"}),
    "all-linear, a router with more in it": ("ernie4_5_moe", {"target_modules": "all-linear"}),
    "old names of experts": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3", "gate"]}),
    "all-linear, not converted": (
        "jamba",
        # Its weight is read and never called, by peft's model neither: such tensors are refused by name.
        {"target_modules": "all-linear", "target_parameters": ["down_proj"], "exclude_modules": ["dt_proj"]},
    ),
    "three of a module, with a bias": (
        "gpt_oss",
        {"target_modules": [], "target_parameters": [*EXPERTS, "experts.gate_up_proj_bias"]},
    ),
    "patterns": (
        "glm4_moe",
        {
            "target_modules": ["o_proj"],
            "target_parameters": ["gate_up_proj", "mlp.experts.down_proj", "mlp.shared_experts.up_proj.weight"],
            "rank_pattern": {"gate_up_proj": 3, "up_proj.weight": 1},
            "alpha_pattern": {"experts.down_proj": 7, "up_proj": 2},
            "init_lora_weights": "gaussian",
        },
    ),
    "routers": ("phimoe", {"target_modules": "q_proj|.*v_proj", "target_parameters": ["router.weight"]}),
    "a regular expression": (
        "olmoe",
        {"target_modules": r".*\.1\.self_attn\.(q|o)_proj", "target_parameters": EXPERTS},
    ),
}


@pytest.mark.parametrize("what", PEFTS)
def test_a_file_of_peft(what: str, tmp_path: Path) -> None:
    kind, settings = PEFTS[what]
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, **settings)
    theirs = peft.get_peft_model(make_moe(kind), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    adapters = open_moe(kind)
    adapter = adapters.load("it", tmp_path / "theirs")
    ours, wanted = our_logits(adapters, "it"), their_logits(theirs)
    kit.measured(f"{kind}, {what}", largest(ours, wanted), LIMIT)
    assert largest(ours, our_logits(adapters, None)) > 1e-2
    for logits in (ours, wanted):
        torch.autograd.backward([x.square().mean() for x in logits])
    compare_gradients(dict(adapter.tensors()), their_gradients(theirs))
    adapters.save("it", tmp_path / "ours")
    first, second = (read_tensors(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    kit.measured("and back", largest(their_logits(in_peft(kind, tmp_path / "ours")), wanted), LIMIT)


def test_a_new_adapter_is_the_identity_and_draws_like_a_linear_one() -> None:
    adapters = open_moe("qwen3_moe")
    adapter = adapters.add("it", lora(target_parameters=EXPERTS), seed=3)
    assert largest(our_logits(adapters, "it"), our_logits(adapters, None)) == 0
    a = dict(adapter.tensors())["base_model.model.model.layers.0.mlp.experts.lora_A.weight"]
    assert a.shape == (2 * 4, 24)
    assert float(a.abs().max()) <= 24**-0.5
    adapters.add("free", lora(target_parameters=EXPERTS, init_lora_weights=False))
    assert largest(our_logits(adapters, "free"), our_logits(adapters, None)) > 0


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dropout": ("qwen3_moe", {"target_parameters": EXPERTS, "lora_dropout": 0.1}, "lora_dropout: 0.1 does not go with"),
    "dora": ("qwen3_moe", {"target_parameters": EXPERTS, "use_dora": True}, "use_dora: True does not go with"),
    "pissa": ("qwen3_moe", {"target_parameters": EXPERTS, "init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
    "rank": (
        "qwen3_moe",
        {"target_parameters": EXPERTS, "rank_pattern": {"down_proj": 25}},
        "25, .* 1 to 24",
    ),
    "a typo": ("qwen3_moe", {"target_parameters": ["experts.gate_up_prog"]}, r"matches no parameter.*gate_up_proj"),
    "a table": ("qwen3_moe", {"target_parameters": ["embed_tokens.weight"]}, "Embedding.*named in target_modules"),
    "a norm": ("qwen3_moe", {"target_parameters": ["input_layernorm.weight"]}, "RMSNorm"),
    "a linear's bias": ("qwen2_moe", {"target_parameters": ["q_proj.bias"]}, "of a Linear"),
    "a gate of one output": (
        "qwen2_moe",
        {"target_modules": ["shared_expert_gate"]},
        "it can be 1 to 1",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_in_words(what: str) -> None:
    kind, settings, words = REFUSED[what]
    adapters = open_moe(kind)
    with pytest.raises(UserError, match=words):
        adapters.add("it", lora(**settings))
    assert adapters.names == []


def test_experts_whose_rows_are_not_the_tokens_are_refused() -> None:
    model = make_moe("jetmoe", kv_channels=8)
    adapters = Adapters(model, describe(model))
    missed = left_out(adapters.add("it", lora()), model, adapters.architecture)
    assert missed is not None
    assert missed.to_include == ()
    with pytest.raises(UserError, match="not called with the text's tokens"):
        adapters.add("experts", lora(target_parameters=["mlp.input_linear.weight"]))


def test_a_gate_of_one_output_is_skipped_unless_it_is_named() -> None:
    adapters = open_moe("qwen2_moe")
    assert any(path.endswith("shared_expert_gate") for path in adapters.architecture.linears)
    for method in ("lora", "adalora"):
        adapter = adapters.add(method, kit.method_config(method))
        assert not [key for key in adapter.tensors() if "shared_expert_gate" in key]
    named = {"target_modules": ["shared_expert_gate"], "rank_pattern": {"shared_expert_gate": 1}}
    kit.randomize(adapters.add("gate", lora(**named)), scale=0.5)
    assert largest(our_logits(adapters, "gate"), our_logits(adapters, None)) > 1e-3


# Adapters that share a pass: (name, configuration).
def crowd(adapters: Adapters) -> list[str | None]:
    settings: dict[str, Any] = {
        "one": lora(target_parameters=EXPERTS),
        "two": lora(target_modules=[], target_parameters=["gate.weight", "experts.down_proj"]),
        "linear": lora(),
        "prompt": METHODS["prompt_tuning"](num_virtual_tokens=3),
    }
    for seed, (name, config) in enumerate(settings.items()):
        kit.randomize(adapters.add(name, config), seed, scale=0.1)
    return ["one", None, "linear", "prompt", "two"]


@pytest.mark.parametrize("path", ["padded", "stream", "exact", "checkpointing"])
def test_beside_others_as_alone(path: str) -> None:
    """Values and gradients; in exact mode to the bit."""
    model = make_moe("qwen3_moe", torch.float32 if path == "exact" else torch.float64)
    shape = replace(describe(model), install_attention=install_interface)
    adapters = Adapters(
        model, shape, padded=path in ("padded", "checkpointing"), exact=path == "exact",
        checkpointing=path == "checkpointing",
    )  # fmt: skip
    names = crowd(adapters)
    together = [Part(name, TEXTS[: 1 + i % 3]) for i, name in enumerate(names)]
    alone = [kit.hidden_of(adapters, [part]) for part in together]
    found: dict[str, list[dict[str, Tensor]]] = {str(name): [] for name in names if name}
    for hidden in ([h for one in alone for h in one], kit.hidden_of(adapters, together)):
        torch.autograd.backward([h.square().mean() for h in hidden if h.requires_grad])
        for name, gradients in found.items():
            gradients.append(kit.gradients(adapters[name]))
    beside = kit.hidden_of(adapters, together)
    limit = 0 if path == "exact" else 1e-12 if path == "stream" else LIMIT
    kit.measured(path, largest([h for one in alone for h in one], beside), limit)
    for name, (first, second) in found.items():
        assert first.keys() == second.keys() == dict(adapters[name].named_parameters()).keys()
        kit.measured(f"{path} {name}", largest(list(first.values()), list(second.values())), limit)


def test_nothing_is_left_behind() -> None:
    adapters = open_moe("gpt_oss")
    experts = adapters.model.get_submodule(adapters.architecture.experts[0])
    kind, keys = type(experts), set(experts.__dict__)
    before = kit.sha256(adapters.model.parameters())
    kit.randomize(adapters.add("it", lora(target_parameters=EXPERTS)))
    assert type(experts) is not kind
    our_logits(adapters, "it")
    adapters.remove("it")
    assert type(experts) is kind
    assert set(experts.__dict__) == keys
    assert kit.sha256(adapters.model.parameters()) == before


def test_two_on_the_same_rows_add_up() -> None:
    adapters = open_moe("qwen3_moe")
    for seed, name in enumerate(("a", "b")):
        kit.randomize(adapters.add(name, lora(target_modules=[], target_parameters=EXPERTS)), seed, scale=0.1)
    adapters.stack("both", ["a", "b"])
    stacked = our_logits(adapters, "both")
    model = make_moe("qwen3_moe")
    first = adapters.merge("a").tensors
    model.load_state_dict(first)
    other = Adapters(model, describe(model))
    other.add("b", lora(target_modules=[], target_parameters=EXPERTS))
    other["b"].load_state_dict(adapters["b"].state_dict())
    kit.measured("stack", largest(stacked, our_logits(other, "b")), LIMIT)


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss", "granitemoe", "phimoe"])
def test_merged_equals_routed(kind: str) -> None:
    adapters = open_moe(kind)
    names = [*EXPERTS, "router.weight"] if kind in ("gpt_oss", "phimoe") else EXPERTS
    kit.randomize(adapters.add("it", lora(target_parameters=names)), scale=0.1)
    merged, routed = adapters.merge("it"), our_logits(adapters, "it")
    model = make_moe(kind)
    model.load_state_dict(merged.tensors)
    kit.measured(kind, largest(their_logits(model), routed), LIMIT)


def test_combining_is_refused_in_words() -> None:
    adapters = open_moe("qwen3_moe")
    for name in ("a", "b"):
        adapters.add(name, lora(target_parameters=EXPERTS))
    with pytest.raises(UserError, match=r"'a' adapts parameters .* Stack the adapters"):
        adapters.combine("c", ["a", "b"])


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "vera", "lora+bitfit"])
def test_what_is_not_reached_is_said(method: str) -> None:
    adapters = open_moe("glm4_moe")
    model, shape = adapters.model, adapters.architecture
    names = method.replace("dora", "lora").split("+")
    configs = [kit.method_config(n, **({"use_dora": True} if method == "dora" else {})) for n in names]
    config = configs[0] if len(configs) == 1 else CombinedConfig(parts=tuple(configs))
    missed = left_out(adapters.add("it", config), model, shape)
    assert missed is not None
    assert missed.names == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    experts = 4 * (2 * 24 * 32 + 32 * 24)
    assert missed.share == pytest.approx(experts / sum(p.numel() for p in model.parameters()))
    told = str(missed)
    assert f"{missed.share:.1%} of the base's parameters" in told
    assert "target_parameters: [mlp.experts.gate_up_proj, mlp.experts.down_proj]" in told
    assert told.endswith("of method lora.") == (names[0] != "lora")
    some = left_out(adapters.add("some", lora(target_parameters=EXPERTS[:1])), model, shape)
    assert some is not None
    assert some.names == ("mlp.experts.down_proj",)
    assert left_out(adapters.add("all", lora(target_parameters=EXPERTS)), model, shape) is None
    assert left_out(adapters.add("none", kit.method_config("prompt_tuning")), model, shape) is None


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_on_a_quantised_base(kind: str, tmp_path: Path) -> None:
    """The linears are in NF4, the experts as they were; peft loads the file on such a base."""
    pytest.importorskip("bitsandbytes")
    from weft.models.load import load_base
    from weft.models.reach import unquantized

    make_moe(kind, torch.float32, hidden_size=64).save_pretrained(tmp_path / "base")
    options = {"dtype": "float32", "device": "cpu", "tokenizer": object()}
    base, other = (load_base(str(tmp_path / "base"), quantization="nf4", **options) for _ in range(2))
    told = unquantized(base.model, base.architecture)
    assert told is not None
    assert told.startswith("quantization leaves the experts in float32")
    adapters = Adapters(base.model, base.architecture)
    kit.randomize(adapters.add("it", lora(target_parameters=EXPERTS)), scale=0.05)
    adapters.save("it", tmp_path / "it")
    theirs = in_peft(kind, tmp_path / "it", other.model)
    with torch.no_grad():
        ours, wanted, bare = our_logits(adapters, "it"), their_logits(theirs), our_logits(adapters, None)
    adapters.close()
    # bitsandbytes rounds by the number of rows: its own difference between these texts together and one by one.
    plain = largest(bare, their_logits(base.model))
    kit.measured("nf4", largest(ours, wanted), max(LIMIT, 10 * plain), derived=True)


def test_files_name_their_modules_on_every_base(tmp_path: Path) -> None:
    model = kit.make_model("llama")
    adapters = Adapters(model, describe(model))
    for method in ("lora", "adalora", "ia3", "vera"):
        adapters.add(method, kit.method_config(method))
        adapters.save(method, tmp_path / method)
        named = json.loads((tmp_path / method / "adapter_config.json").read_text())["target_modules"]
        assert isinstance(named, list)
    entries = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert entries["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert entries["target_parameters"] is None
