"""The proof at load and at attach: what is right passes, what is planted is seen, by the module's name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests import kit
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPTNeoXJapaneseConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    MambaConfig,
    MegatronBertConfig,
    Phi3Config,
    Qwen3NextConfig,
)

from weft.api import Adapters
from weft.core import rows
from weft.core.stream import Part
from weft.errors import UserError
from weft.methods import METHODS
from weft.models import describe, proof, tables, trial
from weft.models.attached import prove_attached
from weft.models.finding import fused_kinds
from weft.ops.loss import HeadForm

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}  # fmt: skip
TEXTS = [[5, 6, 7], list(range(5, 45)), [9, 8, 7, 6, 5, 4, 3]]


def make(config: Any) -> Any:
    """A model whose parameters are all away from where they begin: a dropped factor shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return moved(model)


def moved(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def phi3() -> Any:
    return make(Phi3Config(**SIZES, original_max_position_embeddings=16, rope_parameters=LONGROPE))


def megatron() -> Any:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    return make(MegatronBertConfig(**sizes, is_decoder=True))


def mamba2() -> Any:
    return make(
        Mamba2Config(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8, head_dim=8, num_heads=8,
                     n_groups=1, expand=2, chunk_size=8)
    )  # fmt: skip


def dynamic() -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return make(LlamaConfig(**{**SIZES, "max_position_embeddings": 16}, rope_parameters=rope))


MODELS = {"phi3": phi3, "dynamic": dynamic, "megatron": megatron, "mamba2": mamba2,
          "cohere": lambda: make(CohereConfig(**SIZES, logit_scale=0.25))}  # fmt: skip


def own(model: Any, texts: list[list[int]] = TEXTS) -> list[Tensor]:
    """transformers' logits of each text alone, each by a model that has seen none before."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([text]), use_cache=False).logits[0] for text in texts]


def ours(model: Any, shape: Any, texts: list[list[int]] = TEXTS) -> list[Tensor]:
    adapters = Adapters(model, shape)
    try:
        with torch.no_grad():
            logits = adapters.logits(adapters.forward(adapters.stream([Part(None, texts)])))
        return list(logits.split([len(text) for text in texts]))
    finally:
        adapters.close()


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_proved_is_right_on_other_texts(kind: str) -> None:
    """Also where a neighbour is longer than the limit at which tables of positions change."""
    model = MODELS[kind]()
    shape = describe(model)
    wanted, found = own(model), ours(model, shape)
    scale = max(float(w.abs().max()) for w in wanted)
    worst = max(float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True))
    # Two orders of summation over the width, some dozens of times.
    kit.measured(f"{kind}: stream or padded - transformers", worst / scale, 1e-5)
    assert (shape.install_attention is None) == (kind in ("megatron", "mamba2")), shape.padded_because


def test_the_model_is_left_as_it_was() -> None:
    model = phi3()
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    values = {key: value.clone() for key, value in model.state_dict().items()}
    frequencies = model.model.rotary_emb.inv_freq.clone()
    describe(model)
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_a_head_transform_that_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = megatron()
    assert describe(model).head_form is None
    monkeypatch.setattr(proof, "_head_form", lambda model, shape: HeadForm())
    with pytest.raises(UserError, match=r"'cls\.predictions\.transform\.dense' \(Linear\), which is not called"):
        describe(model)


def test_a_scale_that_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["cohere"]()
    assert describe(model).head_form == HeadForm(0.25)
    monkeypatch.setattr(proof, "_head_form", lambda model, shape: HeadForm())
    with pytest.raises(UserError, match=r"of the output of 'lm_head' \(Linear\)"):
        describe(model)


def test_a_table_that_depends_on_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    model = phi3()
    assert tables.neighbour_dependent(model) == ["model.rotary_emb"]
    monkeypatch.setattr(proof, "neighbour_dependent", lambda model: [])
    with pytest.raises(UserError, match=r"first module that differs is 'model\.rotary_emb' \(Phi3RotaryEmbedding\)"):
        describe(model)


def test_a_gate_that_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mamba2()
    adapters = Adapters(model, describe(model))
    adapters.add("it", METHODS["ln_tuning"]())
    prove_attached(adapters, "it")
    monkeypatch.setattr("weft.core.site.split_call", lambda args, kwargs: (args[0], rows.Call()))
    with pytest.raises((UserError, TypeError), match=r"'backbone\.layers\.0\.mixer\.norm' \(MambaRMSNormGated\)"):
        prove_attached(adapters, "it")
    adapters.close()


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_weight_that_is_read_and_never_called(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba's dt_proj: left out of what methods tune by themselves, refused where it is asked for."""
    model = make(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=8))
    shape = describe(model)
    assert "backbone.layers.0.mixer.dt_proj" in shape.unreachable
    adapters = Adapters(model, shape)
    config = kit.method_config(method)
    assert not any("dt_proj" in key for key in adapters.add("it", config).tensors())
    prove_attached(adapters, "it")
    if method == "lora":
        for more in ({"target_modules": ["in_proj", "dt_proj"]}, {"modules_to_save": ["dt_proj"]}):
            with pytest.raises(UserError, match=r"dt_proj' of this mamba model is never called: the model reads"):
                adapters.add("other", METHODS["lora"](**more))
        monkeypatch.setattr(trial, "unreachable", lambda trace: {})
        adapters.close()
        adapters = Adapters(model, describe(model))
        adapters.add("it", config)
        with pytest.raises(
            UserError, match=r"no gradient reaches what stands at 'backbone\.layers\.0\.mixer\.dt_proj'"
        ):
            prove_attached(adapters, "it")
    adapters.close()


def test_a_block_that_is_no_identity() -> None:
    config = GPTNeoXJapaneseConfig(
        vocab_size=97, hidden_size=32, intermediate_multiple_size=2, num_hidden_layers=2, num_attention_heads=4
    )
    model = make(config)
    adapters = Adapters(model, describe(model))
    with pytest.raises(
        UserError, match=r"llama_pro: a copy of block 'gpt_neox_japanese\.layers\.\d' \(GPTNeoXJapanese"
    ):
        adapters.add("it", METHODS["llama_pro"]())
    assert adapters.names == []
    adapters.close()


def test_an_adapter_that_does_not_begin_as_it_promises() -> None:
    model = kit.make_model("llama")
    adapters = Adapters(model, describe(model))
    kit.randomize(adapters.add("it", METHODS["lora"]()))
    with pytest.raises(UserError, match=r"'it' \(lora\) promises to begin as the base and does not"):
        prove_attached(adapters, "it")
    adapters.close()


@pytest.mark.parametrize("method", kit.TRAINED)
def test_fresh_adapters_pass_and_stay_as_they_are(method: str) -> None:
    model = kit.make_model("llama")
    adapters = Adapters(model, describe(model))
    adapter = adapters.add("it", kit.method_config(method))
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    prove_attached(adapters, "it")
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())
    assert all(parameter.grad is None for parameter in adapter.parameters())
    adapters.close()


class _Capped(LlamaForCausalLM):
    """A head that no table knows: a cap under a name of its own, and a norm before it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.before = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        out = self.model(input_ids=input_ids, use_cache=False)
        logits = 3 * torch.tanh(self.lm_head(self.before(out.last_hidden_state)) / 3)
        return type("Out", (), {"logits": logits})()


def test_a_head_that_nobody_knows_is_the_models_own() -> None:
    torch.manual_seed(0)
    model = moved(_Capped(LlamaConfig(**SIZES)).eval())
    shape = describe(model)
    assert shape.head_form is None
    worst = max(float((a - b).abs().max()) for a, b in zip(own(model), ours(model, shape), strict=True))
    kit.measured("unknown head", worst, 1e-5)


def test_no_way_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that counts its tokens answers otherwise in any batch; the module is named."""
    model = kit.make_model("llama")
    own_forward = type(model.model.norm).forward
    monkeypatch.setattr(
        type(model.model.layers[1].mlp), "forward", lambda self, x: x * x.shape[1] if x.dim() == 3 else x
    )
    with pytest.raises(UserError, match=r"'model\.layers\.\d\.mlp' \(LlamaMLP\)"):
        describe(model)
    assert type(model.model.norm).forward is own_forward


def test_gates_go_with_their_rows() -> None:
    """Gated norms see every head as a row of a flattened batch, and a gate beside it."""
    config = Qwen3NextConfig(
        **SIZES, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = make(config)
    wanted = own(model)
    shape = describe(model)
    adapters = Adapters(model, shape)
    adapters.add("it", METHODS["ln_tuning"]())
    prove_attached(adapters, "it")
    with torch.no_grad():
        logits = adapters.logits(adapters.forward(adapters.stream([Part("it", TEXTS), Part(None, TEXTS)])))
    scale = max(float(w.abs().max()) for w in wanted)
    parts = logits.split([len(text) for text in TEXTS] * 2)
    worst = max(float((a - b).abs().max()) for a, b in zip(parts, [*wanted, *wanted], strict=True))
    kit.measured("qwen3_next with own norms at their start", worst / scale, 1e-5)
    adapters.close()


def test_large_models_are_tried_by_their_first_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one kind run the same code; the verdict holds for all blocks, and the model keeps them."""
    model = make(LlamaConfig(**{**SIZES, "num_hidden_layers": 6}))
    monkeypatch.setattr(trial, "_small", lambda model: False)
    depths = []
    monkeypatch.setattr(trial, "_depth", lambda model, shape, real=trial._depth: depths.append(real(model, shape)) or 2)
    shape = describe(model)
    assert depths == [2]
    assert len(shape.blocks) == 6 == len(model.model.layers)
    assert model.config.num_hidden_layers == 6
    assert dataclasses.replace(shape, linears=()).model_type == "llama"
    assert len(shape.linears) == 6 * 7
    worst = max(float((a - b).abs().max()) for a, b in zip(own(model), ours(model, shape), strict=True))
    kit.measured("proved by two blocks", worst, 2e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_large_models_are_tried_by_their_first_words(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables are whole again afterwards, and the padding token is, which stands among the rows that were cut."""
    model = make(LlamaConfig(**SIZES | {"tie_word_embeddings": tied, "pad_token_id": 90}))
    monkeypatch.setattr(trial, "_small", lambda _: False)
    monkeypatch.setattr(trial, "_WORDS", 20)
    seen: list[int] = []
    plain = trial.own_output

    def watched(*given: Any) -> Tensor:
        seen.append(plain(*given).shape[-1])
        return plain(*given)

    monkeypatch.setattr(trial, "own_output", watched)
    before = {name: p.clone() for name, p in model.named_parameters()}
    shape = describe(model)
    assert set(seen) == {20}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (table.num_embeddings, table.padding_idx, head.out_features) == (97, 90, 97)
    assert (head.weight is table.weight) == tied
    worst = max(float((a - b).abs().max()) for a, b in zip(own(model), ours(model, shape), strict=True))
    kit.measured("proved by twenty words", worst, 2e-5)


class Barred(LlamaForCausalLM):
    """Bars the last half of its vocabulary, however large that is: what a few rows cannot show."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.clone()
        out.logits[..., 50:] = -30.0
        return out


def test_words_that_were_cut_off_and_are_treated_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(LlamaConfig(**SIZES))
    model.__class__ = Barred
    monkeypatch.setattr(trial, "_small", lambda _: False)
    monkeypatch.setattr(trial, "_WORDS", 20)
    shape = describe(model)
    assert shape.head_form is None
    worst = max(float((a - b).abs().max()) for a, b in zip(own(model), ours(model, shape), strict=True))
    kit.measured("half of the vocabulary barred", worst, 2e-5)


def test_all_blocks_of_a_large_model_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its first blocks run in the proof."""
    model = make(LlamaConfig(**{**SIZES, "num_hidden_layers": 5}))
    small = fused_kinds(describe(model))
    monkeypatch.setattr(trial, "_small", lambda _: False)
    shape = describe(model)
    assert fused_kinds(shape) == small
    assert {f"model.layers.{i}.mlp" for i in range(5)} < small.keys()
