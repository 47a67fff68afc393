"""Checkpoints by GPTQ and AWQ: read as they are, proved, trained beside, merged, asked, and refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import kit
from tests.kit.words import quantise_folder
from transformers import AutoModelForCausalLM

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.merge.model import merged_model
from weft.methods import METHODS
from weft.methods.dense import dequantize_linears, how_kept
from weft.models import load_base
from weft.models.quantize import num_parameters
from weft.models.vetting import check_config

OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "tokenizer": object()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    kit.make_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gptq", "gptq_v2", "awq"])
def stored(request: Any, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """The kind, the folder, and a plain model of the weights that are meant."""
    folder = tmp_path_factory.mktemp("stored") / "model"
    meant = quantise_folder(plain, folder, request.param, bits=3 if request.param == "gptq_v2" else 4)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    for path, weight in meant.items():
        model.get_submodule(path).weight.data = weight
    return request.param, folder, model


def test_read_trained_and_merged(stored: tuple[str, Path, Any], tmp_path: Path) -> None:
    kind, folder, plain = stored
    base = load_base(str(folder), **OPTIONS)
    short = kind.partition("_")[0]
    assert how_kept(base.model, torch.float32) == {"dtype": "float32", "quantization": short}
    assert num_parameters(base.model) == sum(p.numel() for p in plain.parameters())
    ids = torch.tensor([kit.texts(1, seed=3)[0]])
    with torch.no_grad():
        kit.measured("logits", kit.difference([base.model(ids).logits], [plain(ids).logits]), 1e-4)

    adapters = Adapters(base.model, base.architecture)
    kit.randomize(adapters.add("it", METHODS["lora"]()), scale=0.02)
    beside = Adapters(plain, base.architecture)
    kit.randomize(beside.add("it", METHODS["lora"]()), scale=0.02)
    texts = kit.texts(3)
    both = [kit.hidden_of(one, [Part("it", texts)]) for one in (adapters, beside)]
    kit.measured("hidden states", kit.difference(*both), 1e-4)
    for one, hidden in zip((adapters, beside), both, strict=True):
        sum(h.square().sum() for h in hidden).backward()
        assert any(p.grad is not None and p.grad.any() for p in one["it"].parameters())
    for ours, theirs in zip(adapters["it"].parameters(), beside["it"].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)

    merged = [merged_model(one.model, base.architecture, one.merge("it")) for one in (adapters, beside)]
    assert not hasattr(merged[0].config, "quantization_config")
    assert merged[0].state_dict().keys() == merged[1].state_dict().keys()
    for key, tensor in merged[0].state_dict().items():
        torch.testing.assert_close(tensor, merged[1].state_dict()[key], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="is quantised; its weights cannot be trained"):
        adapters.add("all", METHODS["full"]())
    adapters.close()
    beside.close()
    dequantize_linears(base.model, torch.float32)
    with torch.no_grad():
        kit.measured("dequantised", kit.difference([base.model(ids).logits], [plain(ids).logits]), 1e-4)


def test_the_run_must_agree(stored: tuple[str, Path, Any], plain: Path) -> None:
    kind, folder, _ = stored
    short: Any = kind.partition("_")[0]
    with pytest.raises(UserError, match=f"quantised already .{short}., and asked for is nf4"):
        load_base(str(folder), quantization="nf4", **OPTIONS)
    assert load_base(str(folder), quantization=short, **OPTIONS).name == str(folder)
    with pytest.raises(UserError, match=f"the training was quantised by {short}, and this one is not"):
        load_base(str(plain), quantization=short, **OPTIONS)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method is 'hqq'"),
        ({"quant_method": "compressed-tensors"}, "quant_method is 'compressed-tensors'"),
        ({"quant_method": "gptq", "bits": 5}, "bits is 5; of gptq Weft reads 2, 3, 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*": {}}}, "dynamic is"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size is 0"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'; of awq Weft reads gemm"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_kind(entries: Any, message: str, plain: Path, tmp_path: Path) -> None:
    own = json.loads((plain / "config.json").read_text()) | {"quantization_config": entries}
    (tmp_path / "config.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match=message):
        check_config(tmp_path / "config.json")


def test_damaged_files(plain: Path, tmp_path: Path) -> None:
    quantise_folder(plain, tmp_path / "it", "gptq")
    file = tmp_path / "it" / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("qzeros"))
    save_file({**tensors, key: tensors[key][:, :1].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"qzeros is \(., 1\); for 4 bits in groups of 32 it must be"):
        load_base(str(tmp_path / "it"), **OPTIONS)
    save_file(load_file(plain / "model.safetensors"), file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="says gptq, and its files hold no tensor of that"):
        load_base(str(tmp_path / "it"), **OPTIONS)
