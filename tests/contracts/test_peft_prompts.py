"""P-tuning, P-tuning v2 and hard prompts against peft; prompt and prefix tuning are in ``test_peft``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests import kit
from tests.contracts.test_peft import KINDS, LIMIT, edit, fresh_peft, our_logits, peft_logits

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.files.adapter_folder import read_tensors
from weft.models import describe

ENCODERS: dict[str, dict[str, Any]] = {
    "MLP": {"encoder_hidden_size": 24},
    "LSTM": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12, "encoder_num_layers": 3,
             "encoder_dropout": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
@pytest.mark.parametrize("kind", KINDS)
def test_p_tuning_of_peft_loads_as_a_plain_soft_prompt(kind: str, encoder: str, tmp_path: Path) -> None:
    # peft takes the width of the blocks for that of the embeddings, unless it is told.
    width = 24 if kind == "opt" else 32
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=width, **ENCODERS[encoder])
    theirs = fresh_peft(kind, config)
    theirs.save_pretrained(tmp_path)
    texts = kit.texts(4, seed=2)
    adapters = Adapters(model := kit.make_model(kind), describe(model))
    adapter = adapters.load("it", tmp_path)
    assert adapter.config.method == "p_tuning"
    assert [tuple(p.shape) for p in adapter.parameters()] == [(5, width)]
    ours = our_logits(adapters, "it", texts)
    for padded in (True, False):
        found = kit.difference(ours, peft_logits(theirs, texts, padded=padded))
        kit.measured(f"{kind} p_tuning {encoder}, ours - peft, padded={padded}", found, LIMIT)
    plain = [adapters.logits(h, [(None, len(h))]) for h in kit.hidden_of(adapters, [Part(None, texts)])]
    assert kit.difference(ours, plain) > 1e-3, "the adapter does nothing: equality would prove nothing"
    adapters.save("it", tmp_path / "again")
    again = adapters.load("again", tmp_path / "again")
    assert kit.difference(ours, our_logits(adapters, "again", texts)) == 0
    assert again.config == adapter.config


OURS: list[tuple[str, dict[str, Any]]] = [
    *[("p_tuning", {"num_virtual_tokens": 3, **settings}) for settings in ENCODERS.values()],
    ("p_tuning_v2", {"num_virtual_tokens": 3}),
    ("p_tuning_v2", {"num_virtual_tokens": 3, "prefix_init": "random"}),
    ("hard_prompt", {"prompt_ids": [9, 8, 7]}),
]


@pytest.mark.parametrize(("method", "settings"), OURS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ours_to_peft(kind: str, method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    adapters = Adapters(model := kit.make_model(kind), describe(model))
    kit.randomize(adapters.add("it", kit.METHODS[method](**settings)), 5)
    adapters.save("it", tmp_path)
    texts = kit.texts(4, seed=2)
    ours = our_logits(adapters, "it", texts)
    theirs = peft.PeftModel.from_pretrained(kit.make_model(kind), tmp_path).eval()
    kit.measured(f"{kind} {method}: peft - ours", kit.difference(ours, peft_logits(theirs, texts, padded=True)), LIMIT)
    state = peft.get_peft_model_state_dict(theirs)
    assert set(state) == set(read_tensors(tmp_path / "adapter_model.safetensors"))


def test_a_prefix_of_p_tuning_v2_without_our_own_file_is_prefix_tuning(tmp_path: Path) -> None:
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    kit.randomize(adapters.add("it", kit.method_config("p_tuning_v2")))
    adapters.save("it", tmp_path)
    assert adapters.load("same", tmp_path).config.method == "p_tuning_v2"
    (tmp_path / "weft.json").unlink()
    assert adapters.load("other", tmp_path).config.method == "prefix_tuning"
    texts = kit.texts(3)
    assert kit.difference(our_logits(adapters, "it", texts), our_logits(adapters, "other", texts)) == 0


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "hard_prompt"])
@pytest.mark.parametrize("position", ["after", "slots"])
def test_peft_refuses_what_stands_elsewhere(method: str, position: str, tmp_path: Path) -> None:
    """It only knows rows before the text, and would answer something else without a word."""
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    adapters.add("it", kit.method_config(method, virtual_position=position))
    adapters.save("it", tmp_path)
    with pytest.raises(Exception, match=f"{kit.METHODS[method].peft_type}_{position.upper()}"):
        peft.PeftModel.from_pretrained(kit.make_model("llama"), tmp_path)
    part = Part("it", kit.texts(2, 6), answers=[3, 2], slots=[(1, 2), (0,)])
    adapters.load("again", tmp_path)
    wanted = kit.hidden_of(adapters, [part])
    again = kit.hidden_of(adapters, [Part("again", part.sequences, None, answers=part.answers, slots=part.slots)])
    assert all(map(torch.equal, wanted, again))
    (tmp_path / "weft.json").unlink()
    with pytest.raises(UserError, match=f"_{position.upper()}"):
        adapters.load("without", tmp_path)


def test_what_changes_the_computation_is_refused_by_name(tmp_path: Path) -> None:
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    fresh_peft("llama", config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["encoder_hidden_size"] == 32
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    edit(tmp_path, a_key_of_the_future=3)
    with pytest.raises(UserError, match="a_key_of_the_future"):
        adapters.load("it", tmp_path)
    edit(tmp_path, a_key_of_the_future=None, num_virtual_tokens=6)
    with pytest.raises(UserError, match="has shape"):
        adapters.load("it", tmp_path)
    assert adapters.names == []
