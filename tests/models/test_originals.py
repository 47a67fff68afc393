"""LoftQ from a configuration: the weights from before quantisation come from the base's own files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from weft.errors import UserError
from weft.methods.dense import dense_weight
from weft.models.originals import OriginalWeights, stored_tensors
from weft.training import make_config
from weft.training.run import prepare


def settings(model: Path | str, data: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(model), "data": str(data), "method": "lora", "init_lora_weights": "loftq", "r": 8,
            "steps": 2, "dtype": "float32", "quantization": "nf4", **more}  # fmt: skip


def left_over(adapters: Any, name: str, path: str, original: torch.Tensor) -> tuple[float, float]:
    """The norm of what quantisation lost, without and with the adapter."""
    adapter = adapters[name]
    layer = adapter.layers[adapter.paths.index(path)]
    lost = original.float() - dense_weight(adapters.model.get_submodule(path), torch.float32)
    made = layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
    return float(lost.norm()), float((lost - made).norm())


def test_a_loftq_run(tiny_llama_dir: Path, tiny_data: Path) -> None:
    pytest.importorskip("bitsandbytes")
    setup = prepare(make_config(settings(tiny_llama_dir, tiny_data)))
    tensors = load_file(tiny_llama_dir / "model.safetensors")
    for path in setup.adapters["lora"].paths:
        before, after = left_over(setup.adapters, "lora", path, tensors[f"{path}.weight"])
        assert 0 < after < 0.9 * before
    setup.adapters.close()


def test_a_tiny_shape_keeps_its_own(tiny_llama_dir: Path, tiny_data: Path) -> None:
    pytest.importorskip("bitsandbytes")
    setup = prepare(make_config(settings(tiny_llama_dir, tiny_data, shape="tiny")))
    assert setup.base.original_weight is not None
    path = setup.adapters["lora"].paths[0]
    before, after = left_over(setup.adapters, "lora", path, setup.base.original_weight(path))
    assert 0 < after < 0.9 * before
    setup.adapters.close()


def test_shards_bare_bodies_and_what_is_missing(tmp_path: Path, tiny_llama_dir: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    wanted = load_file(tiny_llama_dir / "model.safetensors")[f"{path}.weight"]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(OriginalWeights(tmp_path / "shards")(path), wanted)
    model.model.save_pretrained(tmp_path / "body")
    assert torch.equal(OriginalWeights(tmp_path / "body")(path), wanted)
    with pytest.raises(UserError, match=r"holds no tensor 'model\.nothing\.weight'"):
        OriginalWeights(tmp_path / "body")("model.nothing")
    shutil.copytree(tmp_path / "body", tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        OriginalWeights(tmp_path / "empty")(path)


def test_tensors_by_their_names_in_the_model(tmp_path: Path) -> None:
    """A file of all tensors counts, and not an index that was left beside it; what cannot be read is nobody's error."""
    tensors = {"model.a": torch.ones(2), "b": torch.zeros(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.a": "model-00001-of-00002.safetensors", "b": "gone.safetensors"}}')
    names = {"model.a": ["model.a"], "tied": ["tied", "x.b"]}
    found = stored_tensors(tmp_path, names)
    assert found is not None
    assert {key: value.tolist() for key, value in found.items()} == {"model.a": [1.0, 1.0], "tied": [0.0, 0.0, 0.0]}
    assert stored_tensors(tmp_path, {"c": ["c"]}) is None
    (tmp_path / "model.safetensors").unlink()
    assert stored_tensors(tmp_path, names) is None
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"cut")
    assert stored_tensors(tmp_path, names) is None
