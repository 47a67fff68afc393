"""Soft and hard prompts, prefixes: where they stand, how they begin, and what becomes of their encoders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests import kit
from torch import Tensor

from weft.api import Adapters
from weft.core.stream import Part
from weft.data import Sample
from weft.errors import UserError
from weft.generation import Request, generate
from weft.heads.classification import ClassificationTask
from weft.methods.encoder import EncodedRows
from weft.models import describe
from weft.objectives.passes import Work, evaluate_loss, forward_losses
from weft.training import Job, JobConfig, Trainer

IDS = [11, 12, 13, 14, 15]


class Words:
    """A tokenizer of single characters; 0 to 2 are special, and 90 ids are in use."""

    all_special_ids = (0, 1, 2)

    def __len__(self) -> int:
        return 90

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(3 + ord(c) % 80 for c in text)]}


def open_model(kind: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Adapters:
    model = kit.make_model(kind, dtype)
    return Adapters(model, describe(model), **options)


def encoded(adapter: object) -> EncodedRows:
    assert isinstance(adapter, EncodedRows)
    return adapter


def spliced(text: list[int], position: str, answer: int, slots: tuple[int, ...]) -> list[int]:
    """The text with IDS written into it by hand."""
    if position == "before":
        return [*IDS, *text]
    if position == "after":
        return [*text[:answer], *IDS, *text[answer:]]
    a, b = slots
    return [*text[:a], *IDS[:3], *text[a:b], *IDS[3:], *text[b:]]  # five over two slots: three and two


@pytest.mark.parametrize("padded", [False, True], ids=["stream", "padded"])
@pytest.mark.parametrize("kind", ["llama", "bloom"])
@pytest.mark.parametrize("position", ["before", "after", "slots"])
def test_a_hard_prompt_is_its_text_written_there(position: str, kind: str, padded: bool) -> None:
    """The same loss and the same answer as the plain base on the text with the prompt's tokens in it."""
    adapters = open_model(kind, padded=padded)
    adapters.add("hard", kit.METHODS["hard_prompt"](prompt_ids=IDS, virtual_position=position))
    texts, cases = kit.texts(4, 6, 14), [(4, (1, 3)), (3, (0, 6)), (5, (2, 2)), (6, (0, 1))]
    mine, plain = [], []
    for ids, (answer, slots) in zip(texts, cases, strict=True):
        weights = [0.0] * answer + [1.0] * (len(ids) - answer)
        mine.append(Sample(ids, weights, "s", slots=slots, answer=answer))
        whole = spliced(ids, position, answer, slots)
        own = [0.0] * len(whole)
        kept = iter(weights)
        # The prompt's tokens are not learned; the text's keep their weights wherever they have moved to.
        where = spliced([-1] * len(ids), position, answer, slots)
        own = [next(kept) if token == -1 else 0.0 for token in where]
        plain.append(Sample(whole, own, "s"))
    (a, b) = forward_losses(adapters, [Work("hard", mine), Work(None, plain)])
    kit.measured(f"{kind} {position} loss", abs(float(a - b)) / float(b), 1e-12)
    asked, wanted = [], []
    for ids, (_, slots) in zip(texts, cases, strict=True):
        asked.append(Request(ids, "hard", 6, slots=slots))
        wanted.append(Request(spliced(ids, position, len(ids), slots), None, 6))
    answers = generate(adapters, [*asked, *wanted], stop_ids=())
    assert [c.ids for c in answers[:4]] == [c.ids for c in answers[4:]]
    adapters.close()


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "hard_prompt"])
def test_places_that_are_not_there(method: str) -> None:
    adapters = open_model()
    more = {"prompt_ids": IDS} if method == "hard_prompt" else {"num_virtual_tokens": 5}
    for position in ("after", "slots"):
        adapters.add(position, kit.METHODS[method](virtual_position=position, **more))
    with pytest.raises(UserError, match="no answer"):
        adapters.stream([Part("after", [[5, 6, 7]])])
    with pytest.raises(UserError, match=r"no slot. Write <\|soft\|>"):
        adapters.stream([Part("slots", [[5, 6, 7]])])
    with pytest.raises(UserError, match="6 slots for 5 virtual tokens"):
        adapters.stream([Part("slots", [[5, 6, 7]], slots=[(0, 1, 1, 2, 2, 3)])])
    adapters.stream([Part("slots", [[5, 6, 7]], slots=[(0, 1, 1, 2, 3)])])
    adapters.close()


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_no_special_token_is_sampled(method: str) -> None:
    """Nor a row of the table that no token of the tokenizer has."""
    adapters = open_model()
    adapter = adapters.add("a", kit.METHODS[method](num_virtual_tokens=500), tokenizer=Words())
    model: Any = adapters.model
    rows = encoded(adapter).values()
    if method == "prompt_tuning":
        found = {int((model.get_input_embeddings().weight == row).all(1).nonzero()[0]) for row in rows}
        assert found <= set(range(3, 90))
        assert len(found) > 80  # 500 draws of 87
    else:
        # The first layer's values tell the tokens apart.
        assert len({tuple(row.tolist()) for row in rows[:, 16:32].detach().round(decimals=8)}) <= 87
    adapters.close()


def test_the_text_is_repeated_without_its_special_tokens() -> None:
    adapters = open_model()
    settings = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "ab"}
    adapter = adapters.add("a", kit.METHODS["prompt_tuning"](num_virtual_tokens=5, **settings), tokenizer=Words())
    model: Any = adapters.model
    wanted = [Words()(c)["input_ids"][1] for c in "ababa"]
    assert torch.equal(encoded(adapter).values(), model.get_input_embeddings().weight[wanted])
    hard = adapters.add("h", kit.METHODS["hard_prompt"](prompt_text="abab"), tokenizer=Words())
    assert torch.equal(hard.virtual_tokens(), model.get_input_embeddings().weight[wanted[:4]])
    with pytest.raises(UserError, match="holds no tokens"):
        adapters.add("e", kit.METHODS["hard_prompt"](prompt_text=" "), tokenizer=lambda text: {"input_ids": []})
    adapters.close()


ENCODED: list[tuple[str, dict[str, Any]]] = [
    ("p_tuning", {}),
    ("p_tuning", {"encoder_hidden_size": 12}),
    ("p_tuning", {"encoder_reparameterization_type": "LSTM"}),
    ("p_tuning", {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}),
    ("prefix_tuning", {"prefix_projection": True}),
    ("prefix_tuning", {"prefix_projection": True, "prefix_init": "zero"}),
]


@pytest.mark.parametrize(("method", "settings"), ENCODED, ids=str)
def test_an_encoder_begins_at_what_was_asked_for(method: str, settings: dict[str, Any]) -> None:
    """At embeddings, keys and values of sampled tokens, whose rows the same seed draws for the method without one."""
    adapters = open_model()
    adapter = adapters.add("a", kit.METHODS[method](num_virtual_tokens=6, **settings), seed=3)
    direct = "prompt_tuning" if method == "p_tuning" else "p_tuning_v2"
    more = {key: settings[key] for key in ("prefix_init",) if key in settings}
    wanted = adapters.add("b", kit.METHODS[direct](num_virtual_tokens=6, **more), seed=3)
    kit.measured(f"{method} {settings}", kit.difference([encoded(adapter).values()], [encoded(wanted).values()]), 1e-8)
    adapters.close()


def train(adapters: Adapters, name: str, steps: int) -> list[Tensor]:
    config = JobConfig(name=name, method="lora", steps=steps, batch_size=2, learning_rate=1e-2)
    Trainer(adapters, [Job(config, adapters[name], kit.samples(8))]).run()
    return [p.detach().clone() for p in adapters[name].parameters()]


@pytest.mark.parametrize(("method", "settings"), ENCODED, ids=str)
def test_training_goes_on_where_a_folder_left_it(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """The encoder comes back, not only what it gave; peft's folder has none, and gives plain rows."""
    adapters = open_model(dtype=torch.float32)
    texts = kit.texts(3)
    adapters.add("a", kit.METHODS[method](num_virtual_tokens=4, **settings))
    begun = train(adapters, "a", 3)
    adapters.save("a", tmp_path / "a")

    def answers(name: str) -> list[Tensor]:
        with torch.no_grad():
            return kit.hidden_of(adapters, [Part(name, texts)])

    wanted = answers("a")
    adapters.load("b", tmp_path / "a")
    assert all(map(torch.equal, wanted, answers("b")))
    assert all(map(torch.equal, begun, adapters["b"].parameters()))
    assert all(map(torch.equal, train(adapters, "a", 3), train(adapters, "b", 3)))
    assert not torch.equal(wanted[0], answers("b")[0]), "it answers as before"
    (tmp_path / "a" / "encoder.safetensors").unlink()
    plain = adapters.load("c", tmp_path / "a")
    assert [tuple(p.shape) for p in plain.parameters()] == [encoded(plain).row_shape]
    assert all(map(torch.equal, wanted, answers("c")))
    # What an encoder left behind in a folder is not taken for another adapter's.
    adapters.save("b", tmp_path / "both")
    adapters.save("c", tmp_path / "both")
    assert encoded(adapters.load("d", tmp_path / "both")).encoder is None
    adapters.close()


def test_a_damaged_encoder_is_refused(tmp_path: Path) -> None:
    adapters = open_model()
    adapters.add("a", kit.method_config("p_tuning"))
    adapters.save("a", tmp_path)
    (tmp_path / "encoder.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        adapters.load("b", tmp_path)
    assert adapters.names == ["a"]
    adapters.close()


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_the_encoder_is_pefts(kind: str) -> None:
    """The same weights give the same rows in peft's PromptEncoder."""
    adapters = open_model()
    more = {"encoder_reparameterization_type": kind, "encoder_hidden_size": 24}
    adapter = kit.randomize(adapters.add("a", kit.METHODS["p_tuning"](num_virtual_tokens=7, **more)))
    encoder: Any = encoded(adapter).encoder
    theirs = peft.PromptEncoder(
        peft.PromptEncoderConfig(
            num_virtual_tokens=7, token_dim=32, num_transformer_submodules=1, encoder_num_layers=2, **more
        )
    ).double()
    state = {"embedding.weight": encoder.embedding}
    for index, layer in enumerate([*encoder.mlp, encoder.last]):
        state |= {f"mlp_head.{2 * index}.{n}": p for n, p in layer.named_parameters()}
    for index, layer in enumerate(encoder.lstm):
        state |= {f"lstm_head.{n.replace('_l0', f'_l{index}')}": p for n, p in layer.named_parameters()}
    theirs.load_state_dict(state)
    kit.measured(f"{kind} encoder", kit.difference([theirs(torch.arange(7)[None])[0]], [encoder()]), 1e-14)
    adapters.close()


def test_dropout_of_the_encoder_comes_from_the_seed() -> None:
    adapters = open_model()
    adapter = adapters.add("a", kit.method_config("p_tuning", dropout=True))
    first = adapter.virtual_tokens(7)
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(first, adapter.virtual_tokens(7))
    assert not torch.equal(first, adapter.virtual_tokens(8))
    assert not torch.equal(first, adapter.virtual_tokens())
    adapters.close()


def test_a_hard_prompt_trains_nothing() -> None:
    adapters = open_model()
    config = JobConfig(name="a", method="hard_prompt", steps=50, method_settings={"prompt_ids": IDS})
    job = Job(config, adapters.add("a", config.method_config()), kit.samples(8), kit.samples(2))
    result = Trainer(adapters, [job]).run()
    assert result.completed
    assert (result.steps, job.adapter.num_trainable(), job.progress.best_eval_loss is not None) == (0, 0, True)
    with pytest.raises(UserError, match="97 is no token; this base has 0 to 96"):
        adapters.add("b", kit.METHODS["hard_prompt"](prompt_ids=[5, 97]))
    adapters.close()


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("hard_prompt", {}, "needs prompt_text"),
        ("hard_prompt", {"prompt_text": "a", "prompt_ids": [3]}, "needs prompt_text"),
        ("hard_prompt", {"prompt_ids": []}, "is empty"),
        ("p_tuning", {"encoder_dropout": 0.1}, "between the layers of an LSTM"),
        ("p_tuning", {"encoder_num_layers": 3}, "take encoder_reparameterization_type: LSTM"),
        ("prompt_tuning", {"prompt_tuning_init_text": "a"}, "only read with prompt_tuning_init: TEXT"),
        ("prefix_tuning", {"prefix_init": "zero", "prefix_init_text": "a"}, "only read with prefix_init: activations"),
        ("p_tuning_v2", {"prefix_projection": True}, "prefix_projection"),
    ],
)
def test_settings_that_contradict_each_other(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kit.METHODS[method](**settings)


@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning_v2"])
def test_a_prefix_needs_keys_and_values_to_stand_before(method: str) -> None:
    """Also on the meta device, that is before any weight is loaded."""
    model = kit.make_model("llama")
    for change, message in [
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
        ({"kv_lora_rank": 8}, "latent attention"),
        ({"num_kv_shared_layers": 1}, "share the keys"),
    ]:
        other = kit.make_model("llama").to("meta")
        for key, value in change.items():
            setattr(other.config, key, value)
        adapters = Adapters(other, describe(other))
        with pytest.raises(UserError, match=message):
            adapters.add("a", kit.METHODS[method](), blank=True)
        adapters.close()
    shape = dataclasses.replace(describe(model), install_attention=None, bidirectional=True)
    adapters = Adapters(model, shape)
    with pytest.raises(UserError, match=f"{method}: this llama model takes no cache"):
        adapters.add("a", kit.METHODS[method]())
    assert adapters.names == []
    adapters.close()


@pytest.mark.parametrize("settings", [{}, {"prefix_projection": True}, {"prefix_init": "random"}], ids=str)
def test_a_prefix_trains_under_gradient_checkpointing(settings: dict[str, Any]) -> None:
    """With grouped-query attention, on both paths: the same gradients as without."""
    for padded in (False, True):
        found = []
        for checkpointing in (False, True):
            adapters = open_model("qwen2", padded=padded, checkpointing=checkpointing)
            adapters.add("a", kit.METHODS["prefix_tuning"](num_virtual_tokens=3, **settings))
            (loss,) = forward_losses(adapters, [Work("a", kit.samples(3))])
            loss.backward()
            found.append(kit.gradients(adapters["a"]))
            adapters.close()
        assert found[0]
        assert all(bool(g.any()) for name, g in found[0].items() if name != "encoder.first.bias")
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


CLASSIFIED: list[tuple[str, dict[str, Any]]] = [
    ("p_tuning_v2", {}),
    ("prefix_tuning", {"prefix_projection": True}),
    ("p_tuning", {}),
    ("prompt_tuning", {"virtual_position": "after"}),
]


@pytest.mark.parametrize(("method", "settings"), CLASSIFIED, ids=str)
def test_classification_with_a_head_of_its_own(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Texts of two classes are told apart after some steps, and the folder gives back prompt, encoder and head."""
    adapters = open_model("llama", torch.float32)
    task = ClassificationTask(("low", "high"))
    adapters.add("a", kit.METHODS[method](num_virtual_tokens=3, **settings), head=task)
    texts = [([3 + i % 20] if i % 2 else [70 + i % 20]) * (2 + i % 3) for i in range(16)]
    data = [Sample(ids, [0.0] * len(ids), "s", label=int(ids[0] >= 70)) for ids in texts]
    config = JobConfig(name="a", method=method, steps=30, batch_size=8, learning_rate=1e-2)
    begun = float(evaluate_loss(adapters, "a", data) or 0)
    Trainer(adapters, [Job(config, adapters["a"], data)]).run()
    ended = float(evaluate_loss(adapters, "a", data) or 0)
    assert ended < 0.7 * begun
    adapters.save("a", tmp_path)
    adapters.load("b", tmp_path)
    assert evaluate_loss(adapters, "b", data) == ended
    assert sum(p.numel() for p in adapters["b"].parameters()) == sum(p.numel() for p in adapters["a"].parameters())
    adapters.close()
