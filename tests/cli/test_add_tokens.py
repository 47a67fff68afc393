"""``add_tokens``: new tokens get rows, every adapter trains them and keeps them, and they travel with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.core.stream import Part
from weft.generation.open import open_target
from weft.models import load_base

NEW = ["<tool>", "织机"]
JOBS = ["lora", "prefix_tuning", "full", "trainable_tokens"]
ROWS = "base_model.model.{}.token_adapter.trainable_tokens_delta"


@pytest.fixture
def trained(weft: Callable[..., Any], tiny_llama_dir: Path) -> Path:
    """A run of four methods whose answers hold the new tokens."""
    lines = [{"instruction": "one", "output": "a <tool> b"}, {"instruction": "two", "output": "织机 c <tool>"}]
    Path("new.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    methods = [word for method in JOBS for word in ("--method", method)]
    words = ["train", "--model", tiny_llama_dir, "--data", "new.jsonl", *methods, "--output-dir", "run", "-q"]
    settings = ["steps=3", "save_steps=1", "learning_rate=0.02", "num_virtual_tokens=3", "r=2"]
    result = weft(*words, *settings, f"add_tokens={json.dumps(NEW)}")
    assert result.code == 0, result.err
    return Path("run")


def test_rows_are_added_and_no_other_changes(tiny_llama_dir: Path) -> None:
    plain, more = load_base(str(tiny_llama_dir)), load_base(str(tiny_llama_dir), tokens=NEW)
    rows = plain.token_rows
    size = len(plain.tokenizer)
    assert more.added_ids == (size, size + 1)
    assert more.token_rows == max(rows, size + 2)
    assert [more.tokenizer.convert_ids_to_tokens(i) for i in more.tokenizer("a<tool>织机b")["input_ids"]][1:3] == NEW
    for key, tensor in plain.model.state_dict().items():
        changed = more.model.state_dict()[key]
        assert torch.equal(changed[: len(tensor)], tensor)
        if len(changed) > len(tensor):
            mean = tensor.double().mean(0).float()
            assert torch.equal(changed[len(tensor) :], mean.expand(len(changed) - len(tensor), -1))


def test_every_adapter_holds_its_rows(trained: Path, tiny_llama_dir: Path) -> None:
    base = load_base(str(tiny_llama_dir), tokens=NEW)
    for table in ("model.embed_tokens",):  # to which this base's head is tied
        begun = base.model.get_submodule(table).weight[list(base.added_ids)]
        for folder, key in (
            ("lora", ROWS.format(table)),
            ("prefix_tuning/2-trainable_tokens", ROWS.format(table).replace("token_adapter.", "")),
            ("trainable_tokens", ROWS.format(table).replace("token_adapter.", "")),
        ):
            rows = load_file(trained / "adapters" / folder / "adapter_model.safetensors")[key]
            assert rows.shape == begun.shape
            assert ((rows - begun).abs().amax(1) > 1e-3).all(), (folder, table)


def test_they_travel_with_the_adapter(trained: Path, weft: Callable[..., Any], tiny_llama_dir: Path) -> None:
    """From the run, its checkpoint, an adapter's folder alone, merged, and in peft: the same logits."""
    opened = open_target(trained)
    ids = opened.base.tokenizer("a <tool> 织机 b")["input_ids"]
    wanted = {}
    for name in JOBS:
        hidden = opened.adapters.forward(opened.adapters.stream([Part(name, [ids])]))
        wanted[name] = opened.adapters.logits(hidden, [(name, len(hidden))]).detach()
    opened.close()
    for name in ("lora", "prefix_tuning"):
        shutil.copytree(trained / "adapters" / name, f"alone/{name}")
        alone = open_target(f"alone/{name}", model=str(tiny_llama_dir))
        hidden = alone.adapters.forward(alone.adapters.stream([Part(name, [ids])]))
        assert torch.equal(alone.adapters.logits(hidden, [(name, len(hidden))]), wanted[name])
        alone.close()
    for name in ("lora", "full", "trainable_tokens"):
        result = weft("merge", "--adapter", trained / "adapters" / name, "--output", f"merged/{name}")
        assert result.code == 0, result.err
        model, tokenizer = (kind.from_pretrained(f"merged/{name}") for kind in (AutoModelForCausalLM, AutoTokenizer))
        assert tokenizer("a <tool> 织机 b")["input_ids"] == ids
        assert torch.allclose(model(torch.tensor([ids])).logits[0], wanted[name], atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(base, trained / "adapters" / "lora").eval()
    assert torch.allclose(theirs(torch.tensor([ids])).logits[0], wanted["lora"], atol=1e-4)
    shutil.rmtree(trained / "adapters")
    unfinished = open_target(trained, adapters=["lora"])
    hidden = unfinished.adapters.forward(unfinished.adapters.stream([Part("lora", [ids])]))
    assert torch.equal(unfinished.adapters.logits(hidden, [("lora", len(hidden))]), wanted["lora"])
    unfinished.close()


def test_an_adapter_of_peft_with_its_tokenizer(tmp_path: Path, tiny_llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.add_tokens(NEW)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids(NEW)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=ids, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    text = tokenizer("a <tool> 织机 b")["input_ids"]
    opened = open_target(tmp_path / "theirs", model=str(tiny_llama_dir))
    (name,) = opened.names
    hidden = opened.adapters.forward(opened.adapters.stream([Part(name, [text])]))
    found = opened.adapters.logits(hidden, [(name, len(hidden))])
    assert torch.allclose(found, theirs(torch.tensor([text])).logits[0], atol=1e-4)
    opened.close()


def test_what_cannot_be_a_token(weft: Callable[..., Any], tiny_llama_dir: Path, tiny_data: Path) -> None:
    words = ["--model", tiny_llama_dir, "--data", tiny_data]
    for verb in (["train", "--method", "lora", "steps=1"], ["preview"]):
        for given, said in (('[" "]', "is no word"), ('["<a>", "<a>"]', "is there twice")):
            result = weft(verb[0], *words, *verb[1:], f"add_tokens={given}")
            assert result.code == 2
            assert said in result.err
    both = ["modules_to_save=[embed_tokens]", f"trainable_token_indices=[{load_base(str(tiny_llama_dir)).token_rows}]"]
    for setting, said in zip(both, ("", "has no row; there are"), strict=True):
        result = weft("train", "--method", "lora", "steps=1", *words, setting, "--output-dir", f"other-{said[:3]}")
        assert (result.code == 2) == bool(said), result.err
        assert said in result.err


def test_whole_modules_beside_them(weft: Callable[..., Any], tiny_llama_dir: Path, tiny_data: Path) -> None:
    """Embeddings and head that are trained whole hold the new rows too."""
    words = ["train", "--model", tiny_llama_dir, "--data", tiny_data, "--method", "lora", "steps=1", "-q"]
    result = weft(*words, "modules_to_save=[embed_tokens,lm_head]", 'add_tokens=["<tool>"]')
    assert result.code == 0, result.err
    kept = load_file(next(Path("runs").glob("*/adapters/lora/adapter_model.safetensors")))
    assert not any("trainable_tokens" in key for key in kept)
    rows = load_base(str(tiny_llama_dir), tokens=["<tool>"]).token_rows
    assert len(kept["base_model.model.model.embed_tokens.weight"]) == rows
