"""Bottleneck adapters give what AdapterHub's ``adapters`` gives; its folders go both ways; impossible settings.

The vectors are the real package's: ``vectors/make_adapterhub.py``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.files.adapter_folder import read_tensors
from weft.methods.bottleneck import Bottleneck, BottleneckConfig
from weft.models import describe
from weft.models.facts import FACTS
from weft.objectives.passes import Work, forward_losses

VECTORS = Path(__file__).parent / "vectors"
FOLDERS = sorted(path.parent for path in VECTORS.glob("*/*/adapter_config.json"))
LIMIT = 1e-5


@functools.cache
def expected(kind: str) -> dict[str, Tensor]:
    """The token ids, and the logits of ``adapters`` by variant."""
    return read_tensors(VECTORS / kind / "logits.safetensors")


def base(kind: str) -> Any:
    """The base of the vectors."""
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    settings = json.loads((VECTORS / kind / "config.json").read_text())
    model = auto.from_config(AutoConfig.for_model(**settings)).eval()
    missing, foreign = model.load_state_dict(read_tensors(VECTORS / kind / "base.safetensors"), strict=False)
    assert not foreign
    assert not [key for key in missing if not key.endswith(("decoder.weight", "decoder.bias", "lm_head.weight"))]
    model.tie_weights()
    return model


def opened(kind: str, **options: Any) -> Adapters:
    if kind not in FACTS:
        pytest.skip(f"{kind} is not in the table of models")
    return Adapters(model := base(kind), describe(model), **options)


def entries_of(folder: Path) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return entries


def loaded(adapters: Adapters, folder: Path, name: str = "ours") -> Bottleneck:
    adapter = adapters.add(name, BottleneckConfig.from_layout(entries_of(folder)))
    assert isinstance(adapter, Bottleneck)
    adapter.load_tensors(read_tensors(folder / "adapter.safetensors"))
    return adapter


def logits(adapters: Adapters, ids: Tensor, name: str | None = "ours") -> Tensor:
    with torch.no_grad():
        return adapters.logits(adapters.forward(adapters.stream([Part(name, ids.tolist())]))).view(*ids.shape, -1)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_same_logits_as_adapterhub(folder: Path) -> None:
    kind, ids = folder.parent.name, expected(folder.parent.name)["input_ids"]
    for options in ({}, {"exact": True}, {"padded": True}):
        adapters = opened(kind, **options)
        loaded(adapters, folder)
        wanted = expected(kind)[folder.name]
        assert kit.difference([wanted], [expected(kind)["base"]]) > 0.01
        ours = logits(adapters, ids)
        kit.measured(f"{kind} {folder.name} {options}", kit.difference([ours], [wanted]), LIMIT)
        plain = logits(adapters, ids, None)
        kit.measured(f"{kind} base {options}", kit.difference([plain], [expected(kind)["base"]]), LIMIT)
        adapters.close()


def read_back(folder: Path, name: str = "again.v2") -> tuple[Bottleneck, dict[str, Tensor]]:
    """The adapter, and its tensors as AdapterHub would have them."""
    adapters = opened(folder.parent.name)
    adapter = loaded(adapters, folder, name)
    return adapter, adapter.hub_tensors("hub")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_adapterhub_wrote_we_write(folder: Path) -> None:
    """The same tensor names and values, and no entry of the configuration that says something else."""
    adapter, tensors = read_back(folder)
    theirs = read_tensors(folder / "adapter.safetensors")
    assert set(tensors) == set(theirs)
    assert all(torch.equal(tensors[key], theirs[key]) for key in theirs)
    wanted = entries_of(folder)
    ours = adapter.settings.own_layout("hub", describe(base(folder.parent.name)))
    assert set(ours) == set(wanted) - {"model_class"}
    assert {k: v for k, v in ours.items() if k != "config"} == {k: wanted[k] for k in ours if k != "config"}
    assert ours["config"] == {key: wanted["config"][key] for key in ours["config"]}
    assert isinstance(ours["config"]["scaling"], float | str)  # adapters refuses an integer
    assert BottleneckConfig.from_layout(ours) == adapter.settings
    assert all(".adapters.again_v2." in key for key in adapter.hub_tensors("again.v2"))


def test_names_of_other_times_and_of_models_without_a_head() -> None:
    folder = VECTORS / "llama" / "pfeiffer"
    adapter, tensors = read_back(folder)
    wanted = {key: t.clone() for key, t in adapter.tensors().items()}
    for old, new in (("model.layers", "layers"), (".adapters.hub.", ".layer_text_task_adapters.sst-2.")):
        kit.randomize(adapter)
        adapter.load_tensors(
            {key.replace(old, new): t for key, t in read_tensors(folder / "adapter.safetensors").items()}
        )
        assert all(torch.equal(t, wanted[key]) for key, t in adapter.tensors().items())
    first = next(iter(tensors))
    with pytest.raises(UserError, match=r"nothing here uses.*invertible"):
        adapter.load_tensors({**tensors, "model.invertible_adapters.hub.F.0.weight": tensors[first]})
    with pytest.raises(UserError, match="has no tensor"):
        adapter.load_tensors({key: t for key, t in tensors.items() if key != first})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phm_layer": True}, "Kronecker"),
        ({"use_gating": True}, "would see those after it"),
        ({"inv_adapter": "nice"}, "inv_adapter"),
        ({"cross_adapter": True}, "encoder-decoder"),
        ({"architecture": "lora"}, "'architecture' is 'lora'"),
        ({"brand_new": 3}, "'brand_new'"),
        ({"scaling": "wild"}, "scaling"),
    ],
    ids=str,
)
def test_a_foreign_configuration_that_we_do_not_know_is_refused(changes: dict[str, Any], message: str) -> None:
    entries = entries_of(VECTORS / "llama" / "pfeiffer")
    with pytest.raises(UserError, match=message):
        BottleneckConfig.from_layout({**entries, "config": {**entries["config"], **changes}})
    with pytest.raises(UserError, match="'config' is None"):
        BottleneckConfig.from_layout({"config": None})


def test_a_foreign_configuration_may_say_what_changes_nothing() -> None:
    entries = entries_of(VECTORS / "llama" / "parallel")
    harmless = {"architecture": None, "stochastic_depth": 0.1, "phm_dim": 8, "init_weights_seed": 3, "brand_new": None,
                "residual_before_ln": False, "adapter_residual_before_ln": True}  # fmt: skip
    found = BottleneckConfig.from_layout({**entries, "config": {**entries["config"], **harmless}})
    assert found == BottleneckConfig.from_layout(entries)
    old = {key: value for key, value in entries.items() if key != "version"}
    gelu = BottleneckConfig.from_layout({**old, "config": {**entries["config"], "non_linearity": "gelu"}})
    assert gelu.non_linearity == "gelu_new"


def test_the_architecture_sets_what_is_not_given() -> None:
    default, houlsby = BottleneckConfig(), BottleneckConfig(architecture="houlsby")
    assert default == houlsby
    assert (default.mh_adapter, default.output_adapter, default.original_ln_before) == (True, True, False)
    pfeiffer = BottleneckConfig(architecture="pfeiffer", reduction_factor=4)
    assert (pfeiffer.mh_adapter, pfeiffer.original_ln_before, pfeiffer.reduction_factor) == (False, True, 4)
    parallel = BottleneckConfig(architecture="par_bn", scaling=2)
    assert (parallel.is_parallel, parallel.scaling, parallel.reduction_factor) == (True, 2.0, 2)
    assert BottleneckConfig(architecture="scaled_parallel").scaling == "learned"
    for config in (default, pfeiffer, parallel):
        assert BottleneckConfig(**config.model_dump(mode="json")) == config
    assert BottleneckConfig(reduction_factor={0: 2, "default": 8}, use_gating=False).width(32, 0) == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "pfeifer"}, "houlsby, pfeiffer, .*Did you mean 'pfeiffer'"),
        ({"reduction_factor": 0}, "reduction_factor: above 0"),
        ({"reduction_factor": {"first": 2}}, "reduction_factor: .'first'.: keys are layer numbers"),
        ({"non_linearity": "rellu"}, "non_linearity is 'rellu'.*Did you mean 'relu'"),
        ({"non_linearity": "prelu"}, "non_linearity"),
        ({"scaling": 0}, "scaling: 0"),
        ({"scaling": "much"}, "learned"),
        ({"dropout": 1.0}, "dropout"),
        ({"architecture": "pfeiffer", "is_parallel": True}, "is_parallel: true needs original_ln_before: false"),
        ({"adapter_residual_before_ln": True}, "needs ln_after: true"),
        ({"residual_before_ln": "post_add"}, "needs original_ln_before: true"),
        ({"init_weights": "zeros"}, "init_weights"),
        ({"phm_layer": True}, "Kronecker"),
        ({"use_gating": True}, "use_gating"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BottleneckConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction_factor": {"0": 2}}, "reduction_factor says nothing of layer 1"),
        ({"reduction_factor": {"7": 2, "default": 4}}, "reduction_factor .7.: this model's layers are 0 to 2"),
        ({"original_ln_before": True, "residual_before_ln": "post_add"}, "needs a norm after the addition"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused(settings: dict[str, Any], message: str) -> None:
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    with pytest.raises(UserError, match=message):
        adapters.add("one", BottleneckConfig(**settings))
    assert adapters.names == []
    adapters.close()


VARIANTS: dict[str, dict[str, Any]] = {
    "pfeiffer": {"architecture": "pfeiffer", "mh_adapter": True, "dropout": 0.2},
    "parallel": {"architecture": "parallel", "mh_adapter": True},
    "learned": {"architecture": "scaled_parallel", "ln_after": True, "ln_before": True},
    "plus": {"architecture": "pfeiffer", "original_ln_after": False, "residual_before_ln": False, "scaling": "channel"},
}


def open_variants(kind: str, **options: Any) -> Adapters:
    adapters = Adapters(model := kit.make_model(kind), describe(model), **options)
    for seed, (name, settings) in enumerate(VARIANTS.items()):
        adapters.add(name, BottleneckConfig(**{"reduction_factor": 4, **settings}), seed=seed)
    return adapters


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_every_architecture_begins_as_the_identity(kind: str) -> None:
    adapters, texts = open_variants(kind), kit.texts(3)
    plain = kit.hidden_of(adapters, [Part(None, texts)])
    for name in adapters.names:
        assert all(torch.equal(a, b) for a, b in zip(kit.hidden_of(adapters, [Part(name, texts)]), plain, strict=True))
        kit.randomize(adapters[name])
        assert not torch.equal(kit.hidden_of(adapters, [Part(name, texts)])[0], plain[0])
    adapters.close()


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"padded": True}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_rows_of_one_part_meet_their_own_residual_stream(kind: str, options: dict[str, bool]) -> None:
    """Beside other variants, and beside another part of the same adapter whose segment looks just the same."""
    adapters, texts = open_variants(kind, **options), kit.texts(6, 5, 5)
    for name in adapters.names:
        kit.randomize(adapters[name])
    for name in adapters.names:
        other = next(n for n in adapters.names if n != name)
        parts = [Part(name, texts[:2]), Part(other, texts[4:]), Part(name, texts[2:4])]
        together = kit.hidden_of(adapters, parts)
        alone = [kit.hidden_of(adapters, [Part(name, texts[i : i + 2])]) for i in (0, 2)]
        kit.measured(f"{kind} {name}", kit.difference([*together[:2], *together[4:]], [*alone[0], *alone[1]]), 1e-5)
        adapter = adapters[name]
        assert isinstance(adapter, Bottleneck)
        assert all(not layer.waiting for layer in adapter.layers)
    adapters.close()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    """With a second forward between forward and backward."""
    found = []
    for checkpointing in (False, True):
        adapters = open_variants(kind, checkpointing=checkpointing)
        for name in adapters.names:
            kit.randomize(adapters[name])
        work = [Work(n, kit.samples(3, seed=i), seed=i, divisor=4.0) for i, n in enumerate(adapters.names)]
        losses = forward_losses(adapters, work)
        kit.hidden_of(adapters, [Part("pfeiffer", kit.texts(5, high=30)), Part("plus", kit.texts(2))])
        torch.autograd.backward(losses)
        gradients = [kit.gradients(adapters[name]) for name in adapters.names]
        assert all(
            len(g) == len(list(adapters[n].parameters())) for g, n in zip(gradients, adapters.names, strict=True)
        )
        found.append([g for each in gradients for g in each.values()])
        assert all(not layer.waiting for n in adapters.names for layer in adapters[n].layers)  # type: ignore[union-attr]
        adapters.close()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("init", ["bert", "houlsby", "mam_adapter"])
def test_initial_values_are_adapterhubs(init: str) -> None:
    adapters = Adapters(model := kit.make_model("llama", hidden_size=64), describe(model))
    tensors = adapters.add("one", BottleneckConfig(reduction_factor=1, init_weights=init)).tensors()  # type: ignore[arg-type]
    down, up = (
        torch.cat([t.flatten() for k, t in tensors.items() if k.endswith(f"{p}.weight")]) for p in ("down", "up")
    )
    std = {"bert": 0.02, "houlsby": 0.0088, "mam_adapter": 64**-0.5 / 3**0.5}[init]
    assert abs(float(down.std().detach()) / std - 1) < 0.05
    assert init == "bert" or float(down.detach().abs().max()) <= {"houlsby": 0.02, "mam_adapter": 0.125}[init]
    assert bool((up == 0).all()) == (init == "mam_adapter")
    adapters.close()
