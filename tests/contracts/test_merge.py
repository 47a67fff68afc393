"""Merged equals routed: base and adapter in one model, which transformers loads alone, give the same numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests import kit
from tests.contracts.test_peft import THEIRS, fresh_peft, peft_config
from tests.contracts.test_peft_lora import VARIANTS, common, lora_config
from tests.contracts.test_routing import picture
from tests.contracts.test_seq2seq import make_model as make_seq2seq
from tests.kit.encoders import KINDS as ENCODERS
from tests.kit.encoders import make_encoder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from weft.api import Adapters
from weft.core.adapter import Adapter, BuildContext, MethodConfig
from weft.core.stream import Part
from weft.data import Sample
from weft.errors import UserError
from weft.heads.classification import ClassificationTask
from weft.layouts.encoder_decoder import start_token
from weft.merge.model import merged_model
from weft.methods import METHODS
from weft.methods.site_adapter import SiteAdapter
from weft.models import describe, load_base
from weft.objectives.passes import logits_of

KINDS = ["llama", "gpt2", "bloom", "qwen2", "gemma", "gpt_neox", "opt", "mistral", "falcon"]
FAST = ("llama", "gpt2", "bloom", "qwen2")
TIED = {"qwen2": {"tie_word_embeddings": True}}
LIMITS = {torch.float64: 1e-10, torch.float32: 3e-5}
# Where no module of a kind can have a bias but those that have one.
BITFIT: dict[str, dict[str, Any]] = {
    "llama": {"add_missing": None},
    "gemma": {"add_missing": True, "target_modules": ["attention"]},
    "qwen2": {"add_missing": False},
}


def config_of(kind: str, method: str) -> MethodConfig:
    more = BITFIT.get(kind, {}) if method == "bitfit" else {}
    return METHODS[method](**{**kit.SETTINGS.get(method, {}), **more})


def loaded_from(model: Any, folder: Path) -> Any:
    """Through files, as whoever gets the merged model: some buffers are made anew, in the dtype that is loaded."""
    model.save_pretrained(folder)
    kind = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(folder).eval()


@torch.no_grad()
def logits(adapters: Adapters, name: str | None) -> list[Tensor]:
    """Of a few texts, one at a time."""
    texts = kit.texts(4, seed=2)
    return [adapters.logits(h, [(name, len(h))]) for ids in texts for h in kit.hidden_of(adapters, [Part(name, [ids])])]


def relative(wanted: list[Tensor], found: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(wanted, found, strict=True))


def check_merged(base: Any, adapters: Adapters, name: str, folder: Path, what: str) -> Any:
    """Merged equals routed, and the base is what it was; gives the merged model."""
    before, routed = picture(base), logits(adapters, name)
    assert relative(routed, logits(adapters, None)) > 1e-3, "the adapter does nothing"
    merged = loaded_from(merged_model(base, adapters.architecture, adapters.merge(name)), folder / "merged")
    after = picture(base)
    assert all(after[key] == before[key] for key in before), "the base has changed"
    assert {p.dtype for p in merged.parameters()} == {adapters.dtype}
    other = Adapters(merged, describe(merged))
    kit.measured(f"{what}: merged - routed", relative(routed, logits(other, None)), LIMITS[adapters.dtype])
    other.close()
    if adapters.dtype == torch.float32:  # transformers computes norms and angles in float32 whatever the dtype
        with torch.no_grad():
            plain = [merged(torch.tensor([ids])).logits[0] for ids in kit.texts(4, seed=2)]
        kit.measured(f"{what}: merged, transformers alone - routed", relative(routed, plain), LIMITS[torch.float32])
    return merged


@pytest.mark.parametrize(
    ("method", "kind", "dtype"),
    kit.in_turn(
        sorted(set(kit.ALL) - kit.NOT_MERGEABLE),
        [k if k in FAST else pytest.param(k, marks=pytest.mark.slow, id=k) for k in KINDS],
        [pytest.param(torch.float64, id="fp64"), pytest.param(torch.float32, id="fp32")],
    ),
)
def test_merged_is_routed(method: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if method == "bitfit" and kind == "mistral":
        pytest.skip("has no bias and no switch for one")
    base = loaded_from(kit.make_model(kind, dtype, **TIED.get(kind, {})), tmp_path / "base")
    adapters = Adapters(base, describe(base))
    kit.randomize(adapters.add("it", config_of(kind, method)))
    check_merged(base, adapters, "it", tmp_path, f"{kind} {method}")


@pytest.mark.parametrize("method", sorted(set(kit.ALL) - kit.NOT_MERGEABLE))
def test_in_the_bases_own_dtype(method: str, tmp_path: Path) -> None:
    """Rounded once, so about as near to the numbers in 32 bits as base and adapter in 16."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        base = kit.make_model("llama", torch.bfloat16).to(dtype)
        adapters = Adapters(base, describe(base))
        kit.randomize(adapters.add("it", config_of("llama", method)))
        found[dtype] = logits(adapters, "it")
        if dtype == torch.bfloat16:
            new = merged_model(base, adapters.architecture, adapters.merge("it"))
            assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
            merged = loaded_from(new, tmp_path)
        adapters.close()
    other = Adapters(merged, describe(merged))
    ours, own = (relative(found[torch.float32], one) for one in (logits(other, None), found[torch.bfloat16]))
    kit.measured(f"bf16 {method}: error over that of the dtype", ours / own, 2.0, derived=True)


@pytest.mark.parametrize("method", sorted(kit.NOT_MERGEABLE))
def test_what_is_no_weights_says_so(method: str) -> None:
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    adapters.add("mine", kit.method_config(method))
    with pytest.raises(UserError, match=rf"'mine' \({method}\) cannot be merged: .* not weights|more than") as caught:
        adapters.merge("mine")
    instead = "system message" if method == "hard_prompt" else "Serve the adapter beside its base"
    assert instead in str(caught.value)
    adapters.add("both", METHODS["lora"](r=2))
    adapters.stack("stack", ["both", "mine"])
    with pytest.raises(UserError, match=rf"lora\+{method}: its part {method}\) cannot be merged"):
        adapters.merge("stack")


class _Square(nn.Module):
    def forward(self, x: Tensor, y: Tensor, segment: Any) -> Tensor:
        return y * y


class _NewConfig(MethodConfig):
    method = "new"
    peft_type = "NEW"

    def build(self, name: str, context: BuildContext) -> Adapter:
        return SiteAdapter(self, name, {context.architecture.linears[0]: _Square()})


def test_a_new_method_that_says_nothing_of_merging_is_refused() -> None:
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    adapters.add("it", _NewConfig())
    with pytest.raises(UserError, match=r"\(new\) cannot be merged: what it computes at .*q_proj.* is more than"):
        adapters.merge("it")


MORE: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, dora": {"init_lora_weights": "pissa", "use_dora": True},
    "all of it": {"bias": "all", "use_dora": True, "init_lora_weights": "pissa_niter_2", "use_rslora": True},
}


# In this order two that follow each other differ in both.
TYINGS = [
    pytest.param(kind, tied, id=f"{kind}-{'tied' if tied else 'untied'}")
    for first in (0, 1)
    for place, kind in enumerate(FAST)
    for tied in [(place + first) % 2 == 1]
]


@pytest.mark.parametrize(("variant", "kind", "tied"), kit.in_turn([*VARIANTS, *MORE], TYINGS, take=2))
def test_loras_family(variant: str, kind: str, tied: bool, tmp_path: Path) -> None:
    """Embeddings and heads too, where both are one tensor in the base: then they are two in the merged model."""
    base = loaded_from(kit.make_model(kind, tie_word_embeddings=tied), tmp_path / "base")
    adapters = Adapters(base, describe(base))
    settings = {"r": 4, **MORE[variant]} if variant in MORE else lora_config(kind, variant)
    kit.randomize(adapters.add("it", METHODS["lora"](**settings)))
    merged = check_merged(base, adapters, "it", tmp_path, f"{kind} {variant}")
    split = tied and ("embedding" in variant or "head" in variant)
    assert merged.config.tie_word_embeddings == (tied and not split)
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == (tied and not split)


COMBINED = [
    "lora+bitfit",
    "bitfit+lora",
    "lora+ia3",
    "ia3+lora",
    "lora+llama_pro",
    "ln_tuning+full",
    "full+ln_tuning",
    "vera+adalora+lora",
]


@pytest.mark.parametrize(
    ("methods", "dora", "kind"),
    kit.in_turn(COMBINED, [pytest.param(False, id=""), pytest.param(True, id="dora")], ["gpt2", "bloom"]),
)
def test_several_methods_in_one(methods: str, dora: bool, kind: str, tmp_path: Path) -> None:
    """In the order in which they act; also methods that look at the base's own bias (DoRA)."""
    base = kit.make_model(kind, torch.float64)
    adapters = Adapters(base, describe(base))
    names = methods.split("+")
    for index, method in enumerate(names):
        more = {"use_dora": dora, "bias": "all"} if method == "lora" else {}
        kit.randomize(adapters.add(method, kit.method_config(method, **more)), index)
    adapters.stack("it", names)
    check_merged(base, adapters, "it", tmp_path, f"{kind} {methods}")


def test_biases_where_the_architecture_has_no_place_for_them() -> None:
    for kind, place in (("llama", r"input_layernorm\.bias"), ("qwen2", r"o_proj\.bias"), ("mistral", r"q_proj\.bias")):
        adapters = Adapters(model := kit.make_model(kind), describe(model))
        kit.randomize(adapters.add("it", kit.method_config("bitfit")))
        with pytest.raises(UserError, match=rf"{kind} models have no place for .*{place}.* with add_missing: false"):
            merged_model(model, adapters.architecture, adapters.merge("it"))


def test_biases_by_the_configurations_switches() -> None:
    """Those that the switch brings along and nobody has asked for are zero."""
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    kit.randomize(adapters.add("it", METHODS["bitfit"](add_missing=True, target_modules=["v_proj"])))
    merged = merged_model(model, adapters.architecture, adapters.merge("it"))
    assert (merged.config.attention_bias, merged.config.mlp_bias) == (True, False)
    assert (model.config.attention_bias, model.config.mlp_bias) == (False, False)
    attention = merged.model.layers[0].self_attn
    assert attention.v_proj.bias.any()
    assert not attention.q_proj.bias.any()


def test_a_merge_shares_what_stays_and_copies_what_changes() -> None:
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    kit.randomize(adapters.add("it", METHODS["lora"](r=2, target_modules=["q_proj"])))
    merged, own = adapters.merge("it"), model.state_dict()
    assert set(merged.tensors) == set(own)
    changed = {key for key, tensor in merged.tensors.items() if tensor.data_ptr() != own[key].data_ptr()}
    assert changed == {f"{path}.weight" for path in adapters.architecture.linears if path.endswith("q_proj")}
    half = adapters.merge("it", torch.bfloat16).tensors
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    key = min(changed)
    assert (
        torch.equal(half[key], merged.tensors[key].to(torch.bfloat16))
        or kit.difference([half[key]], [merged.tensors[key]]) < 4e-3
    )


def theirs_cases() -> Iterator[Any]:
    for kind in FAST:
        yield from (
            (kind, method, "plain") for method in THEIRS if method in ("lora", "ia3", "adalora", "vera", "ln_tuning")
        )
        # peft writes a table that is tied to the head into both.
        tied = kind in ("gpt2", "bloom")
        names = [v for v in VARIANTS if not (tied and ("embedding" in v or "head" in v))]
        for place, name in enumerate(names):
            turn = (place + FAST.index(kind)) % 2
            yield pytest.param(kind, "lora_family", name, marks=[pytest.mark.slow] * turn)


@pytest.mark.parametrize(("kind", "method", "variant"), theirs_cases())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_as_pefts_merge_and_unload(kind: str, method: str, variant: str, tmp_path: Path) -> None:
    if method == "lora_family":
        config: Any = peft.LoraConfig(**common(kind), **lora_config(kind, variant))
    else:
        config = peft_config(kind, method, variant)
    theirs = fresh_peft(kind, config)
    theirs.save_pretrained(tmp_path / "it")
    adapters = Adapters(model := kit.make_model(kind), describe(model))
    adapters.load("it", tmp_path / "it")
    ours = adapters.merge("it").tensors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = theirs.merge_and_unload().state_dict()
    assert set(ours) == set(wanted)
    assert any(not torch.equal(wanted[key], own) for key, own in model.state_dict().items())
    for key, tensor in wanted.items():
        kit.measured(f"{kind} {method} {variant} {key}", kit.difference([tensor], [ours[key]]), 5e-6)


@pytest.mark.parametrize("kind", ["t5", "mt5"])
@pytest.mark.parametrize("method", ["lora", "ia3", "ln_tuning", "shared", "head"])
def test_encoder_decoders(kind: str, method: str, tmp_path: Path) -> None:
    special = {"shared": {"target_modules": ["shared", "q"]}, "head": {"target_modules": ["lm_head", "wo"]}}
    base = loaded_from(make_seq2seq(kind), tmp_path / "base")
    adapters = Adapters(base, describe(base))
    name = "lora" if method in special else method
    kit.randomize(adapters.add("it", METHODS[name](**special.get(method, {}))))
    weights = adapters.merge("it")
    # transformers ties these two again whatever the configuration says.
    assert weights.tensors["encoder.embed_tokens.weight"] is weights.tensors["shared.weight"]
    assert weights.untied == (method in special)
    merged = loaded_from(merged_model(base, adapters.architecture, weights), tmp_path / "merged")
    for ids, target in zip(kit.texts(3), kit.texts(3, seed=5), strict=True):
        with torch.no_grad():
            _, hidden = adapters.run([Part("it", [ids], targets=[target])])
            routed = adapters.logits(hidden, [("it", len(hidden))])
            begun = torch.tensor([[start_token(base), *target[:-1]]])
            plain = merged(input_ids=torch.tensor([ids]), decoder_input_ids=begun).logits[0]
        kit.measured(f"{kind} {method}", relative([routed], [plain]), 1e-5)


@pytest.mark.parametrize(
    ("kind", "method"), kit.in_turn([*ENCODERS, "llama", "gpt2"], ["lora", "full", "bitfit"], take=2)
)
def test_classifiers(kind: str, method: str, tmp_path: Path) -> None:
    """Encoders with their poolers and dense heads, decoders with their last token: transformers' own classes."""
    (make_encoder(kind) if kind in ENCODERS else kit.make_model(kind)).save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), device="cpu", tokenizer=object())
    adapters = Adapters(base.model, base.architecture)
    task = ClassificationTask(("a", "b", "c"))
    adapter = kit.randomize(adapters.add("it", METHODS[method](**BITFIT.get(kind, {}) if method == "bitfit" else {}),
                                         head=task))  # fmt: skip
    merged = merged_model(base.model, base.architecture, adapters.merge("it"), adapter.head)
    if kind not in ENCODERS:
        merged.config.pad_token_id = 0
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert list(plain.config.id2label.values()) == ["a", "b", "c"]
    for ids in kit.texts(3, 4, 12):
        with torch.no_grad():
            routed = logits_of(adapters, "it", [Sample(ids, [0.0] * len(ids), "s")])
            found = plain(input_ids=torch.tensor([ids])).logits
        kit.measured(f"{kind} {method}", relative([routed], [found]), LIMITS[torch.float32])
    adapters.close()


def test_an_encoder_without_a_head_is_refused(tmp_path: Path) -> None:
    make_encoder("bert").save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), device="cpu", tokenizer=object())
    adapters = Adapters(base.model, base.architecture)
    adapters.add("it", METHODS["lora"]())
    with pytest.raises(UserError, match="without a classification head"):
        merged_model(base.model, base.architecture, adapters.merge("it"))


QUANTISED = ["llama-nf4", "llama-int8", "gpt2-nf4", "gpt2-int8"]


@pytest.fixture(scope="module")
def quantised(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """GPT-2's files keep its matrices as [in, out]; quantised they are [out, in]."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("base")
    kind, _, quantization = request.param.partition("-")
    sizes = {"hidden_size": 64, "intermediate_size": 128} if kind == "llama" else {"n_embd": 64}
    kit.make_model(kind, **sizes).save_pretrained(folder)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "tokenizer": object()}
    return load_base(str(folder), quantization=quantization, **options), folder


@pytest.mark.parametrize(
    ("method", "quantised"),
    kit.in_turn(sorted({"dora", *kit.ALL} - kit.NOT_MERGEABLE - {"freeze", "full"}), QUANTISED, take=2),
    indirect=["quantised"],
)
def test_a_quantised_base_is_merged_as_training_saw_it(quantised: Any, method: str, tmp_path: Path) -> None:
    """Into the weights from before quantisation it would be wrong by what quantisation took."""
    base, folder = quantised
    adapters = Adapters(base.model, base.architecture)
    more: dict[str, Any] = {"add_missing": True, "target_modules": ["attention"]} if method == "bitfit" else {}
    more |= kit.SETTINGS[method] if method == "trainable_tokens" else {}
    config = METHODS["lora"](use_dora=True) if method == "dora" else METHODS[method](**more)
    kit.randomize(adapters.add("it", config), scale=0.02)
    routed, before = logits(adapters, "it"), logits(adapters, None)
    merged = loaded_from(merged_model(base.model, base.architecture, adapters.merge("it")), tmp_path)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert not hasattr(merged.config, "quantization_config")
    other = Adapters(merged, describe(merged))
    found = relative(routed, logits(other, None))
    kit.measured(f"quantised {method}", found, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, logits(adapters, None), strict=True))
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    wrong = Adapters(original, describe(original))
    kit.randomize(wrong.add("it", config), scale=0.02)
    assert relative(routed, logits(wrong, "it")) > 100 * found
    for one in (adapters, other, wrong):
        one.close()
