"""The contracts on encoder-decoders: alone = together, peft's logits and files, checkpointing, generation."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tests import kit
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, MT5Config, T5Config, UMT5Config

from weft.api import Adapters
from weft.core.stream import Part
from weft.data import Sample
from weft.errors import UserError
from weft.generation import Request, generate
from weft.layouts.encoder_decoder import Decoder, EncoderDecoder
from weft.libraries import cache_name
from weft.methods import METHODS
from weft.models import describe
from weft.objectives.passes import Work, evaluate_loss, forward_losses
from weft.training import Job, JobConfig, Trainer

KINDS = ["t5", "mt5"]
LIMIT = 1e-5
CONFIGS = {"t5": T5Config, "mt5": MT5Config, "umt5": UMT5Config}


def make_model(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A tiny model with random weights; ``d_kv * num_heads`` is not ``d_model``, as in mT5-small."""
    torch.manual_seed(0)
    # mT5 does not scale its logits: with T5's own spread they would be in the tens.
    spread = 0.3 if kind == "mt5" else 1.0
    sizes = {"num_layers": 3, "num_heads": 4, "d_kv": 6, "d_ff": 40, "initializer_factor": spread, **more}
    config = CONFIGS[kind](
        vocab_size=kit.VOCABULARY, d_model=32, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=20, **sizes,
    )  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.to(dtype).eval()


def samples(count: int, low: int = 1, high: int = 14, seed: int = 0) -> list[Sample]:
    """Inputs and answers of random lengths."""
    inputs, answers = kit.texts(count, low, high, seed), kit.texts(count, 1, 9, seed + 1000)
    return [
        Sample(ids, [0.0] * len(ids), f"sample {i}", target_ids=(*answer, 1))
        for i, (ids, answer) in enumerate(zip(inputs, answers, strict=True))
    ]


def fits(method: str) -> bool:
    """Whether the method takes a T5."""
    adapters = Adapters(model := make_model("t5"), describe(model))
    try:
        adapters.add(method, kit.method_config(method))
    except UserError:
        return False
    finally:
        adapters.close()
    return True


@functools.cache
def fitting() -> list[str]:
    """The methods that take a T5."""
    return [method for method in kit.ALL if fits(method)]


def open_with_all(model: Any, *, dropout: bool = False, **options: Any) -> Adapters:
    adapters = Adapters(model, describe(model), **options)
    for index, method in enumerate(fitting()):
        kit.randomize(adapters.add(method, kit.method_config(method, dropout=dropout), seed=index), index)
    return adapters


def logits_of(adapters: Adapters, name: str | None, data: list[Sample]) -> list[Tensor]:
    """Logits at every target of each sample."""
    stream, hidden = adapters.run([Work(name, data).part()])
    logits = adapters.logits(hidden, [(name, len(hidden))])
    return [logits[torch.tensor(list(rows))] for rows in stream.rows]


def their_logits(model: Any, data: list[Sample], *, masked: bool = True) -> list[Tensor]:
    """The same from a transformers or peft model, over one right-padded batch."""

    def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return torch.tensor([row + [0] * (width - len(row)) for row in rows]), mask

    ids, mask = pad([s.input_ids for s in data])
    targets, target_mask = pad([[0, *s.target_ids[:-1]] for s in data])
    with torch.no_grad():
        out = model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=targets,
            **({"decoder_attention_mask": target_mask} if masked else {}),
        )  # fmt: skip
    return [row[: len(s.target_ids)] for row, s in zip(out.logits, data, strict=True)]


def test_the_usual_methods_fit() -> None:
    assert {"lora", "bitfit", "bottleneck", "prompt_tuning", "prefix_tuning"} <= set(fitting())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "umt5"])
def test_plain_base_gives_transformers_logits(kind: str, tied: bool) -> None:
    """The scale of the logits is the architecture's, whether embeddings are tied or not."""
    model = make_model(kind, tie_word_embeddings=tied, num_decoder_layers=2)
    data = samples(5, seed=3)
    theirs = their_logits(model, data)
    adapters = open_with_all(model)
    ours = logits_of(adapters, None, data)
    kit.measured(f"{kind} base logits", kit.difference(ours, theirs), LIMIT)
    (loss,) = forward_losses(adapters, [Work("bitfit", data[:2])])
    expected = sum(
        torch.nn.functional.cross_entropy(row, torch.tensor(s.target_ids), reduction="sum")
        for row, s in zip(logits_of(adapters, "bitfit", data[:2]), data[:2], strict=True)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "umt5"])
def test_together_equals_alone(kind: str) -> None:
    """Losses and gradients of every method, dropout and noise on, beside neighbours of other lengths and prefixes."""
    adapters = open_with_all(make_model(kind, torch.float64), dropout=True)
    adapters.add("other", METHODS["prefix_tuning"](num_virtual_tokens=7, prefix_init="random"))
    work = [
        Work(name, samples(2 + i % 3, 1, 4 + 7 * (i % 4), seed=i), 17 * i, divisor=3.0, neftune_alpha=5.0)
        for i, name in enumerate([*fitting(), "other"])
    ]
    losses = forward_losses(adapters, [Work(None, samples(2, 20, 30)), *work])[1:]
    torch.autograd.backward([loss for loss in losses if loss.requires_grad])  # a hard prompt learns nothing
    together = [kit.gradients(adapters[w.adapter]) for w in work]
    for w, loss, grads in zip(work, losses, together, strict=True):
        (alone,) = forward_losses(adapters, [w])
        if not alone.requires_grad:
            assert abs((loss - alone).item()) <= 1e-10
            assert not list(adapters[w.adapter].parameters())
            continue
        alone.backward()
        own = kit.gradients(adapters[w.adapter])
        assert own.keys() == grads.keys()
        kit.measured(f"{kind} {w.adapter} loss, together - alone", abs((loss - alone).item()), 1e-10)
        worst = kit.difference(grads.values(), own.values())
        kit.measured(f"{kind} {w.adapter} gradient, together - alone", worst, 1e-10)
        assert any(g.abs().max() > 0 for g in own.values()), w.adapter


def train(model: Any, methods: list[str], steps: int = 5, **options: bool) -> dict[str, list[Tensor]]:
    adapters = Adapters(model, describe(model), **options)
    jobs = []
    for method in methods:
        number = kit.ALL.index(method)
        settings = {**kit.SETTINGS.get(method, {}), **kit.DROPOUT.get(method, {})}
        # A bias of cross-attention's keys has no gradient but rounding, which Adam divides by adam_epsilon.
        config = JobConfig(
            name=method, method=method, method_settings=settings, steps=steps - number % 2, batch_size=1 + number % 4,
            gradient_accumulation_steps=1 + number % 2, seed=number, learning_rate=1e-3,
        )  # fmt: skip
        data = samples(20, 1, 5 + 6 * (number % 3), seed=number)
        jobs.append(Job(config, adapters.add(method, config.method_config(), seed=number), data, data[:4]))
    before = kit.sha256(model.state_dict().values())
    began = {job.name: kit.sha256(job.parameters) for job in jobs}
    Trainer(adapters, jobs).run()
    assert kit.sha256(model.state_dict().values()) == before, "the base changed"
    assert all(kit.sha256(job.parameters) != began[job.name] for job in jobs if job.parameters)
    out = {job.name: list(job.tensors().values()) for job in jobs}
    adapters.close()
    return out


def test_trained_together_equals_trained_alone() -> None:
    model = make_model("t5", torch.float64)
    together = train(model, fitting())
    for method in fitting():
        alone = train(model, [method])
        kit.measured(f"{method} trained together - alone", kit.difference(together[method], alone[method]), 1e-10)


def test_checkpointing_changes_nothing() -> None:
    """Also with prefixes, whose cache a recomputed block reads a second time, and with another pass in between."""
    model, found = make_model("t5"), []
    work = [Work(name, samples(3, 1, 12, seed=i), i) for i, name in enumerate(fitting())]
    for checkpointing in (False, True):
        adapters = open_with_all(model, dropout=True, checkpointing=checkpointing)
        losses = forward_losses(adapters, work)
        with torch.no_grad():
            forward_losses(adapters, [Work(None, samples(2))])
        torch.autograd.backward(losses)
        found.append([loss.detach() for loss in losses])
        found[-1] += [g for name in fitting() for g in kit.gradients(adapters[name]).values()]
        adapters.close()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpointing_is_used() -> None:
    model = make_model("t5")
    shape = describe(model)
    calls: list[str] = []
    for path in ("encoder.block.2", "decoder.block.2"):
        model.get_submodule(path).layer[0].register_forward_hook(lambda *_, path=path: calls.append(path))
    adapters = Adapters(model, shape, checkpointing=True)
    adapters.add("lora", kit.method_config("lora"))
    forward_losses(adapters, [Work("lora", samples(2))])[0].backward()
    assert sorted(calls) == ["decoder.block.2"] * 2 + ["encoder.block.2"] * 2


@pytest.mark.parametrize(("inputs", "answers"), [((9, 12), (1, 4)), ((1, 3), (9, 14))], ids=["longer", "shorter"])
def test_dropout_in_cross_attention_sees_the_encoders_rows(inputs: tuple[int, int], answers: tuple[int, int]) -> None:
    """Its key and value projections read encoder rows: more of them, or fewer, than the decoder has."""
    model = make_model("t5", torch.float64)
    adapters = Adapters(model, describe(model))
    for index, (name, dropout) in enumerate({"a": 0.5, "b": 0.5, "hardly": 1e-13}.items()):
        targets = ["EncDecAttention.k", "EncDecAttention.v"]
        config = METHODS["lora"](r=2, target_modules=targets, lora_dropout=dropout)
        kit.randomize(adapters.add(name, config), index)
    data = [
        Sample(ids, [0.0] * len(ids), "", target_ids=tuple(answer))
        for ids, answer in zip(kit.texts(3, *inputs, seed=1), kit.texts(3, *answers, seed=2), strict=True)
    ]
    (alone,) = forward_losses(adapters, [Work("a", data, 5)])
    for low, high in ((1, 2), (25, 30)):
        (beside, _) = forward_losses(adapters, [Work("a", data, 5), Work("b", samples(2, low, high), 6)])
        assert abs((beside - alone).item()) <= 1e-10
    (without,) = forward_losses(adapters, [Work("a", data)])
    assert abs((without - alone).item()) > 1e-6, "dropout does nothing"
    # A mask that is 1 wherever a token is drops none of them.
    (hardly,), (none,) = (forward_losses(adapters, [Work("hardly", data, seed)]) for seed in (5, None))
    assert abs((hardly - none).item()) <= 1e-10


# -- peft


def peft_config(method: str, kind: str, layers: int = 3) -> peft.PeftConfig:
    task = {"task_type": "SEQ_2_SEQ_LM"}
    if method == "lora":
        return peft.LoraConfig(**task, r=4, lora_alpha=7, target_modules="all-linear")
    if method == "lora layers":
        return peft.LoraConfig(**task, r=4, target_modules=["q", "v", "wo"], layers_to_transform=[1])
    if method == "prompt_tuning":
        return peft.PromptTuningConfig(**task, num_virtual_tokens=5)
    # peft takes d_model for the width of a key unless it is told.
    return peft.PrefixTuningConfig(**task, num_virtual_tokens=5, token_dim=24, num_attention_heads=4)


def fresh_peft(kind: str, method: str, **more: Any) -> Any:
    model = peft.get_peft_model(make_model(kind, **more), peft_config(method, kind))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


CASES = [
    *[(kind, method, {}) for kind in KINDS for method in ("lora", "lora layers", "prompt_tuning", "prefix_tuning")],
    ("t5", "prefix_tuning", {"num_layers": 2}),
    ("t5", "prefix_tuning", {"num_layers": 4}),
]


@pytest.mark.parametrize(("kind", "method", "more"), CASES)
def test_peft_to_ours_and_back(kind: str, method: str, more: dict[str, int], tmp_path: Path) -> None:
    theirs = fresh_peft(kind, method, **more)
    theirs.save_pretrained(tmp_path / "theirs")
    data = samples(4, 2, 12, seed=5)
    model = make_model(kind, **more)
    base = their_logits(model, data)
    adapters = Adapters(model, describe(model))
    adapter = adapters.load("it", tmp_path / "theirs")
    ours = logits_of(adapters, "it", data)
    kit.measured(f"{kind} {method} {more}, ours - peft", kit.difference(ours, their_logits(theirs, data)), LIMIT)
    assert kit.difference(ours, base) > 1e-2, "the adapter does nothing"

    kit.randomize(adapter, 9)
    ours = logits_of(adapters, "it", data)
    adapters.save("it", tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make_model(kind, **more), tmp_path / "ours").eval()
    assert type(again) is peft.PeftModelForSeq2SeqLM
    kit.measured(f"{kind} {method} {more}, peft - ours", kit.difference(ours, their_logits(again, data)), LIMIT)


@pytest.mark.parametrize(("method", "kind"), kit.in_turn(["lora", "prompt_tuning", "prefix_tuning"], KINDS))
def test_greedy_generation_is_that_of_peft_in_transformers(kind: str, method: str, tmp_path: Path) -> None:
    theirs = fresh_peft(kind, method)
    theirs.save_pretrained(tmp_path)
    model = make_model(kind)
    adapters = Adapters(model, describe(model))
    adapters.load("it", tmp_path)
    prompts = kit.texts(4, 2, 11, seed=8)
    answers = [answer.ids for answer in generate(adapters, [Request(p, "it", 12) for p in prompts], stop_ids=(1,))]
    assert answers == [greedy(theirs, prompt, 12) for prompt in prompts]
    written = [greedy_in_transformers(theirs, prompt, 12) for prompt in prompts]
    if method == "prefix_tuning" and cache_name(theirs.get_base_model().forward) == "cache" and written != answers:
        plain = make_model(kind)
        assert written == [greedy_in_transformers(plain, prompt, 12) for prompt in prompts]
        pytest.skip(
            f"peft {peft.__version__} loses its prefix in generate: it sets past_key_values, which transformers "
            f"{transformers.__version__} calls cache"
        )
    assert written == answers


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest answer by the model's forward, without a cache."""
    ids, written = torch.tensor([prompt]), [0]
    while len(written) <= count and written[-1] != 1:
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([written]))
        written.append(int(out.logits[0, -1].argmax()))
    return [token for token in written[1:] if token != 1]


def greedy_in_transformers(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, num_beams=1
    )[0].tolist()
    assert out[0] == 0
    return [token for token in out[1:] if token != 1]


@pytest.mark.parametrize("method", kit.ALL)
def test_saved_and_loaded_is_the_same(method: str, tmp_path: Path) -> None:
    if method not in fitting():
        pytest.skip("does not take a T5")
    adapters = Adapters(model := make_model("t5"), describe(model))
    kit.randomize(adapters.add("it", kit.method_config(method)), 4)
    data = samples(3)
    before = logits_of(adapters, "it", data)
    adapters.save("it", tmp_path)
    entries = json.loads((tmp_path / "adapter_config.json").read_text())
    assert entries.get("task_type", "SEQ_2_SEQ_LM") == "SEQ_2_SEQ_LM"
    if entries.get("peft_type") == "PREFIX_TUNING":
        assert entries["num_transformer_submodules"] == 2
    adapters.remove("it")
    adapters.load("it", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, logits_of(adapters, "it", data), strict=True))


# -- generation


@pytest.mark.parametrize("kind", ["t5", pytest.param("mt5", marks=pytest.mark.slow), "umt5"])
def test_greedy_equals_teacher_forcing_in_any_company(kind: str) -> None:
    """Rows end at different times, prefixes differ, and the cache is thinned in between."""
    adapters = open_with_all(make_model(kind, torch.float64, initializer_factor=1.0))
    asked = []
    for turn in range(2):
        for index, name in enumerate([None, *fitting()]):
            (ids,) = kit.texts(1, 1, 17, seed=10 * turn + index)
            asked.append(Request(ids, name, 3 + 5 * ((index + turn) % 3)))
    random.Random(0).shuffle(asked)
    answers = [c.ids for c in generate(adapters, asked, stop_ids=())]
    assert [len(a) for a in answers] == [r.max_new_tokens for r in asked]
    assert len({tuple(a) for a in answers}) > len(fitting())
    for request, answer in zip(asked, answers, strict=True):
        given = Sample(list(request.prompt), [0.0] * len(request.prompt), "", target_ids=(*answer, 1))
        with torch.no_grad():
            (logits,) = logits_of(adapters, request.adapter, [given])
        assert logits.argmax(-1)[:-1].tolist() == answer, request.adapter
        assert generate(adapters, [request], stop_ids=())[0].ids == answer, request.adapter


def test_the_cache_gives_the_hidden_states_of_one_pass() -> None:
    """Also after rows have left."""
    adapters = open_with_all(make_model("t5", torch.float64))
    names = [None, *fitting()]
    data = {name: samples(2, 1, 15, seed=i) for i, name in enumerate(names)}
    answers = [(5 + i, 9, 40 + i, 7) for i in range(2 * len(names))]
    parts = [
        Part(name, [s.input_ids for s in data[name]], targets=answers[2 * i : 2 * i + 2])
        for i, name in enumerate(names)
    ]
    layout = adapters.layout
    assert isinstance(layout, EncoderDecoder)
    with torch.no_grad():
        stream, hidden = adapters.run(parts)
        whole = hidden[torch.tensor([list(rows) for rows in stream.rows])]
        decoder, inputs = Decoder(layout, parts), torch.tensor(answers)
        rows, counts = torch.arange(len(answers)), [(name, 2) for name in names]
        for place in range(4):
            kit.measured(f"place {place}", kit.difference(decoder.hidden, whole[rows, place]), 1e-10)
            if place == 1:  # every second row, which leaves each adapter one
                decoder.keep(torch.arange(1, len(rows), 2))
                rows, counts = rows[1::2], [(name, 1) for name in names]
            decoder.step(inputs[rows, place], counts)


# -- what does not fit


def test_evaluation_is_the_mean_over_targets() -> None:
    adapters = open_with_all(make_model("t5"))
    data = samples(7, 1, 9)
    whole = evaluate_loss(adapters, "lora", data)
    parts = evaluate_loss(adapters, "lora", data, max_tokens=20)
    (total,) = forward_losses(adapters, [Work("lora", data, None, divisor=sum(len(s.target_ids) for s in data))])
    assert whole == pytest.approx(float(total), rel=1e-5)
    assert parts == pytest.approx(float(total), rel=1e-5)


def test_bottlenecks_stand_after_every_sub_layer() -> None:
    adapters = Adapters(model := make_model("t5"), describe(model))
    sites = adapters.add("it", kit.method_config("bottleneck", leave_out=[0, 5])).sites()
    assert {path.split(".layer.")[1] for path in sites if "encoder" in path} == {
        "0.SelfAttention.o",
        "1.DenseReluDense.wo",
    }
    decoder = {"0.SelfAttention.o", "1.EncDecAttention.o", "2.DenseReluDense.wo"}
    assert {path.split(".layer.")[1] for path in sites if "decoder" in path} == decoder
    # AdapterHub numbers layers on through both stacks.
    assert {path.split(".layer.")[0] for path in sites} == {
        "encoder.block.1", "encoder.block.2", "decoder.block.0", "decoder.block.1"
    }  # fmt: skip


def test_misfits_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = Adapters(model := make_model("t5"), describe(model))
    with monkeypatch.context() as patch:
        patch.setattr(METHODS["lora"], "tasks", frozenset({"causal_lm"}))
        with pytest.raises(UserError, match="method lora does not work with t5, whose task is seq2seq"):
            adapters.add("it", kit.method_config("lora"))
    lora = METHODS["lora"](r=2)
    for kind, message in (("inserted_blocks", "adds blocks"), ("sites", "cannot carry an adapter")):
        with monkeypatch.context() as patch:
            where = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"
            patch.setattr("weft.methods.lora.Lora." + kind, lambda self, where=where: {where: ()}, raising=False)
            with pytest.raises(UserError, match=message):
                adapters.add("it", lora)
    assert adapters.names == []
    with pytest.raises(UserError, match="exact mode needs the packed stream"):
        Adapters(make_model("t5"), describe(model), exact=True)


def test_closing_gives_the_model_back() -> None:
    model = make_model("t5")
    classes = [type(module) for module in model.modules()]
    data = samples(3)
    before = their_logits(model, data)
    adapters = open_with_all(model, checkpointing=True)
    forward_losses(adapters, [Work("lora", data)])[0].backward()
    adapters.close()
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(a, b) for a, b in zip(before, their_logits(model, data), strict=True))
