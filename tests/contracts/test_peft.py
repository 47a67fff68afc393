"""The same weights give the same numbers in peft, and files go both ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests import kit
from torch import Tensor, nn

from weft.api import Adapters
from weft.core.adapter import Adapter
from weft.core.stream import Part
from weft.errors import UserError
from weft.files.adapter_folder import read_tensors
from weft.methods import METHODS
from weft.models import describe

KINDS = ["llama", "bloom", "gpt2", "qwen2", "mistral", "gemma", "gpt_neox", "opt"]
# What a method does with its settings depends little on the architecture: the others see the rest in the slow suite.
MANY = ("llama", "gpt2")
# In float32: about fifteen times what three kinds of kernels gave.
LIMIT = 2e-5
_LLAMA_NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "qwen2": ["k_proj", "o_proj", "up_proj"],
           "gpt2": ["c_attn", "c_fc"], "bloom": ["query_key_value", "dense_h_to_4h"],
           "mistral": ["q_proj", "o_proj", "down_proj"], "gemma": ["q_proj", "v_proj", "gate_proj"],
           "gpt_neox": ["query_key_value", "dense_4h_to_h"], "opt": ["q_proj", "fc1", "fc2"]}  # fmt: skip
NORMS = {"gpt2": ["ln_1", "ln_2", "ln_f"], "bloom": ["input_layernorm", "ln_f", "word_embeddings_layernorm"],
         "gpt_neox": ["input_layernorm", "post_attention_layernorm", "final_layer_norm"],
         "opt": ["self_attn_layer_norm", "final_layer_norm"]}  # fmt: skip


def common(kind: str) -> dict[str, Any]:
    return {"task_type": "CAUSAL_LM", **({"fan_in_fan_out": True} if kind == "gpt2" else {})}


def token_places(kind: str) -> dict[str, list[int]]:
    """Rows of the embeddings, and of a head that is not tied to them."""
    model = kit.make_model(kind)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    ends = [table] if head.weight is table.weight else [table, head]
    return {path: [40, 7] for path, module in model.named_modules() if any(module is end for end in ends)}


def token_variants(kind: str) -> dict[str, dict[str, Any]]:
    places = list(token_places(kind))
    return {"plain": {"token_indices": [40, 7], "target_modules": [p.rpartition(".")[2] for p in places]}}


def lora_variants(kind: str) -> dict[str, dict[str, Any]]:
    """PEFT configurations that ours claims to read."""
    a, b, *_ = TARGETS[kind]
    return {
        "plain": {"r": 4, "lora_alpha": 7, "target_modules": TARGETS[kind]},
        "all-linear": {"r": 3, "target_modules": "all-linear"},
        "rank_pattern": {"r": 4, "target_modules": TARGETS[kind], "rank_pattern": {a: 2}, "alpha_pattern": {b: 5}},
        "pattern of paths": {"r": 4, "target_modules": TARGETS[kind], "rank_pattern": {rf".*\.1\..*{a}": 3},
                             "alpha_pattern": {rf"^.*\.0\..*{b}": 32}},
        "rslora": {"r": 9, "use_rslora": True, "target_modules": TARGETS[kind]},
        "layers": {"r": 4, "target_modules": TARGETS[kind], "layers_to_transform": [1]},
        "one layer": {"r": 4, "target_modules": TARGETS[kind], "layers_to_transform": 0},
        "regex": {"r": 4, "target_modules": rf".*\.(0|1)\..*{a}"},
        "gaussian": {"r": 4, "target_modules": TARGETS[kind], "init_lora_weights": "gaussian"},
        "tokens": {"r": 4, "target_modules": TARGETS[kind], "trainable_token_indices": token_places(kind)},
        "excluded": {"r": 4, "target_modules": "all-linear", "exclude_modules": [a]},
    }  # fmt: skip


def virtual_variants(kind: str) -> dict[str, dict[str, Any]]:
    # peft takes the blocks' width for the embeddings', which OPT's narrower ones do not have.
    return {"plain": {"num_virtual_tokens": 5, **({"token_dim": 24} if kind == "opt" else {})}}


def prefix_variants(kind: str) -> dict[str, dict[str, Any]]:
    projection = {"prefix_projection": True, "encoder_hidden_size": 24}
    return {"plain": {"num_virtual_tokens": 5}, "projection": {"num_virtual_tokens": 5, **projection}}


def ia3_variants(kind: str) -> dict[str, dict[str, Any]]:
    a, b, *_ = TARGETS[kind]
    return {
        "plain": {},
        "outputs only": {"target_modules": [a, b], "feedforward_modules": []},
        "expressions": {"target_modules": rf".*\.1\..*({a}|{b})", "feedforward_modules": f".*{b}"},
    }


def norm_variants(kind: str) -> dict[str, dict[str, Any]]:
    names = NORMS.get(kind, _LLAMA_NORMS)
    return {"plain": {"target_modules": names}, "one name": {"target_modules": names[:1]}}


# Method -> PEFT's configuration class and what it is given. Another method that PEFT has is one line here and in OURS.
THEIRS: dict[str, tuple[type[peft.PeftConfig], Callable[[str], dict[str, dict[str, Any]]]]] = {
    "lora": (peft.LoraConfig, lora_variants),
    "prompt_tuning": (peft.PromptTuningConfig, virtual_variants),
    "prefix_tuning": (peft.PrefixTuningConfig, prefix_variants),
    "ia3": (peft.IA3Config, ia3_variants),
    "ln_tuning": (peft.LNTuningConfig, norm_variants),
    "trainable_tokens": (peft.TrainableTokensConfig, token_variants),
}


def peft_config(kind: str, method: str, variant: str = "plain") -> peft.PeftConfig:
    cls, variants = THEIRS[method]
    given = {**common(kind), **variants(kind)[variant]}
    return cls(**{key: value for key, value in given.items() if key in cls.__dataclass_fields__})


def fresh_peft(kind: str, config: peft.PeftConfig, **more: Any) -> Any:
    """A peft model over our tiny base, its adapter's values moved away from zero."""
    model = peft.get_peft_model(kit.make_model(kind, **more), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def peft_logits(model: Any, texts: list[list[int]], *, padded: bool) -> list[Tensor]:
    """Logits of each text's own tokens, over one right-padded batch or one text at a time."""
    if not padded:
        return [peft_logits(model, [ids], padded=True)[0] for ids in texts]
    width = max(map(len, texts))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in texts])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in texts])
    logits = model(input_ids=ids, attention_mask=mask).logits
    virtual = logits.shape[1] - width  # prompt tuning's rows stand in front
    return [row[virtual : virtual + len(text)] for row, text in zip(logits, texts, strict=True)]


def our_logits(adapters: Adapters, name: str, texts: list[list[int]]) -> list[Tensor]:
    return [adapters.logits(h, [(name, len(h))]) for h in kit.hidden_of(adapters, [Part(name, texts)])]


def cases() -> Iterator[Any]:
    for method, (_, variants) in THEIRS.items():
        for kind in KINDS:
            for index, variant in enumerate(variants(kind)):
                # Each method with every second of the kinds, and with all its variants on those that are usual.
                turn = (list(THEIRS).index(method) + KINDS.index(kind)) % 2
                slow = [pytest.mark.slow] * (kind not in MANY and (index > 0 or turn == 1))
                yield pytest.param(kind, method, variant, marks=slow)


def their_gradients(model: Any) -> dict[str, Tensor]:
    """peft's gradients under the names of its file."""
    kept = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    grads = {}
    for name, parameter in model.named_parameters():
        if name in kept and parameter.grad is not None:
            grads[name.replace(".default", "").replace("prompt_encoder.embedding.weight", "prompt_embeddings")] = (
                parameter.grad
            )
    return grads


def our_gradients(adapter: Adapter) -> dict[str, Tensor]:
    return {key: p.grad for key, p in adapter.tensors().items() if p.grad is not None}


@pytest.mark.parametrize(("kind", "method", "variant"), cases())
def test_peft_to_ours(kind: str, method: str, variant: str, tmp_path: Path) -> None:
    """peft's save_pretrained loads here: same logits, same gradient of every parameter."""
    theirs = fresh_peft(kind, peft_config(kind, method, variant))
    theirs.save_pretrained(tmp_path)
    texts = kit.texts(4, seed=2)
    model = kit.make_model(kind)
    adapters = Adapters(model, describe(model))
    adapter = adapters.load("it", tmp_path)
    assert adapter.config.method == method
    ours = our_logits(adapters, "it", texts)
    padded, single = (peft_logits(theirs, texts, padded=p) for p in (True, False))
    kit.measured(f"{kind} {method} {variant} logits, ours - peft one by one", kit.difference(ours, single), LIMIT)
    kit.measured(f"{kind} {method} {variant} logits, ours - peft padded", kit.difference(ours, padded), LIMIT)
    plain = [adapters.logits(h, [(None, len(h))]) for h in kit.hidden_of(adapters, [Part(None, texts)])]
    assert kit.difference(ours, plain) > 1e-3, "the adapter does nothing: equality would prove nothing"
    if variant == "projection":
        return  # the file has lost the encoder
    torch.autograd.backward([x.square().mean() for x in ours])
    torch.autograd.backward([x.square().mean() for x in single])
    mine, other = our_gradients(adapter), their_gradients(theirs)
    assert mine.keys() == other.keys()
    assert mine
    for key in mine:
        kit.measured(f"{kind} {method} {variant} gradient {key}", float((mine[key] - other[key]).abs().max()), LIMIT)


OURS: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {"r": 3},
        {"r": 2, "lora_dropout": 0.3, "target_modules": r".*\.1\..*"},
        {"r": 4, "layers_to_transform": [1]},
        {"r": 4, "trainable_token_indices": [40, 7]},
        {"r": 4, "use_rslora": True, "rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {r".*\.1\..*": 3.5}},
    ],
    "prompt_tuning": [{"num_virtual_tokens": 3}],
    "prefix_tuning": [{"num_virtual_tokens": 3}, {"num_virtual_tokens": 3, "prefix_projection": True}],
    "ia3": [{}, {"target_modules": r".*\.1\..*", "feedforward_modules": r".*(fc2|proj|4h_to_h)"}],
    "ln_tuning": [{}, {"target_modules": r".*\.1\..*"}],
    "trainable_tokens": [{"token_indices": [40, 7]}],
}


def our_cases() -> Iterator[Any]:
    for method, several in OURS.items():
        for kind in KINDS:
            for index, settings in enumerate(several):
                slow = [pytest.mark.slow] * (index > 0 and kind not in MANY)
                yield pytest.param(kind, method, settings, marks=slow, id=f"{kind}-{method}-{json.dumps(settings)}")


@pytest.mark.parametrize(("kind", "method", "settings"), our_cases())
def test_ours_to_peft(kind: str, method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = kit.make_model(kind)
    adapters = Adapters(model, describe(model))
    kit.randomize(adapters.add("it", kit.METHODS[method](**settings)), 5)
    adapters.save("it", tmp_path)
    texts = kit.texts(4, seed=2)
    ours = our_logits(adapters, "it", texts)
    theirs = peft.PeftModel.from_pretrained(kit.make_model(kind), tmp_path).eval()
    kit.measured(f"{kind} {method}: peft - ours", kit.difference(ours, peft_logits(theirs, texts, padded=True)), LIMIT)
    # peft drops nothing that we wrote, and misses nothing.
    state, stored = peft.get_peft_model_state_dict(theirs), read_tensors(tmp_path / "adapter_model.safetensors")
    assert state.keys() >= stored.keys()
    assert len({t.data_ptr() for t in state.values()}) == len(stored)  # a tied head has the table's rows


# Windows shorter than the texts, and shorter than the prefix; weights shared with the head; residuals in a row.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("mistral", {"sliding_window": 6}),
    "window of some layers": ("qwen2", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}),
    "window below the prefix": ("mistral", {"sliding_window": 4}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "wide heads": ("llama", {"head_dim": 24}),
    "residuals in a row": ("gpt_neox", {"use_parallel_residual": False}),
    "norms after": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
}


@pytest.mark.parametrize("padded", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["stream", "padded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_unusual_shapes(shape: str, padded: bool, tmp_path: Path) -> None:
    kind, more = SHAPES[shape]
    texts = kit.texts(4, 8, 20, seed=2)
    for method in THEIRS:
        config = peft_config(kind, method)
        if hasattr(config, "token_dim"):
            config.token_dim = None
        if method == "trainable_tokens" and shape == "tied":
            config.target_modules = ["embed_tokens"]
        theirs = fresh_peft(kind, config, **more)
        theirs.save_pretrained(tmp_path / method)
        adapters = Adapters(model := kit.make_model(kind, **more), describe(model), padded=padded)
        adapters.load("it", tmp_path / method)
        worst = kit.difference(our_logits(adapters, "it", texts), peft_logits(theirs, texts, padded=True))
        kit.measured(f"{shape} {method} logits, ours - peft", worst, LIMIT)


def edit(folder: Path, **entries: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


REFUSED = {
    "lora_bias": True,
    "layer_replication": [[0, 2], [1, 3]],
    "use_qalora": True,
    "a_key_of_the_future": 3,
    "init_lora_weights": "pissa",
}


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_what_changes_the_computation_is_refused_by_name(key: str, tmp_path: Path) -> None:
    fresh_peft("llama", peft_config("llama", "lora")).save_pretrained(tmp_path)
    edit(tmp_path, **{key: REFUSED[key]})
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    with pytest.raises(UserError, match=key):
        adapters.load("it", tmp_path)
    assert adapters.names == []


@pytest.mark.parametrize("method", kit.ALL)
def test_an_unknown_key_is_refused_by_name(method: str, tmp_path: Path) -> None:
    """Of every method, by whoever wrote it; the same key with nothing in it changes nothing."""
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    adapters.add("it", kit.method_config(method))
    adapters.save("it", tmp_path)
    (tmp_path / "weft.json").unlink()
    edit(tmp_path, a_key_of_the_future=3)
    with pytest.raises(UserError, match="a_key_of_the_future"):
        adapters.load("again", tmp_path)
    for nothing in (None, False, {}):
        edit(tmp_path, a_key_of_the_future=nothing)
        adapters.load("again", tmp_path)
        adapters.remove("again")
    if METHODS[method].peft_type not in ("LORA", "ADALORA"):
        edit(tmp_path, modules_to_save=["lm_head"])
        with pytest.raises(UserError, match="modules_to_save"):
            adapters.load("again", tmp_path)


def test_an_unknown_kind_and_another_base_are_refused(tmp_path: Path) -> None:
    fresh_peft("llama", peft_config("llama", "lora")).save_pretrained(tmp_path)
    adapters = Adapters(model := kit.make_model("gpt2"), describe(model))
    with pytest.raises(UserError, match="matches no linear module"):
        adapters.load("it", tmp_path)
    edit(tmp_path, peft_type="A_KIND_OF_THE_FUTURE")
    with pytest.raises(UserError, match="A_KIND_OF_THE_FUTURE"):
        adapters.load("it", tmp_path)
    assert adapters.names == []


def test_a_wider_base_is_refused(tmp_path: Path) -> None:
    model = kit.make_model("llama")
    adapters = Adapters(model, describe(model))
    for method in kit.ALL:
        adapters.add(method, kit.method_config(method))
        adapters.save(method, tmp_path / method)
    from transformers import LlamaForCausalLM

    config = kit.model_config("llama")
    config.update({"hidden_size": 64, "head_dim": 16})
    wide = LlamaForCausalLM(config)
    other = Adapters(wide, describe(wide))
    for method in kit.ALL:
        with pytest.raises(UserError, match="has shape"):
            other.load(method, tmp_path / method)
    assert other.names == []
    assert all(
        type(m).__name__.removeprefix("Routed") == type(m).__name__ for m in wide.modules() if isinstance(m, nn.Linear)
    )


def test_loading_needs_no_tokenizer_though_the_beginning_did(tmp_path: Path) -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 90 for c in text]}

    model = kit.make_model("llama")
    adapters = Adapters(model, describe(model))
    texts = kit.texts(2)
    for method, settings in {
        "prompt_tuning": {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "hello"},
        "prefix_tuning": {"prefix_init_text": "hello"},
    }.items():
        adapters.add(method, kit.METHODS[method](num_virtual_tokens=7, **settings), tokenizer=tokenizer)
        adapters.save(method, tmp_path / method)
        adapters.load(f"{method}-again", tmp_path / method)
        assert kit.difference(our_logits(adapters, method, texts), our_logits(adapters, f"{method}-again", texts)) == 0
