"""BitFit's name alone, on bases with biases and on bases without any."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import kit

from weft.api import Adapters
from weft.methods import BitFitConfig
from weft.methods.combined import CombinedConfig
from weft.models import describe

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_base_without_biases_gets_some_and_the_folder_says_so(tmp_path: Path) -> None:
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    adapter = adapters.add("it", BitFitConfig())
    found = BitFitConfig(add_missing=True, target_modules=["attention", "mlp"])
    assert adapter.config == found
    assert {path.rsplit(".", 1)[-1] for path in adapter.sites()} == LINEARS
    assert adapter.note == (
        f"this llama model has no bias terms, so bitfit gives it {3 * len(LINEARS)} new ones "
        "(add_missing: true, target_modules: [attention, mlp])."
    )
    kit.randomize(adapter)
    adapters.save("it", tmp_path)
    again = adapters.load("again", tmp_path)
    assert (again.config, again.note) == (found, "")  # it was no choice of the loading
    assert kit.difference(list(adapter.tensors().values()), list(again.tensors().values())) == 0.0


def test_only_the_named_modules_get_one() -> None:
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    adapter = adapters.add("it", BitFitConfig(target_modules=["v_proj", "input_layernorm"]))
    assert {path.rsplit(".", 1)[-1] for path in adapter.sites()} == {"v_proj", "input_layernorm"}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_base_with_any_bias_gets_none(kind: str) -> None:
    """Qwen2 has biases at queries, keys and values only."""
    adapters = Adapters(model := kit.make_model(kind), describe(model))
    adapter = adapters.add("it", BitFitConfig())
    assert (adapter.config, adapter.note) == (BitFitConfig(add_missing=False), "")
    assert set(adapter.sites()) == set(adapters.add("before", BitFitConfig(add_missing=False)).sites())


def test_a_part_of_several_says_so_too() -> None:
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    parts = (kit.method_config("lora"), BitFitConfig())
    assert "new ones (add_missing: true" in adapters.add("it", CombinedConfig(parts=parts)).note
