"""An adapter's folder, wherever it is moved, answers to the prompts that it was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import make_tokenizer

from weft.data import Message
from weft.errors import UserError
from weft.files.adapter_folder import provenance_of
from weft.generation.open import open_target
from weft.training.config import make_config
from weft.training.run import train

OTHER = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TALK = [Message("user", "What comes after one?"), Message("assistant", "two"), Message("user", "And then?")]


@pytest.fixture(scope="module", params=["tokenizer", "configuration"])
def trained(request: Any, tiny_llama_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of LoRA and of two methods in one adapter; its template from either place."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    values = {
        "model": str(tiny_llama_dir), "data": str(tiny_data), "output_dir": str(folder), "steps": 2, "eval_size": 4,
        "batch_tokens": 100, "num_virtual_tokens": 2, "reduction_factor": 8, "max_length": 64, "truncate": True,
        "jobs": [{"name": "one", "method": "lora"}, {"name": "two", "method": "prefix_tuning+bottleneck"}],
    }  # fmt: skip
    if request.param == "configuration":
        values["chat_template"] = OTHER
    train(make_config(values))
    return folder


def wanted_ids(run: Path) -> list[int]:
    opened = open_target(run)
    opened.close()
    assert opened.notes == []
    return opened.prompt_ids(TALK)


def opened_ids(folder: Path, **options: Any) -> tuple[list[int], list[str]]:
    opened = open_target(folder, **options)
    opened.close()
    return opened.prompt_ids(TALK), opened.notes


def changed_base(base: Path, to: Path, change: Any) -> Path:
    shutil.copytree(base, to)
    tokenizer = make_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(to)
    return to


def test_what_is_told(trained: Path, tiny_data: Path, tiny_llama_dir: Path) -> None:
    told = provenance_of(trained / "adapters/one")
    assert told is not None
    config = json.loads((trained / "run.json").read_text())["config"]
    assert told["chat_template"] == config["chat_template"] or make_tokenizer().chat_template
    assert (told["records"], told["eval_records"], told["batch_tokens"], told["batch_size"]) == (20, 4, 100, None)
    assert told["settings"] | {"train_on": "answers", "max_length": 64, "truncation": "right"} == told["settings"]
    assert told["settings"]["data"] == tiny_data.name, "no path of this machine"
    checkpoint = next((trained / "checkpoints").rglob("*.json"))
    assert told["sha256"] in checkpoint.read_text(), "what a resume compares"
    assert provenance_of(trained / "adapters/two/1-prefix_tuning") == provenance_of(trained / "adapters/two")


@pytest.mark.parametrize("name", ["one", "two", "two/1-prefix_tuning"])
def test_moved_elsewhere(trained: Path, name: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapters" / name, tmp_path / "elsewhere")
    assert opened_ids(tmp_path / "elsewhere") == (wanted_ids(trained), [])
    assert opened_ids(tmp_path / "elsewhere", model=str(tiny_llama_dir)) == (wanted_ids(trained), [])


def test_a_base_with_another_template(trained: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "# ")

    base = changed_base(tiny_llama_dir, tmp_path / "base", change)
    shutil.copytree(trained / "adapters/one", tmp_path / "elsewhere")
    ids, notes = opened_ids(tmp_path / "elsewhere", model=str(base))
    assert ids == wanted_ids(trained)
    own = provenance_of(trained / "adapters/one")["template_from"] == "tokenizer"  # type: ignore[index]
    assert len(notes) == own
    assert all("chat template is not the one of training; training's is used" in note for note in notes)
    assert open_target(base).prompt_ids(TALK) != ids


def test_a_base_with_one_more_token(trained: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    base = changed_base(tiny_llama_dir, tmp_path / "base", lambda tokenizer: tokenizer.add_tokens([" after"]))
    shutil.copytree(trained / "adapters/one", tmp_path / "elsewhere")
    opened = open_target(tmp_path / "elsewhere", model=str(base))
    count, notes = len(make_tokenizer()), opened.notes
    assert len(notes) == 1
    assert f"the tokenizer is not the one of training: it has {count + 1} tokens, not {count}" in notes[0]
    with pytest.raises(UserError, match=r"the prompt: token ' after' \(id 300\) has no row"):
        opened.prompt_ids(TALK)
    opened.close()


def test_a_template_on_the_command_line(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapters/one", tmp_path / "elsewhere")
    asked = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for folder in (tmp_path / "elsewhere", trained):
        ids, notes = opened_ids(folder, chat_template=asked)
        assert ids != wanted_ids(trained)
        assert notes == ["warning: the chat template given is not the one of training; the one given is used."]


def test_folders_from_before(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapters/one", tmp_path / "elsewhere")
    file = tmp_path / "elsewhere/weft.json"
    told = json.loads(file.read_text())
    del told["data"]
    file.write_text(json.dumps(told))
    _, notes = opened_ids(tmp_path / "elsewhere")
    assert len(notes) == 1
    assert "does not say which chat template" in notes[0]
    file.unlink()  # as of peft
    assert opened_ids(tmp_path / "elsewhere")[1] == []
    file.write_text(json.dumps({**told, "data": ["?"]}))
    with pytest.raises(UserError, match=r"weft.json: data must be a JSON object"):
        open_target(tmp_path / "elsewhere")


def test_peft_loads_it(trained: Path, tiny_llama_dir: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir), trained / "adapters/one"
    )
    assert model.peft_config["default"].peft_type == "LORA"


def test_loading_and_saving_keeps_it(trained: Path, tmp_path: Path) -> None:
    opened = open_target(trained)
    opened.adapters.save("one", tmp_path / "again")
    opened.close()
    assert provenance_of(tmp_path / "again") == provenance_of(trained / "adapters/one")
