"""Bases and adapters that once slipped through the proof, or that it once refused for no fault of theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import kit
from tests.models.test_proof import SIZES, TEXTS, make, moved, ours, own
from torch import Tensor
from transformers import (
    BigBirdConfig,
    BigBirdForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MegatronBertConfig,
    MegatronBertForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from weft.api import Adapters
from weft.core.adapters import is_open
from weft.core.site import sites_in
from weft.errors import UserError
from weft.generation import Request, generate
from weft.methods import METHODS
from weft.models import describe
from weft.models.attached import prove_attached
from weft.ops.loss import HeadForm


class Scaled(LlamaForCausalLM):
    """Logits times a factor that no configuration names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.85
        return out


def scaled(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return moved(Scaled(LlamaConfig(**SIZES)).eval()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_a_narrow_dtype_hides_nothing(dtype: torch.dtype) -> None:
    model = scaled(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = [p.data_ptr() for p in model.parameters()]
    assert describe(model).head_form == HeadForm(pytest.approx(0.85))
    assert [p.data_ptr() for p in model.parameters()] == places
    now: dict[str, Tensor] = model.state_dict()
    assert all(now[name].dtype == dtype and torch.equal(now[name], tensor) for name, tensor in before.items())


def gpt2() -> Any:
    torch.manual_seed(0)
    return moved(GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval())


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_learned_tokens_have_room_beside_the_trial(method: str) -> None:
    """The trial is as long as a short base's limit; learned tokens count among them."""
    model = gpt2()
    adapters = Adapters(model, describe(model))
    adapters.add("it", METHODS[method](num_virtual_tokens=9))
    prove_attached(adapters, "it")
    adapters.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_identity_in_a_narrow_dtype(dtype: torch.dtype) -> None:
    model = gpt2().to(dtype)
    adapters = Adapters(model, describe(model))
    adapter = adapters.add("it", METHODS["lora"]())
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("lora_B"):
                parameter.add_(0.1)
    with pytest.raises(UserError, match="promises to begin as the base"):
        prove_attached(adapters, "it")
    adapters.close()


BERT = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}


def test_a_model_that_sees_the_future_is_no_causal_one() -> None:
    """Without is_decoder, transformers' causal classes of encoders see the whole text."""
    torch.manual_seed(0)
    model = moved(MegatronBertForCausalLM(MegatronBertConfig(**BERT)).eval())
    with pytest.raises(UserError, match=r"no causal language model.*is_decoder"):
        describe(model)


def test_a_model_that_changes_itself_is_refused_and_put_back() -> None:
    """BigBird's attention is sparse only in long texts, and never again after a short one."""
    torch.manual_seed(0)
    config = BigBirdConfig(**{**BERT, "max_position_embeddings": 1024}, is_decoder=True, block_size=32)
    model = moved(BigBirdForCausalLM(config).eval())
    layer = model.bert.encoder.layer[0].attention
    before = layer.self
    with pytest.raises(UserError, match="changes itself"):
        describe(model)
    assert layer.self is before
    assert model.bert.attention_type == "block_sparse"


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return moved(LlamaForCausalLM(LlamaConfig(**{**SIZES, **more})).eval())


def test_what_cannot_open_leaves_the_model_as_it_was() -> None:
    model = llama().train()
    shape = describe(model)
    linear = model.model.layers[1].self_attn.q_proj
    linear.forward = linear.forward  # as accelerate's hooks do
    with pytest.raises(UserError, match="forward of its own"):
        Adapters(model, shape, exact=True)
    assert not is_open(model)
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not list(sites_in(model))


def test_a_hook_on_an_activation_is_called() -> None:
    model = llama()
    shape = describe(model)
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, out: out * 2)
    wanted, found = own(model), ours(model, shape)
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(wanted, found, strict=True))
    kit.measured("a hook on SiLU", worst, 1e-5)


def test_tables_that_a_long_text_moved_before() -> None:
    """Dynamic tables by kind of layer keep the longest length that they saw, each under a name of its own."""
    rope = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Gemma3TextConfig(
        **{**SIZES, "max_position_embeddings": 16}, head_dim=8, sliding_window=6, rope_parameters=rope,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    wanted = [own(make(config), [text])[0] for text in TEXTS]
    model = make(config)
    own(model, [[i + 5 for i in range(80)]])
    found = ours(model, describe(model))
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(wanted, found, strict=True))
    kit.measured("dynamic tables after a long text", worst, 1e-5)


def test_dynamic_tables_reach_beyond_the_length_from_before() -> None:
    """As in transformers, and every token from the cache is that of the whole text."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = LlamaConfig(**{**SIZES, "max_position_embeddings": 16}, rope_parameters=rope)
    model = make(config)
    shape = describe(model)
    assert shape.max_length == 32
    prompt = [i + 5 for i in range(12)]
    adapters = Adapters(model, shape)
    (done,) = generate(adapters, [Request(prompt, None, 18)], stop_ids=())
    adapters.close()
    text = list(prompt)
    while len(text) < 30:
        text.append(int(own(make(config), [text])[0][-1].argmax()))
    assert list(done.ids) == text[12:]


class ScaledT5(T5ForConditionalGeneration):
    """An encoder-decoder whose factor its table does not know."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.85
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_decoders_are_proved_too(dtype: torch.dtype) -> None:
    config = T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    torch.manual_seed(0)
    right = moved(T5ForConditionalGeneration(config)).to(dtype).train()
    assert describe(right).task == "seq2seq"
    assert right.training
    with pytest.raises(UserError, match="answers otherwise through Weft"):
        describe(moved(ScaledT5(config)).to(dtype))
