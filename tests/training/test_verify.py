"""The proof on the first batch: it lets sound runs pass, changes nothing, and catches what is planted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from tests.training import recipe

from weft.api import Adapters
from weft.core.stream import Stream
from weft.errors import UserError
from weft.layouts import attention, building
from weft.layouts.padded_batch import Padded
from weft.models import describe, load_base
from weft.ops.attention import SequenceLayout, varlen_attention
from weft.training import Job, JobConfig, Trainer
from weft.training.step import train_step
from weft.training.verify import verify_packing


def jobs_of(adapters: Adapters, methods: list[str], **settings: Any) -> list[Job]:
    jobs = []
    for seed, method in enumerate(methods):
        config = JobConfig(name=method, method=method, method_settings=kit.SETTINGS.get(method, {}), **settings)
        adapter = kit.randomize(adapters.add(method, config.method_config(), seed=seed), seed)
        jobs.append(Job(config, adapter, kit.samples(12, seed=seed)))
    return jobs


def open_model(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Adapters:
    model = kit.make_model(kind, dtype)
    return Adapters(model, describe(model), **options)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    kit.in_turn(["llama", "bloom", "gpt2", "gemma", "opt", "falcon"], [torch.bfloat16, torch.float32, torch.float64]),
)
def test_sound_models_pass_with_every_method(kind: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and kind == "falcon":
        pytest.skip("transformers' own Falcon mixes dtypes")
    adapters = open_model(kind, dtype)
    methods = [method for method in kit.TRAINED if kind != "opt" or method != "llama_pro"]
    for settings in ({"batch_size": 4}, {"batch_tokens": 60}, {"batch_size": 1}):
        proof = verify_packing(adapters, jobs := jobs_of(adapters, methods, **settings))
        print(f"[measured] {kind} {dtype} {settings}: alone {proof.alone:.3g}, neighbours {proof.neighbours:.3g}")
        assert proof.sequences == len(methods)
        for job in jobs:
            adapters.remove(job.name)
    adapters.close()


@pytest.mark.parametrize("options", [{"padded": True}, {"exact": True}, {"checkpointing": True}], ids=str)
def test_every_way_of_running(options: dict[str, bool]) -> None:
    adapters = open_model("llama", **options)
    assert verify_packing(adapters, jobs_of(adapters, ["lora", "prefix_tuning"], batch_size=4)).sequences == 2
    adapters.close()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_bases(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with outliers, which reach no neighbour; a leak is caught there too."""
    pytest.importorskip("bitsandbytes")
    model = kit.make_model("llama", hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        model.get_input_embeddings().weight[::5, 3] = 60.0
    model.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), quantization=kind, dtype="float32", device="cpu", tokenizer=object())
    adapters = Adapters(base.model, base.architecture)
    jobs = jobs_of(adapters, ["lora", "prompt_tuning"], batch_size=4)
    proof = verify_packing(adapters, jobs)
    print(f"[measured] {kind}: alone {proof.alone:.3g}, neighbours {proof.neighbours:.3g}")

    def leaking(q: Any, k: Any, v: Any, layout: SequenceLayout, **options: Any) -> Any:
        return varlen_attention(q, k, v, one_sequence(layout), **options)

    monkeypatch.setattr(attention, "varlen_attention", leaking)
    with pytest.raises(UserError, match="sequences leak"):
        verify_packing(adapters, jobs)
    adapters.close()


def test_nothing_packed_is_nothing_to_prove(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = open_model("llama")
    monkeypatch.setattr(adapters, "forward", lambda stream: pytest.fail("a pass for nothing"))
    assert verify_packing(adapters, jobs_of(adapters, ["lora"], batch_size=1)).sequences == 0
    adapters.close()


def test_the_proof_is_made_where_sequences_lie_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Best fit puts the longest record first, here alone; the leak between the others is found all the same."""
    adapters = open_model("llama")
    samples = [kit.samples(1, 30, 30)[0], *kit.samples(3, 8, 9, seed=1)]
    config = JobConfig(name="one", method="lora", batch_size=1, gradient_accumulation_steps=4)
    job = Job(config, adapters.add("one", config.method_config()), samples)
    assert [len(pack) for pack in job.micro_batches()] == [1, 3]
    assert verify_packing(adapters, [job]).sequences == 1

    def leaking(q: Any, k: Any, v: Any, layout: SequenceLayout, **options: Any) -> Any:
        return varlen_attention(q, k, v, one_sequence(layout), **options)

    monkeypatch.setattr(attention, "varlen_attention", leaking)
    with pytest.raises(UserError, match="sequences leak"):
        verify_packing(adapters, [job])
    adapters.close()


def test_a_run_is_bitwise_the_same_with_and_without(tmp_path: Path) -> None:
    found = []
    for verify in (True, False):
        torch.manual_seed(5)
        assert recipe.go_on(tmp_path / str(verify), verify_packing=verify)
        found.append((recipe.outcome(tmp_path / str(verify)), torch.get_rng_state()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_it_costs_less_than_a_step() -> None:
    """Counted in tokens through the base, forwards only; a step's backward pass costs another one or two."""
    adapters = open_model("llama")
    jobs = jobs_of(adapters, ["lora", "prompt_tuning"], batch_tokens=90)
    passes: list[int] = []
    forward = adapters.forward

    def counted(stream: Stream) -> torch.Tensor:
        passes.append(sum(stream.lengths))
        return forward(stream)

    adapters.forward = counted  # type: ignore[method-assign]
    begun = time.perf_counter()
    verify_packing(adapters, jobs)
    seconds, proof = time.perf_counter() - begun, sum(passes)
    passes.clear()
    train_step(adapters, jobs)
    print(f"[measured] tokens of the proof {proof}, of a step's forward pass {sum(passes)}; {seconds:.3f} s")
    assert proof <= 2 * sum(passes)
    adapters.close()


def one_sequence(layout: SequenceLayout) -> SequenceLayout:
    """As if the whole stream were one sequence: what a mask that was forgotten does."""
    return SequenceLayout.build([layout.tokens])


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"batch_tokens": 60}], ids=str)
def test_attention_without_its_mask_is_caught(
    kind: str, settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(q: Any, k: Any, v: Any, layout: SequenceLayout, **options: Any) -> Any:
        return varlen_attention(q, k, v, one_sequence(layout), **options)

    adapters = open_model(kind)
    monkeypatch.setattr(attention, "varlen_attention", leaking)
    wanted = (
        r"(?s)sample \d+: sequences leak.*job 'lora'.*The attention 'weft.*over the packed stream \(torch.float32, cpu"
    )
    with pytest.raises(UserError, match=wanted):
        Trainer(adapters, jobs_of(adapters, ["lora"], **settings)).run()
    Trainer(adapters, jobs_of(adapters, ["bitfit"], steps=1, **settings), verify_packing=False).run()
    adapters.close()


def test_another_jobs_sequences_are_neighbours_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(q: Any, k: Any, v: Any, layout: SequenceLayout, **options: Any) -> Any:
        return varlen_attention(q, k, v, one_sequence(layout), **options)

    adapters = open_model("llama")
    monkeypatch.setattr(attention, "varlen_attention", leaking)
    with pytest.raises(UserError, match="job 'lora'"):
        verify_packing(adapters, jobs_of(adapters, ["bitfit", "lora"], batch_size=1))
    adapters.close()


def test_a_leak_that_the_loss_alone_would_hide_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousandth of the neighbours' values: less than bfloat16's rounding, but not nothing."""

    def leaking(q: Any, k: Any, v: Any, layout: SequenceLayout, **options: Any) -> Any:
        return varlen_attention(q, k, v, layout, **options) + 1e-3 * v.mean()

    adapters = open_model("llama", torch.float32)
    monkeypatch.setattr(attention, "varlen_attention", leaking)
    with pytest.raises(UserError, match="when only other sequences change"):
        verify_packing(adapters, jobs_of(adapters, ["lora"], batch_size=4))
    adapters.close()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_positions_that_go_on_counting_are_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = building.build_stream

    def counting(*args: Any, **options: Any) -> Stream:
        made = plain(*args, **options)
        object.__setattr__(made, "position_ids", torch.arange(len(made.input_ids)))
        return made

    adapters = open_model(kind)
    monkeypatch.setattr(building, "build_stream", counting)
    with pytest.raises(UserError, match=r"positions begin at \d+ instead of 0"):
        verify_packing(adapters, jobs_of(adapters, ["lora"], batch_size=4))
    # Also by the loss alone, where positions are learned.
    monkeypatch.setattr("weft.training.verify._check_positions", lambda *args: None)
    if kind == "gpt2":
        with pytest.raises(UserError, match=r"loss is .* alone"):
            verify_packing(adapters, jobs_of(adapters, ["bitfit"], batch_size=4))
    adapters.close()


def test_a_padded_model_that_ignores_its_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a padded batch that see each other, as after a reshape gone wrong."""
    plain = Padded.forward

    def leaking(self: Padded, made: Stream) -> torch.Tensor:
        hidden = plain(self, made)
        return hidden + 0.01 * hidden.mean()

    monkeypatch.setattr(Padded, "forward", leaking)
    adapters = open_model("llama", padded=True)
    with pytest.raises(UserError, match="in padded batches"):
        verify_packing(adapters, jobs_of(adapters, ["lora"], batch_size=4))
    adapters.close()
