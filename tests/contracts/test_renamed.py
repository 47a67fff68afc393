"""Bases whose LoRA files peft reads through transformers' list of renamed tensors, where that list also matches names
that are right already."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from benchmarks import architecture_configs as configs
from benchmarks.architecture_truth import load_plain, write_model
from tests import kit
from tests.conftest import make_tokenizer
from torch import Tensor

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.files.adapter_folder import read_tensors
from weft.merge.model import check_as_written
from weft.methods import METHODS
from weft.models import describe

# Of the largest logit: both sides compute in float32.
LIMIT = 1e-5
TEXTS = [[5, 6, 7], list(range(5, 30))]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def base(name: str, folder: Path, tokenizer: Any) -> Any:
    kind = name.split(":")[0]
    if kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    if not (folder / "config.json").exists():
        assert name in configs.names()
        write_model(name, folder, tokenizer)
    return load_plain(folder)


@torch.no_grad()
def ours(adapters: Adapters, name: str) -> list[Tensor]:
    stream = adapters.stream([Part(name, TEXTS)])
    hidden = adapters.forward(stream)
    return list(adapters.logits(hidden).split([len(text) for text in TEXTS]))


@torch.no_grad()
def theirs(model: Any) -> list[Tensor]:
    return [model(input_ids=torch.tensor([text])).logits[0] for text in TEXTS]


@pytest.mark.parametrize("name", ["laguna", "inkling2_text"])
def test_peft_finds_every_tensor(name: str, tmp_path: Path, tokenizer: Any) -> None:
    model = base(name, tmp_path / "base", tokenizer)
    adapters = Adapters(model, shape := describe(model))
    assert shape.file_paths, "transformers has renamed nothing: this test checks nothing"
    adapter = kit.randomize(adapters.add("it", METHODS["lora"](r=2)), scale=0.2)
    adapters.save("it", tmp_path / "it")
    found = ours(adapters, "it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.PeftModel.from_pretrained(base(name, tmp_path / "base", tokenizer), tmp_path / "it").eval()
    scale = max(float(logits.abs().max()) for logits in found)
    kit.measured(f"{name} in peft", kit.difference(found, theirs(other)) / scale, LIMIT)
    # Back into Weft: our own file, and what another tool makes of it.
    adapters.load("own", tmp_path / "it")
    (tmp_path / "it" / "weft.json").unlink()
    adapters.load("foreign", tmp_path / "it")
    for again in ("own", "foreign"):
        assert adapters[again].tensors().keys() == adapter.tensors().keys()
        assert all(torch.equal(a, b) for a, b in zip(found, ours(adapters, again), strict=True))


def test_a_file_of_peft_is_read_by_its_own_names(tmp_path: Path, tokenizer: Any) -> None:
    model = base("laguna", tmp_path / "base", tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=r".*shared_experts\.down_proj", init_lora_weights=False)
        other = peft.get_peft_model(model, config).eval()
        wanted = theirs(other)
        other.save_pretrained(tmp_path / "theirs")
    assert any("shared_experts" in key for key in read_tensors(tmp_path / "theirs" / "adapter_model.safetensors"))
    plain = base("laguna", tmp_path / "base", tokenizer)
    adapters = Adapters(plain, describe(plain))
    adapters.load("it", tmp_path / "theirs")
    scale = max(float(logits.abs().max()) for logits in wanted)
    kit.measured("laguna of peft", kit.difference(wanted, ours(adapters, "it")) / scale, LIMIT)


def test_a_module_that_no_file_can_name_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    model = base("inkling2_text", tmp_path / "base", tokenizer)
    adapters = Adapters(model, shape := describe(model))
    lost = next(path for path, other in shape.file_paths.items() if other is None)
    with pytest.raises(UserError, match=f"no LoRA file can name module '{lost}' of this inkling2_text model"):
        adapters.add("it", METHODS["lora"](r=2, target_modules=["weight_proj"]))
    adapters.add("other", METHODS["vera"](r=2, target_modules=["weight_proj"]))  # its files are not renamed


def test_names_in_weft_json_have_their_types(tmp_path: Path, tokenizer: Any) -> None:
    model = base("laguna", tmp_path / "base", tokenizer)
    adapters = Adapters(model, describe(model))
    adapters.add("it", METHODS["lora"](r=2))
    adapters.save("it", tmp_path / "it")
    path = tmp_path / "it" / "weft.json"
    whole = json.loads(path.read_text())
    for wrong in (7, {"a": 7}):
        path.write_text(json.dumps(whole | {"renamed": wrong}))
        with pytest.raises(UserError, match="renamed"):
            adapters.load("again", tmp_path / "it")


def test_a_row_that_transformers_sets_anew_is_named(tmp_path: Path, tokenizer: Any) -> None:
    model = base("youtu", tmp_path / "base", tokenizer)
    model.save_pretrained(tmp_path / "same")
    check_as_written(load_plain(tmp_path / "same"), tmp_path / "same")
    with torch.no_grad():
        model.model.embed_tokens.weight[model.config.pad_token_id] = 1.0
    model.save_pretrained(tmp_path / "moved")
    again = load_plain(tmp_path / "moved")
    with pytest.raises(UserError, match=r"1 of the \d+ rows of 'model.embed_tokens.weight' become others \(row 0"):
        check_as_written(again, tmp_path / "moved")
