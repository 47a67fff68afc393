"""The rest of PEFT's LoRA family both ways: DoRA, embeddings, the head, biases, whole modules, PiSSA, AdaLoRA."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests import kit
from tests.contracts.test_peft import KINDS, LIMIT, TARGETS, common, edit, fresh_peft, peft_logits
from torch import Tensor

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.files.adapter_folder import read_tensors
from weft.models import describe

# What is not called as in Llama.
EMBEDDING = {"gpt2": "wte", "bloom": "word_embeddings", "gpt_neox": "embed_in"}
NORM = {"qwen2": "post_attention_layernorm", "gpt2": "ln_1", "opt": "self_attn_layer_norm"}
LAYERS = {"gpt2": "h", "bloom": "h"}
PART = {"opt": "self_attn"}
# The four that the rest of the suite knows well. What else there is is run by make test-slow.
FAST = KINDS[:4]


def on_all_kinds(variants: list[str], always: list[str]) -> list[Any]:
    """(kind, variant): all of them, slow but for ``always`` on every kind, and others on one of ``FAST`` in turn."""
    return [
        pytest.param(
            kind,
            variant,
            marks=[] if variant in always or (kind in FAST and (i + j) % len(FAST) == 0) else pytest.mark.slow,
        )
        for i, kind in enumerate(KINDS)
        for j, variant in enumerate(variants)
    ]


def variants(kind: str) -> dict[str, dict[str, Any]]:
    """PEFT configurations of LoRA; ours have the same fields."""
    a, b, *_ = names = TARGETS[kind]
    table, head = EMBEDDING.get(kind, "embed_tokens"), "lm_head"
    norm = NORM.get(kind, "input_layernorm")
    layers, part = LAYERS.get(kind, "layers"), PART.get(kind, "mlp")
    return {
        "dora": {"use_dora": True},
        "dora, patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {a: 2}, "alpha_pattern": {b: 5}},
        "embedding": {"target_modules": [table, a]},
        "embedding alone, rslora": {"target_modules": [table], "use_rslora": True},
        "embedding, dora": {"target_modules": [table, b], "use_dora": True},
        "head": {"target_modules": [head, a]},
        "head, dora": {"target_modules": [head], "use_dora": True},
        "bias all": {"bias": "all"},
        "bias lora_only": {"bias": "lora_only"},
        "bias lora_only, dora": {"bias": "lora_only", "use_dora": True},
        "saved head": {"modules_to_save": [head]},
        "saved norm": {"modules_to_save": [norm], "target_modules": names},
        "saved embedding": {"modules_to_save": [table]},
        "saved target": {"modules_to_save": [a]},
        "saved block part": {"modules_to_save": [f"{layers}.1.{part}"], "target_modules": names},
        "layers_pattern": {"layers_to_transform": [1], "layers_pattern": layers},
    }


VARIANTS = list(variants("llama"))


def lora_config(kind: str, variant: str) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 7, "target_modules": TARGETS[kind], **variants(kind)[variant]}


def our_logits(adapters: Adapters, name: str | None, texts: list[list[int]]) -> list[Tensor]:
    """Also where the adapter changes the head."""
    return [adapters.logits(h, [(name, len(h))]) for h in kit.hidden_of(adapters, [Part(name, texts)])]


def their_gradients(model: Any) -> dict[str, Tensor]:
    """peft's gradients under the names of its file."""
    found = {}
    for name, parameter in model.named_parameters():
        key = name.replace(".modules_to_save.default", "").replace(".default", "")
        if "lora_magnitude_vector" in key:
            key = key.removesuffix(".weight")
        if parameter.grad is not None and not name.endswith("ranknum.default"):
            found[key] = parameter.grad
    return found


def without_copies(tensors: dict[str, Tensor]) -> set[str]:
    """peft saves the base's table too where it is tuned."""
    return {key for key in tensors if not key.endswith("base_layer.weight")}


def check_theirs(kind: str, what: str, theirs: Any, folder: Path) -> None:
    """Save in peft, load here: same logits, same gradients, and what we save is what we loaded."""
    theirs.save_pretrained(folder / "theirs")
    texts = kit.texts(4, seed=2)
    model = kit.make_model(kind)
    adapters = Adapters(model, describe(model))
    adapter = adapters.load("it", folder / "theirs")
    ours, wanted = our_logits(adapters, "it", texts), peft_logits(theirs, texts, padded=False)
    kit.measured(f"{kind} {what} logits, ours - peft", kit.difference(ours, wanted), LIMIT)
    assert kit.difference(ours, our_logits(adapters, None, texts)) > 1e-3, "the adapter does nothing"
    torch.autograd.backward([x.square().mean() for x in ours])
    torch.autograd.backward([x.square().mean() for x in wanted])
    mine = {key: p.grad for key, p in adapter.tensors().items() if p.grad is not None}
    other = their_gradients(theirs)
    assert mine.keys() == other.keys()
    for key, gradient in mine.items():
        kit.measured(f"{kind} {what} gradient {key}", kit.difference([gradient], [other[key]]), LIMIT)
    adapters.save("it", folder / "ours")
    stored, first = (read_tensors(folder / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert set(stored) == without_copies(first)
    assert all(torch.equal(stored[key], first[key]) for key in stored)


@pytest.mark.parametrize(("kind", "variant"), on_all_kinds(VARIANTS, ["dora", "saved head", "embedding"]))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_to_ours(kind: str, variant: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(**common(kind), **lora_config(kind, variant))
    check_theirs(kind, variant, fresh_peft(kind, config), tmp_path)


def check_ours(kind: str, what: str, adapters: Adapters, folder: Path, *, limit: float = LIMIT) -> None:
    """Save here, load in peft, and here again: same logits, to the bit here."""
    adapters.save("it", folder)
    texts = kit.texts(4, seed=2)
    ours = our_logits(adapters, "it", texts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(kit.make_model(adapters.architecture.model_type), folder).eval()
        names = set(peft.get_peft_model_state_dict(theirs))
    kit.measured(f"{kind} {what}: peft - ours", kit.difference(ours, peft_logits(theirs, texts, padded=False)), limit)
    assert {name for name in names if not name.endswith("base_layer.weight")} == set(
        read_tensors(folder / "adapter_model.safetensors")
    )
    adapters.load("again", folder)
    again = our_logits(adapters, "again", texts)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    adapters.save("again", folder / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json", "weft.json"):
        assert (folder / name).read_bytes() == (folder / "again" / name).read_bytes(), name


OUR_INITS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, sketched": {"init_lora_weights": "pissa_niter_4"},
    "pissa, patterns": {
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "rank_pattern": {r".*\.0\..*": 2},
        "alpha_pattern": {r".*\.1\..*": 3.5},
    },
    "pissa, dora": {"init_lora_weights": "pissa", "use_dora": True},
    "lora+": {"loraplus_lr_ratio": 16},
    "all of it": {"bias": "all", "use_dora": True, "init_lora_weights": "pissa_niter_2"},
}


@pytest.mark.parametrize(("kind", "variant"), on_all_kinds([*VARIANTS, *OUR_INITS], ["dora", "bias all", "pissa"]))
def test_ours_to_peft(kind: str, variant: str, tmp_path: Path) -> None:
    settings = lora_config(kind, variant) if variant in VARIANTS else {"r": 4, **OUR_INITS[variant]}
    model = kit.make_model(kind)
    adapters = Adapters(model, describe(model))
    adapter = adapters.add("it", kit.METHODS["lora"](**settings))
    texts = kit.texts(4, seed=2)
    plain, first = our_logits(adapters, None, texts), our_logits(adapters, "it", texts)
    assert all(torch.equal(a, b) for a, b in zip(plain, first, strict=True)), "the beginning is the identity"
    kit.randomize(adapter, 5)
    assert kit.difference(our_logits(adapters, "it", texts), plain) > 1e-3
    check_ours(kind, variant, adapters, tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_table_that_is_not_the_bases_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    theirs = fresh_peft("llama", config)
    with torch.no_grad():
        theirs.get_input_embeddings().base_layer.weight[3] += 1
    theirs.save_pretrained(tmp_path)
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    with pytest.raises(UserError, match=r"embed_tokens\.base_layer\.weight.*not the base's"):
        adapters.load("it", tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"use_dora": True}, "no tensor .*lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, r"no tensor .*lm_head\.weight"),
        ({"modules_to_save": ["nowhere"]}, "modules_to_save: 'nowhere'"),
        ({"bias": "everything"}, "bias"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_refused(
    entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fresh_peft("llama", peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    edit(tmp_path, **entries)
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    with pytest.raises(UserError, match=message):
        adapters.load("it", tmp_path)
    assert adapters.names == []


def test_a_converted_pissa_of_high_rank_is_loaded(tmp_path: Path) -> None:
    """2 r may be more than the module's size; a file is not refused for that."""
    model = kit.make_model("llama")
    adapters = Adapters(model, describe(model))
    kit.randomize(adapters.add("it", kit.METHODS["lora"](r=12, init_lora_weights="pissa", target_modules=["k_proj"])))
    adapters.save("it", tmp_path)
    (tmp_path / "weft.json").unlink()  # now it is anybody's
    adapters.load("again", tmp_path)
    texts = kit.texts(3)
    difference = kit.difference(our_logits(adapters, "it", texts), our_logits(adapters, "again", texts))
    kit.measured("rank 24 on 16 outputs", difference, 1e-5)


def adalora_variants(kind: str) -> dict[str, dict[str, Any]]:
    a, *_ = names = TARGETS[kind]
    head = "lm_head"
    return {
        "plain": {"target_modules": names},
        "all-linear": {"target_modules": "all-linear"},
        "head": {"target_modules": [head, a]},
        "bias": {"target_modules": names, "bias": "all"},
        "saved head": {"target_modules": names, "modules_to_save": [head]},
        "layer": {"target_modules": names, "layers_to_transform": [1]},
    }


ADALORA = list(adalora_variants("llama"))


def fresh_adalora(kind: str, variant: str, *, drop: bool = False) -> Any:
    """peft's AdaLoRA; with ``drop`` its allocator has masked half of the ranks."""
    config = peft.AdaLoraConfig(
        **common(kind), init_r=6, target_r=3, lora_alpha=9, total_step=10, **adalora_variants(kind)[variant]
    )
    theirs = fresh_peft(kind, config)
    if drop:
        ids = torch.tensor([kit.texts(1, 9, 9)[0]])
        theirs(input_ids=ids, labels=ids).loss.backward()
        theirs.base_model.update_and_allocate(1)
        theirs.base_model.update_and_allocate(10)
        theirs.zero_grad()
    return theirs


@pytest.mark.parametrize(("kind", "variant"), on_all_kinds(ADALORA, ["plain"]))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adalora_peft_to_ours(kind: str, variant: str, tmp_path: Path) -> None:
    check_theirs(kind, f"adalora {variant}", fresh_adalora(kind, variant), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adalora_with_dropped_ranks_from_peft(kind: str, tmp_path: Path) -> None:
    theirs = fresh_adalora(kind, "plain", drop=True)
    theirs.save_pretrained(tmp_path / "theirs")
    texts = kit.texts(4, seed=2)
    model = kit.make_model(kind)
    adapters = Adapters(model, describe(model))
    adapter: Any = adapters.load("it", tmp_path / "theirs")
    pattern = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["rank_pattern"]
    assert adapter.ranks() == {key.removesuffix(".lora_E"): sum(kept) for key, kept in pattern.items()}
    assert sum(adapter.ranks().values()) == 3 * len(adapter.ranks())
    assert len(set(adapter.ranks().values())) > 1, "no module differs"
    difference = kit.difference(our_logits(adapters, "it", texts), peft_logits(theirs, texts, padded=False))
    kit.measured(f"{kind} adalora with dropped ranks, ours - peft", difference, LIMIT)
    check_ours(kind, "adalora with dropped ranks", adapters, tmp_path / "ours")


@pytest.mark.parametrize(("kind", "variant"), on_all_kinds(ADALORA, ["plain"]))
def test_adalora_ours_to_peft(kind: str, variant: str, tmp_path: Path) -> None:
    model = kit.make_model(kind)
    adapters = Adapters(model, describe(model))
    settings = {"init_r": 6, "target_r": 3, **adalora_variants(kind)[variant]}
    adapter = kit.randomize(adapters.add("it", kit.METHODS["adalora"](**settings)), 5)
    check_ours(kind, f"adalora {variant}", adapters, tmp_path)
    adapters.remove("again")
    # One module loses everything.
    with torch.no_grad():
        for index, layer in enumerate(adapter.layers):  # type: ignore[attr-defined]
            layer.kept[: 6 if index == 0 else index % 5] = False
            layer.zero_the_rest()
    check_ours(kind, f"adalora {variant}, ranks dropped", adapters, tmp_path / "dropped")
