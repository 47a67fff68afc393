"""One job with several methods: it computes what both compute by hand, and keeps what one method promises."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests import kit
from torch import Tensor
from torch.nn import functional as F

import weft
from weft.api import Adapters
from weft.core.adapter import Adapter, BuildContext, MethodConfig
from weft.core.stream import Part
from weft.data import Sample
from weft.errors import UserError
from weft.generation import Request, generate
from weft.libraries import cache_arguments, growing_cache
from weft.methods import BitFitConfig, LoraConfig
from weft.methods.combined import Combined, CombinedConfig
from weft.methods.own_weights import OwnWeights
from weft.models import describe
from weft.objectives.passes import Work, forward_losses
from weft.ops.seeds import stable_seed
from weft.training import Job, JobConfig, Trainer, make_config
from weft.training.config import read_run_config
from weft.training.method_settings import method_of
from weft.training.step import train_step

# method -> the job's settings
JOBS: dict[str, dict[str, Any]] = {
    "lora+bitfit": {"method_settings": {"r": 3, "lora_dropout": 0.2, "add_missing": True}},
    "prefix_tuning+bottleneck": {
        "method_settings": {
            "dropout": 0.1, "prefix_tuning": {"num_virtual_tokens": 3, "prefix_projection": True},
            "bottleneck": {"reduction_factor": 4},
        }
    },
    "lora+prompt_tuning": {
        "method_settings": {"r": 2, "lora_dropout": 0.1, "num_virtual_tokens": 4}, "neftune_noise_alpha": 5.0
    },
}  # fmt: skip
COMBINED = list(JOBS)


def job_config(method: str, **more: Any) -> JobConfig:
    name = method.replace("+", "-")
    return JobConfig(name=name, method=method, **{"steps": 6, "batch_size": 2, **JOBS.get(method, {}), **more})


def opened(kind: str, method: str, settings: dict[str, Any] | None = None, **options: Any) -> tuple[Adapters, Any]:
    """A float64 model with one randomised adapter of the methods, named x."""
    model = kit.make_model(kind, torch.float64)
    adapters = Adapters(model, describe(model), **options)
    config = method_of(method, JOBS[method]["method_settings"] if settings is None else settings)
    return adapters, kit.randomize(adapters.add("x", config, seed=1), 2)


def by_hand(adapters: Adapters, adapter: Adapter, model: Any) -> None:
    """Put LoRA's and BitFit's changes into the weights of a model of its own."""
    with torch.no_grad():
        for part in adapter.parts if isinstance(adapter, Combined) else [adapter]:
            for path, layer in zip(getattr(part, "paths", ()), getattr(part, "layers", ()), strict=True):
                module = model.get_submodule(path)
                if isinstance(part.config, LoraConfig):
                    change = layer.scaling * layer.lora_B @ layer.lora_A
                    module.weight += change.T if type(module).__name__ == "Conv1D" else change
                elif isinstance(part.config, BitFitConfig):
                    if getattr(module, "bias", None) is None:
                        module.register_forward_hook(lambda m, x, y, d=layer.bias_delta: y + d)
                    else:
                        module.bias += layer.bias_delta
                else:
                    module.register_forward_hook(lambda m, x, y, b=layer: y + bottleneck(b, y))


def bottleneck(layer: Any, h: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(h, layer.down_weight, layer.down_bias)), layer.up_weight, layer.up_bias)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_lora_and_bitfit_by_hand(kind: str) -> None:
    adapters, adapter = opened(kind, "lora+bitfit")
    reference = kit.make_model(kind, torch.float64)
    by_hand(adapters, adapter, reference)
    compare(adapters, reference, kind)


def compare(adapters: Adapters, reference: Any, kind: str) -> None:
    texts = kit.texts(4, seed=3)
    ours = [adapters.logits(h, [("x", len(h))]) for h in kit.hidden_of(adapters, [Part("x", texts)])]
    plain = [adapters.logits(h, [(None, len(h))]) for h in kit.hidden_of(adapters, [Part(None, texts)])]
    theirs = [reference(torch.tensor([ids])).logits[0] for ids in texts]
    # transformers computes a float64 Llama's norms and rotations, and BLOOM's softmax, in float32.
    kit.measured(f"{kind}: by hand", kit.difference(ours, theirs), 1e-12 if kind == "gpt2" else 1e-5)
    assert kit.difference(ours, plain) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prefix_and_bottleneck_by_hand(kind: str) -> None:
    """MAM: learned keys and values before each layer's own, and a bottleneck after each sub-layer."""
    adapters, adapter = opened(kind, "prefix_tuning+bottleneck")
    prefix, bottlenecks = adapter.parts
    model = kit.make_model(kind, torch.float64)
    by_hand(adapters, bottlenecks, model)
    states = prefix.prefix_states()

    def reference(ids: Tensor) -> Any:
        cache = growing_cache([(k[None], v[None]) for k, v in states])
        positions = torch.arange(3, 3 + ids.shape[1])[None]
        return model(ids, **cache_arguments(model.forward, cache), position_ids=positions)

    compare(adapters, reference, kind)


def test_lora_noise_and_prompt_by_hand() -> None:
    """A training loss: rows with NEFTune's noise after the prompt's rows without, through changed weights."""
    adapters, adapter = opened("gpt2", "lora+prompt_tuning", {"r": 2, "num_virtual_tokens": 4})
    lora, prompt = adapter.parts
    reference = kit.make_model("gpt2", torch.float64)
    by_hand(adapters, lora, reference)
    samples, seed, alpha = kit.samples(3), 11, 5.0
    losses = forward_losses(
        adapters, [Work(None, kit.samples(2), 3), Work("x", samples, seed, divisor=1.0, neftune_alpha=alpha)]
    )
    generator = torch.Generator().manual_seed(stable_seed(seed, "neftune"))
    noise = torch.rand(sum(len(s.input_ids) for s in samples), 32, generator=generator) * 2 - 1
    wanted, begin = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        n = len(sample.input_ids)
        own = reference.get_input_embeddings()(torch.tensor(sample.input_ids))
        own = own + alpha / (n * 32) ** 0.5 * noise[begin : begin + n]
        logits = reference(inputs_embeds=torch.cat([prompt.virtual_tokens(), own])[None]).logits[0, 3:]
        begin += n
        for place, weight in enumerate(sample.weights):
            wanted = wanted + weight * F.cross_entropy(logits[place], torch.tensor(sample.input_ids[place]))
    # Adding noise in float32 rounds its last digit.
    kit.measured("training loss by hand", float((losses[1] - wanted).detach().abs()), 1e-6)
    (still,) = forward_losses(adapters, [Work("x", samples, seed, divisor=1.0)])
    assert abs(float(losses[1] - still)) > 1e-3


def train(methods: list[str], *, steps: int = 6, dtype: torch.dtype = torch.float64, **options: bool) -> dict[str, Any]:
    """Parameters and optimizer states of the jobs after training side by side."""
    model = kit.make_model("llama", dtype)
    adapters = Adapters(model, describe(model), **options)
    jobs = []
    for index, method in enumerate(methods):
        seed = [*COMBINED, "lora", "bitfit"].index(method)
        settings = {"method_settings": kit.SETTINGS[method]} if method in kit.SETTINGS else {}
        config = job_config(method, seed=seed, steps=steps, batch_size=2 + seed % 2, **settings)
        adapter = adapters.add(config.name, config.method_config(), seed=seed)
        jobs.append(Job(config, adapter, kit.samples(12, seed=seed)))
        assert index < len(methods)
    Trainer(adapters, jobs).run()
    out = {job.config.method: list(job.tensors().values()) for job in jobs}
    adapters.close()
    return out


def test_together_is_alone() -> None:
    methods = [*COMBINED, "lora", "bitfit"]
    together = train(methods, steps=20)
    for method in methods:
        alone = train([method], steps=20)
        kit.measured(f"{method} together - alone", kit.difference(together[method], alone[method]), 1e-10)


def test_exact_mode_is_bitwise() -> None:
    methods = ["lora", *COMBINED]
    together = train(methods, dtype=torch.float32, exact=True)
    recomputed = train(methods[::-1], dtype=torch.float32, exact=True, checkpointing=True)
    for method in methods:
        alone = train([method], dtype=torch.float32, exact=True)
        assert all(torch.equal(a, b) for a, b in zip(together[method], alone[method], strict=True)), method
        assert all(torch.equal(a, b) for a, b in zip(recomputed[method], alone[method], strict=True)), method


@pytest.mark.parametrize("method", COMBINED)
@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_saved_and_loaded_as_one(kind: str, method: str, tmp_path: Path) -> None:
    model = kit.make_model(kind)
    adapters = Adapters(model, describe(model))
    config = job_config(method, steps=2).model_copy(update={"name": "x"})
    adapter = adapters.add("x", config.method_config(), seed=1)
    Trainer(adapters, [Job(config, adapter, kit.samples(6))]).run()
    adapters.save("x", tmp_path / "a", base_name="base")
    texts = kit.texts(3)
    wanted = kit.hidden_of(adapters, [Part("x", texts)])
    adapters.remove("x")
    loaded = adapters.load("x", tmp_path / "a").config
    assert isinstance(loaded, CombinedConfig)
    assert [part.method for part in loaded.parts] == method.split("+")
    found = kit.hidden_of(adapters, [Part("x", texts)])
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    adapters.save("x", tmp_path / "b", base_name="base")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*") if path.is_file())
    assert len(files) >= 1 + 2 * 3  # an encoder lies in a file of its own
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_each_part_loads_in_peft_by_itself(tmp_path: Path) -> None:
    adapters, _ = opened("llama", "lora+prompt_tuning")
    adapters.save("x", tmp_path)
    parts = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert parts == ["1-lora", "2-prompt_tuning"]
    texts = kit.texts(3)
    for folder in parts:
        theirs = peft.PeftModel.from_pretrained(kit.make_model("llama", torch.float64), tmp_path / folder).eval()
        alone = adapters.load(folder, tmp_path / folder)
        skip = alone.num_virtual_tokens
        logits = [theirs(input_ids=torch.tensor([ids])).logits[0, skip:] for ids in texts]
        ours = [adapters.logits(h, [(folder, len(h))]) for h in kit.hidden_of(adapters, [Part(folder, texts)])]
        kit.measured(f"{folder}: ours - peft", kit.difference(ours, logits), 1e-5)
    # And one after the other they are the whole.
    adapters.stack("both", parts)
    whole, both = (kit.hidden_of(adapters, [Part(name, texts)]) for name in ("x", "both"))
    assert all(torch.equal(a, b) for a, b in zip(whole, both, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("padded", [False, True], ids=["cache", "padded"])
@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_generation_is_teacher_forcing(kind: str, padded: bool) -> None:
    model = kit.make_model(kind, torch.float64)
    adapters = Adapters(model, describe(model), padded=padded)
    for index, method in enumerate(COMBINED):
        kit.randomize(adapters.add(str(index), method_of(method, JOBS[method]["method_settings"])), index)
    asked = [
        Request(ids, name, 6)
        for i, name in enumerate([None, "0", "1", "2"])
        for ids in kit.texts(2, 2, 12, seed=20 + i)
    ]  # fmt: skip
    answers = [c.ids for c in generate(adapters, asked, stop_ids=())]
    assert len({tuple(answer) for answer in answers}) > 4
    for request, answer in zip(asked, answers, strict=True):
        (hidden,) = kit.hidden_of(adapters, [Part(request.adapter, [[*request.prompt, *answer]])])
        logits = adapters.logits(hidden, [(request.adapter, len(hidden))])
        assert logits.argmax(-1)[len(request.prompt) - 1 : -1].tolist() == answer


def test_packed_is_padded() -> None:
    """Losses and gradients, with noise, dropout, a prefix and a prompt."""
    found = []
    for padded in (False, True):
        model = kit.make_model("gpt2", torch.float64)
        adapters = Adapters(model, describe(model), padded=padded)
        work = []
        for index, method in enumerate(COMBINED):
            kit.randomize(adapters.add(str(index), method_of(method, JOBS[method]["method_settings"])), index)
            alpha = JOBS[method].get("neftune_noise_alpha", 0.0)
            work.append(Work(str(index), kit.samples(3, seed=index), 40 + index, divisor=1.0, neftune_alpha=alpha))
        losses = forward_losses(adapters, work)
        torch.autograd.backward(losses)
        found.append([*losses, *(g for name in adapters.names for g in kit.gradients(adapters[name]).values())])
    kit.measured("packed - padded", kit.difference(*[[t.detach() for t in one] for one in found]), 1e-10)


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rate named: every part its own default; a named one is for all, times each part's own factors."""
    model = kit.make_model("llama")
    adapters = Adapters(model, describe(model))
    adapter: Any = adapters.add("x", method_of("lora+bitfit", {"r": 2, "add_missing": True}))

    def rates(**settings: Any) -> dict[str, set[float]]:
        job = Job(JobConfig(name="x", method="lora+bitfit", steps=2, **settings), adapter, kit.samples(2))
        names = {id(p): n for n, p in adapter.named_parameters()}
        assert job.optimizer is not None
        found: dict[str, set[float]] = {"lora_A": set(), "lora_B": set(), "bias": set()}
        for group in job.optimizer.param_groups:
            for parameter in group["params"]:
                (key,) = [key for key in found if key in names[id(parameter)]]
                found[key].add(group["peak_lr"])
        return found

    lora, bits = (part.config.learning_rate(32) for part in adapter.parts)
    assert lora != bits
    assert rates() == {"lora_A": {lora}, "lora_B": {lora}, "bias": {bits}}
    assert rates(learning_rate=0.5) == {"lora_A": {0.5}, "lora_B": {0.5}, "bias": {0.5}}
    factor = lambda parameter: 4.0 if "lora_B" in parameter else 1.0  # noqa: E731
    monkeypatch.setattr(adapter.parts[0], "learning_rate_factor", factor)
    assert rates() == {"lora_A": {lora}, "lora_B": {4 * lora}, "bias": {bits}}
    own = lambda parameter, writes: 0.125  # noqa: E731
    monkeypatch.setattr(adapter.parts[1], "default_learning_rate", own)
    assert rates()["bias"] == {0.125}


def test_penalties_and_hooks_reach_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, adapter = opened("gpt2", "lora+bitfit", {"r": 2})
    told: list[tuple[int, str, int]] = []
    for index, part in enumerate(adapter.parts):
        value = torch.tensor(1.0 + index, dtype=torch.float64)
        monkeypatch.setattr(part, "penalty", lambda v=value: v)
        monkeypatch.setattr(part, "begin_training", lambda steps, i=index: told.append((i, "begin", steps)))
        monkeypatch.setattr(part, "after_step", lambda step, i=index: told.append((i, "step", step)))
    config = JobConfig(name="x", method="lora+bitfit", steps=2, batch_size=2)
    job = Job(config, adapter, kit.samples(4))
    (bare,) = forward_losses(adapters, [Work("x", job.micro_batches()[0], job.dropout_seed(0))])
    weight = sum(w for s in job.micro_batches()[0] for w in s.weights)
    loss = train_step(adapters, [job])["x"].loss
    kit.measured("penalties", abs(loss - (float(bare) / weight + 3.0)), 1e-9)
    assert told == [(0, "begin", 2), (1, "begin", 2), (0, "step", 1), (1, "step", 1)]


class _Weights(MethodConfig):
    """A stub: weights of its own at one norm."""

    method = "stub"
    peft_type = "STUB"

    path: str = "model.layers.1.input_layernorm"

    def build(self, name: str, context: BuildContext) -> Adapter:
        from weft.methods.site_adapter import SiteAdapter

        module = context.model.get_submodule(self.path)
        return SiteAdapter(self, name, {self.path: OwnWeights(module, ["weight"], context)})


def test_what_replaces_the_base_comes_first() -> None:
    """A norm's own weights forget the output they are given: a bias named before them must not get lost."""
    model = kit.make_model("llama", torch.float64)
    adapters = Adapters(model, describe(model))
    bits, own = BitFitConfig(add_missing=True), _Weights()
    found = []
    for name, parts in (("x", (bits, own)), ("y", (own, bits))):
        adapter: Any = adapters.add(name, CombinedConfig(parts=parts))
        for part in adapter.parts:
            kit.randomize(part, len(list(part.parameters())))
        found.append(kit.hidden_of(adapters, [Part(name, kit.texts(2))]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(UserError, match=r"in the place of 'model\.layers\.1\.input_layernorm'"):
        adapters.add("z", CombinedConfig(parts=(own, own)))
    assert adapters.names == ["x", "y"]


# -- configuration


def config_of(**given: Any) -> JobConfig:
    return make_config({"model": "tiny-llama", "data": "d.jsonl", **given}).jobs[0]


def parts_of(job: JobConfig) -> list[MethodConfig]:
    config = job.method_config()
    assert isinstance(config, CombinedConfig)
    return list(config.parts)


def test_settings_beside_and_under_the_methods_name() -> None:
    own = {"num_virtual_tokens": 2}
    job = config_of(method="prefix_tuning + prompt_tuning", num_virtual_tokens=7, prompt_tuning=own)
    assert job.name == "prefix_tuning-prompt_tuning"
    prefix, prompt = parts_of(job)
    assert (prefix.num_virtual_tokens, prompt.num_virtual_tokens) == (7, 2)  # type: ignore[attr-defined]
    # A job's own words win over the defaults, wherever either stands.
    jobs = [{"method": "lora+bitfit", "r": 3}, {"method": "lora", "lora": {"r": 4}}, {"method": "lora"}]
    run = make_config({"model": "m", "data": "d", "lora": {"lora_rank": 2, "lora_dropout": 0.1}, "jobs": [
        {"name": str(i), **job} for i, job in enumerate(jobs)]})  # fmt: skip
    configs = [parts_of(run.jobs[0])[0], *(job.method_config() for job in run.jobs[1:])]
    assert [(c.r, c.lora_dropout) for c in configs] == [(3, 0.1), (4, 0.1), (2, 0.1)]  # type: ignore[attr-defined]


def test_other_tools_words() -> None:
    job = config_of(peft_type="LORA+PROMPT_TUNING", lora_rank=5, prompt_tuning={"num_virtual_tokens": 3})
    assert job.method == "lora+prompt_tuning"
    assert parts_of(job)[0].r == 5  # type: ignore[attr-defined]
    assert config_of(method="prefix+adapter").method == "prefix_tuning+bottleneck"
    for key in ("neftune_alpha", "noisy_embedding_alpha", "neftune_noise_alpha"):
        assert config_of(method="lora", **{key: 5}).neftune_noise_alpha == 5
    assert config_of(method="lora", neftune_noise_alpha=None).neftune_noise_alpha == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "lora+lora"}, "names one method twice"),
        ({"method": "lora+bitfti"}, "Did you mean 'bitfit'"),
        ({"method": "lora+"}, "no method named ''"),
        ({"method": "lora+bitfit", "lora": 3}, "expected this method's settings"),
        ({"method": "lora+bitfit", "lora": {"rr": 3}}, "unknown key 'rr'"),
        ({"method": "lora+bitfit", "lora": {"r": True}}, "expected a whole number, not true"),
        ({"method": "lora", "bottleneck": {"reduction_factor": 3}}, "no job's method takes it"),
        ({"method": "lora+prompt_tuning", "prompt_tuning": {"r": 3}}, "unknown key 'r'"),
        ({"method": "lora", "neftune_noise_alpha": -1}, "neftune_noise_alpha"),
        ({"method": "lora", "neftune_noise_alpha": True}, "neftune_noise_alpha"),
    ],
)
def test_refused_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(**given)


def test_overrides_reach_one_of_the_methods() -> None:
    from weft.training.config import build_config

    values = {"model": "m", "data": "d", "method": "lora+bitfit"}
    for override in ("jobs.0.lora.r=3", "jobs.lora-bitfit.r=3", "lora.r=3", "r=3"):
        (job,) = build_config(values, [override]).jobs
        assert parts_of(job)[0].r == 3  # type: ignore[attr-defined]


def test_a_run_from_its_configuration_to_its_answers(tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Trained, interrupted, resumed, opened: as the unbroken run, to the bit."""
    given = {
        "model": str(tiny_llama_dir), "data": str(tiny_data), "steps": 4, "save_steps": 1, "logging_steps": 1,
        "jobs": [{"method": m, "neftune_noise_alpha": s.get("neftune_noise_alpha", 0), **s["method_settings"]}
                 for m, s in JOBS.items()],
    }  # fmt: skip
    for name in ("whole", "broken"):
        count = 0

        def stop(name: str = name) -> bool:
            nonlocal count
            count += 1
            return name == "broken" and count == 3

        config = make_config({**given, "output_dir": str(tmp_path / name)})
        assert weft.train(config, should_stop=stop).completed == (name == "whole")
    assert read_run_config(tmp_path / "broken").jobs == config.jobs
    half = weft.open_target(tmp_path / "broken")
    assert "not finished" in half.notes[0]
    half.close()
    resumed = make_config({**given, "output_dir": str(tmp_path / "broken"), "resume": True})
    assert weft.train(resumed).completed
    whole = tmp_path / "whole"
    files = sorted(path.relative_to(whole) for path in (whole / "adapters").rglob("*.safetensors"))
    assert len(files) >= 6
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "broken" / file).read_bytes(), file
    answers = []
    for target in (tmp_path / "whole", tmp_path / "broken/adapters/lora-bitfit"):
        opened = weft.open_target(target)
        request = weft.Request(opened.prompt_ids("one"), "lora-bitfit", 4)
        answers.append(weft.generate(opened.adapters, [request], stop_ids=()))
        opened.close()
    assert answers[0] == answers[1]
    # Away from its run the folder still says which base it is for.
    (tmp_path / "away").mkdir()
    (tmp_path / "whole/adapters/lora-bitfit").rename(tmp_path / "away/it")
    opened = weft.open_target(tmp_path / "away/it")
    assert opened.names == ("it",)
    assert isinstance(opened.adapters["it"], Combined)
    opened.close()


@pytest.mark.parametrize("parts", [3, [], ["../elsewhere"], ["a/b"]])
def test_a_damaged_list_of_parts(parts: Any, tmp_path: Path) -> None:
    import json

    adapters, _ = opened("llama", "lora+bitfit")
    adapters.save("x", tmp_path / "x")
    own = json.loads((tmp_path / "x/weft.json").read_text())
    (tmp_path / "x/weft.json").write_text(json.dumps({**own, "parts": parts}))
    with pytest.raises(UserError, match=r"parts is|no name for an adapter"):
        adapters.load("y", tmp_path / "x")


def test_a_sample_of_virtual_tokens_from_two_parts() -> None:
    """Each part's rows stand in their own places, in the order of the parts."""
    adapters, adapter = opened("gpt2", "lora+prompt_tuning", {"r": 2, "num_virtual_tokens": 2})
    first = copy.deepcopy(adapter.parts[1])
    first.places = lambda length, answer, slots: ((answer, 2),)
    stacked = Combined(CombinedConfig(parts=(first.config, adapter.parts[1].config)), "s", [first, adapter.parts[1]])
    adapters._attach("s", stacked)
    sample = Sample([5, 6, 7, 8], [0.0, 0.0, 1.0, 1.0], "t", answer=2)
    stream = adapters.stream([Part("s", [sample.input_ids], None, answers=[sample.answer])])
    assert [list(rows) for rows in stream.rows] == [[2, 3, 6, 7]]
    assert stream.virtual_rows[0].tolist() == [4, 5, 0, 1]
