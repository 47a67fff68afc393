"""Padded models generate from a cache: the tokens of a pass over the whole text, and of transformers' own generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from tests import kit
from transformers.cache_utils import DynamicCache, DynamicLayer

from weft.api import Adapters
from weft.core.stream import Part
from weft.generation import Completion, Request, cache_proof, generate
from weft.generation.lockstep import Group, select_rows
from weft.models import describe

_IDS = {"vocab_size": kit.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Keys and values with rotary positions, ALiBi or a local window; states of two kinds of state-space model; both.
CONFIGS: dict[str, Any] = {
    "codegen": lambda: transformers.CodeGenConfig(
        n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4, **_IDS
    ),
    "mpt": lambda: transformers.MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=128, **_IDS),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=6,
        intermediate_size=48, max_position_embeddings=128, **_IDS,
    ),
    "mamba": lambda: transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=8, **_IDS
    ),
    "jamba": lambda: transformers.JambaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4,
        mamba_d_state=8, mamba_dt_rank=8, **_IDS,
    ),
    "rwkv": lambda: transformers.RwkvConfig(hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, **_IDS),
    "openai-gpt": lambda: transformers.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, n_positions=128, **_IDS),
    "dynamic": lambda: transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, **_IDS,
    ),
}  # fmt: skip
# What each can carry (a state has no learned keys, experts no inserted blocks).
WHOLE = ("lora", "bitfit", "prompt_tuning", "bottleneck", "llama_pro")
METHODS: dict[str, Sequence[str]] = {
    "llama": (*WHOLE, "prefix_tuning", "p_tuning_v2", "hard_prompt"),
    "falcon": WHOLE,
    "codegen": WHOLE,
    "mpt": WHOLE,
    "gpt_neo": WHOLE,
    "mamba": ("lora", "bitfit", "prompt_tuning"),
    "jamba": ("lora", "bitfit", "prompt_tuning", "bottleneck"),
    "rwkv": ("lora", "bitfit", "prompt_tuning"),
    "openai-gpt": ("lora", "prompt_tuning"),
    "dynamic": ("lora",),
}
CACHED = [kind for kind in METHODS if kind not in ("openai-gpt", "dynamic")]


def opened(kind: str, **options: Any) -> Adapters:
    """The methods that the model can carry and a stack of two, none at its start."""
    if kind in CONFIGS:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    else:
        model = kit.make_model(kind)
    adapters = Adapters(model, describe(model), padded=True, **options)
    for index, method in enumerate(METHODS[kind]):
        kit.randomize(adapters.add(method, kit.method_config(method), seed=index), index)
    if "bottleneck" in adapters:
        adapters.stack("stack", ["lora", "bottleneck"])
    return adapters


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Adapters]]:
    yield (found := {kind: opened(kind) for kind in METHODS})
    for adapters in found.values():
        adapters.close()


def requests(adapters: Adapters) -> list[Request]:
    """Prompts of three lengths for everyone; answers of different lengths."""
    return [
        Request(ids, name, 3 + (5 * number + place) % 6)
        for number, name in enumerate([None, *adapters.names])
        for place, ids in enumerate([*kit.texts(2, 1, 9, seed=number), [5, 6, 7]])
    ]


def run_again(adapters: Adapters, asked: Sequence[Request], monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    """What comes out if every token runs the whole text."""
    with monkeypatch.context() as patch:
        patch.setattr(cache_proof, "kind", lambda *_: cache_proof.Kind())
        return generate(adapters, asked, **{"stop_ids": (), **more})


def ids(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.ids for completion in completions]


@pytest.mark.parametrize("kind", METHODS)
def test_many_adapters_and_lengths_in_one_call(
    kind: str, models: dict[str, Adapters], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = models[kind]
    asked = requests(adapters)
    found = generate(adapters, asked, stop_ids=())
    assert ids(found) == ids(run_again(adapters, asked, monkeypatch))
    for request, completion in zip(asked, found, strict=True):
        assert len(completion.ids) == request.max_new_tokens
        if request.adapter is None:
            own: Any = adapters.model
            out = own.generate(
                torch.tensor([request.prompt]), max_new_tokens=request.max_new_tokens, do_sample=False,
                eos_token_id=None,
            )  # fmt: skip
            assert completion.ids == out[0, len(request.prompt) :].tolist()
    verdicts = [cache_proof.verdict(adapters, name) for name in (None, *adapters.names)]
    for verdict in verdicts:
        assert (verdict.rows > 0) == (kind in CACHED), verdict
        assert verdict.rows > 1 or kind not in CACHED or kind == "rwkv", verdict
        # As far as rounding is concerned, these models are all of one kind.
        assert kind not in CACHED or verdict.difference < 1e-5, verdict


@pytest.mark.parametrize("kind", ["llama", "falcon", "mamba"])
def test_a_step_sees_one_token_of_every_row(
    kind: str, models: dict[str, Adapters], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, widths = models[kind], list[tuple[int, ...]]()
    asked = [Request([3 + i, 4, 5 + j], "lora" if i % 2 else None, 6) for i in range(4) for j in range(2)]
    generate(adapters, asked, stop_ids=())
    body: Any = adapters.model.base_model
    with monkeypatch.context() as patch:
        plain = type(body).forward

        def recorded(self: Any, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
            widths.append(tuple(inputs_embeds.shape[:2]))
            return plain(self, *args, inputs_embeds=inputs_embeds, **kwargs)

        patch.setattr(type(body), "forward", recorded)
        generate(adapters, asked, stop_ids=())
    assert widths == [(8, 3), *[(8, 1)] * 5]


@pytest.mark.parametrize("kind", ["llama", "falcon", "mpt", "mamba", "jamba"])
@torch.no_grad()
def test_logits_of_a_mixed_group(kind: str, models: dict[str, Adapters]) -> None:
    """Every adapter without learned rows beside the base, rows leaving on the way."""
    adapters = models[kind]
    names = [None, *(name for name in adapters.names if sum(cache_proof.learned_tokens(adapters, name)) == 0)]
    texts = {name: kit.texts(2, 12, 12, seed=index) for index, name in enumerate(names)}
    flat = [(name, text) for name in names for text in texts[name]]
    group = Group(adapters, [Part(name, [t[:5] for t in texts[name]]) for name in names])
    hidden, left = group.hidden, list(range(len(flat)))
    for place in range(5, 12):
        counts = [(name, sum(flat[row][0] == name for row in left)) for name in names]
        counts = [(name, count) for name, count in counts if count]
        found = adapters.logits(hidden, counts)
        wanted = torch.stack([whole(adapters, name, text[:place]) for name, text in (flat[row] for row in left)])
        worst = float(((found - wanted).abs().amax(-1) / wanted.abs().amax(-1)).max())
        kit.measured(f"{kind}: cache - whole text, {place} tokens", worst, 1e-5)
        if place in (7, 9):  # one of each adapter, then whole adapters
            keep = [i for i in range(len(left)) if (i % 2 if place == 7 else i % 3 != 1)]
            group.keep(torch.tensor(keep))
            left = [left[i] for i in keep]
        counts = [(name, count) for name in names if (count := sum(flat[row][0] == name for row in left))]
        group.step(torch.tensor([flat[row][1][place] for row in left]), counts)
        hidden = group.hidden


def whole(adapters: Adapters, name: str | None, text: Sequence[int]) -> torch.Tensor:
    hidden = adapters.forward(adapters.stream([Part(name, [text])]))
    return adapters.logits(hidden[-1:], [(name, 1)])[0]


@pytest.mark.parametrize("kind", ["llama", "codegen", "jamba", "rwkv"])
def test_rows_that_stop_leave(kind: str, models: dict[str, Adapters], monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = models[kind]
    asked = [Request([3 + i, 4 + 2 * i, 5], name, 12) for i in range(5) for name in (None, "lora")]
    free = ids(generate(adapters, asked, stop_ids=()))
    stops = {answer[place] for answer, place in zip(free, (1, 3, 5, 7), strict=False)}
    seen: list[tuple[int, int]] = []
    found = generate(adapters, asked, stop_ids=stops, on_token=lambda row, token: seen.append((row, token)))
    assert found == run_again(adapters, asked, monkeypatch, stop_ids=stops)
    assert {c.finish_reason for c in found} == {"stop", "length"} or len({len(c.ids) for c in found}) > 1
    assert [[token for row, token in seen if row == i] for i in range(len(asked))] == ids(found)


def test_a_cache_that_forgets_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = DynamicLayer.update

    def forgetful(self: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = plain(self, keys, values)
        return keys, torch.cat([values[:, :, :1] * 0.99, values[:, :, 1:]], dim=2)

    monkeypatch.setattr(DynamicLayer, "update", forgetful)
    adapters = opened("falcon")
    asked = requests(adapters)
    assert ids(generate(adapters, asked, stop_ids=())) == ids(run_again(adapters, asked, monkeypatch))
    verdict = cache_proof.verdict(adapters, None)
    assert verdict.rows == 0
    assert verdict.difference > verdict.limit
    adapters.close()


def test_positions_that_stand_still_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = opened("codegen")
    plain = Group.step

    def behind(self: Group, *args: Any) -> Any:
        self._next -= 1
        return plain(self, *args)

    monkeypatch.setattr(Group, "step", behind)
    verdict = cache_proof.verdict(adapters, None)
    assert verdict.rows == 0
    assert verdict.difference > verdict.limit
    adapters.close()


def test_a_cache_whose_rows_cannot_leave_takes_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = opened("falcon")
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda self, rows: None)
    asked = requests(adapters)
    assert ids(generate(adapters, asked, stop_ids=())) == ids(run_again(adapters, asked, monkeypatch))
    assert cache_proof.verdict(adapters, None).rows == 1
    adapters.close()


def test_inserted_blocks_with_a_wrong_cache_run_again_once_they_do_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its start the block adds nothing, so that no cache of its own could be wrong."""
    adapters = Adapters(model := kit.make_model("llama"), describe(model), padded=True)
    blocks = adapters.add("llama_pro", kit.method_config("llama_pro"))
    monkeypatch.setattr("weft.generation.lockstep._inserted_caches", lambda *_: {})
    asked = [Request([3, 4, 5, 6], "llama_pro", 8), Request([7, 8, 9], None, 8)]
    assert ids(generate(adapters, asked, stop_ids=())) == ids(run_again(adapters, asked, monkeypatch))
    assert cache_proof.verdict(adapters, "llama_pro").rows > 1
    kit.randomize(blocks, 1)
    assert ids(generate(adapters, asked, stop_ids=())) == ids(run_again(adapters, asked, monkeypatch))
    assert cache_proof.verdict(adapters, "llama_pro").rows == 0
    assert cache_proof.verdict(adapters, None).rows > 1
    adapters.close()


def test_in_sixteen_bits_and_with_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, dtype in (("falcon", torch.bfloat16), ("falcon", torch.float32)):
        model = kit.make_model(kind, dtype)
        adapters = Adapters(model, describe(model), checkpointing=dtype == torch.float32)
        kit.randomize(adapters.add("lora", kit.method_config("lora")), 1)
        asked = [Request([3, 4, 5], name, 4) for name in (None, "lora")]
        found = generate(adapters, asked, stop_ids=())
        for name in (None, "lora"):
            verdict = cache_proof.verdict(adapters, name)
            assert verdict.rows > 1, verdict
            assert verdict.limit <= 0.1
        if dtype == torch.float32:
            assert ids(found) == ids(run_again(adapters, asked, monkeypatch))
        adapters.close()


def test_rows_of_states_in_lists() -> None:
    state = [torch.arange(6.0).view(3, 2), (torch.arange(3), {"a": torch.zeros(3, 1)})]
    rows = torch.tensor([0, 2])
    first, (second, third) = select_rows(state, rows)
    assert first.tolist() == [[0, 1], [4, 5]]
    assert second.tolist() == [0, 2]
    assert third["a"].shape == (2, 1)
