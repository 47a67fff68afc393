"""VeRA: exchange with peft, with the projections in the file and drawn again from their key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests import kit
from tests.contracts.test_peft import (
    KINDS,
    LIMIT,
    MANY,
    TARGETS,
    common,
    edit,
    fresh_peft,
    our_gradients,
    our_logits,
    peft_logits,
    their_gradients,
)

from weft.api import Adapters
from weft.errors import UserError
from weft.files.adapter_folder import read_tensors
from weft.models import describe

WEIGHTS = "adapter_model.safetensors"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "drawn again": {"save_projection": False, "projection_prng_key": 7},
    "one layer": {"layers_to_transform": 1, "vera_dropout": 0.3},
}


def on_kinds(several: Iterable[Any]) -> Iterator[Any]:
    """Every kind with the first of ``several``, some with all; the rest is slow."""
    for kind in KINDS:
        for index, one in enumerate(several):
            slow = [pytest.mark.slow] * (index > 0 and kind not in MANY)
            yield pytest.param(kind, one, marks=slow, id=f"{kind}-{one}")


@pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")
@pytest.mark.parametrize(("kind", "variant"), on_kinds(VARIANTS))
def test_peft_to_ours(kind: str, variant: str, tmp_path: Path) -> None:
    config = peft.VeraConfig(**common(kind), r=8, target_modules=TARGETS[kind], **VARIANTS[variant])
    theirs = fresh_peft(kind, config)
    theirs.save_pretrained(tmp_path)
    assert ("base_model.vera_A" in read_tensors(tmp_path / WEIGHTS)) == (variant != "drawn again")
    texts = kit.texts(4, seed=2)
    adapters = Adapters(model := kit.make_model(kind), describe(model))
    adapter = adapters.load("it", tmp_path)
    ours, single = our_logits(adapters, "it", texts), peft_logits(theirs, texts, padded=False)
    kit.measured(f"{kind} vera {variant} logits, ours - peft", kit.difference(ours, single), LIMIT)
    assert kit.difference(ours, our_logits(adapters, None, texts)) > 1e-3  # type: ignore[arg-type]
    torch.autograd.backward([x.square().mean() for x in ours])
    torch.autograd.backward([x.square().mean() for x in single])
    mine, other = our_gradients(adapter), their_gradients(theirs)
    assert mine.keys() == other.keys() == {key for key in adapter.tensors() if "lambda" in key}
    for key in mine:
        kit.measured(f"{kind} gradient {key}", float((mine[key] - other[key]).abs().max()), LIMIT)


OURS: list[dict[str, Any]] = [
    {"r": 8},
    {"r": 5, "save_projection": False, "projection_prng_key": 3},
    {"r": 4, "target_modules": r".*\.1\..*", "d_initial": 0.5},
]


@pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")
@pytest.mark.parametrize(("kind", "settings"), on_kinds(OURS))
def test_ours_to_peft(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    adapters = Adapters(model := kit.make_model(kind), describe(model))
    adapter = adapters.add("it", kit.METHODS["vera"](**settings))
    first = adapter.tensors()
    assert all(not value.any() for key, value in first.items() if key.endswith("lambda_b"))
    kit.randomize(adapter, 5)
    adapters.save("it", tmp_path)
    texts = kit.texts(4, seed=2)
    ours = our_logits(adapters, "it", texts)
    theirs = peft.PeftModel.from_pretrained(kit.make_model(kind), tmp_path).eval()
    kit.measured(f"{kind} vera: peft - ours", kit.difference(ours, peft_logits(theirs, texts, padded=True)), LIMIT)
    assert set(peft.get_peft_model_state_dict(theirs)) == set(read_tensors(tmp_path / WEIGHTS))


def test_the_files_projections_win(tmp_path: Path) -> None:
    """Another torch may draw others from the same key, so what is stored is what computes; and it may not be absent."""
    from safetensors.torch import save_file

    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    kit.randomize(adapters.add("it", kit.METHODS["vera"](r=8)))
    adapters.save("it", tmp_path)
    (tmp_path / "weft.json").unlink()  # it knows the SHA-256 of what is changed here
    tensors = read_tensors(tmp_path / WEIGHTS)
    save_file({**tensors, "base_model.vera_A": tensors["base_model.vera_A"] * 2}, tmp_path / WEIGHTS)
    texts = kit.texts(2)
    adapters.load("changed", tmp_path)
    assert kit.difference(our_logits(adapters, "it", texts), our_logits(adapters, "changed", texts)) > 1e-3
    save_file({key: value for key, value in tensors.items() if "vera_A" not in key}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="vera_A"):
        adapters.load("incomplete", tmp_path)


@pytest.mark.parametrize("entries", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_what_changes_the_computation_is_refused(entries: dict[str, Any], tmp_path: Path) -> None:
    config = peft.VeraConfig(**common("llama"), r=8, target_modules=TARGETS["llama"])
    fresh_peft("llama", config).save_pretrained(tmp_path)
    edit(tmp_path, **entries)
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    with pytest.raises(UserError, match=next(iter(entries))):
        adapters.load("it", tmp_path)
