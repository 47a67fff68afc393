"""A merged folder answers messages elsewhere as the adapter does here, with every named template.

The templates lie in copies of one adapter's folder, as training would have written them there; the adapter itself is
one per base and method.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from tests.conftest import make_tokenizer
from tests.kit.elsewhere import Elsewhere, rendered_here
from tests.kit.tokenizers import byte_tokenizer, space_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.data import TEMPLATES, Message
from weft.data.rendering.served import message_fields
from weft.errors import UserError
from weft.export import fresh, rendering
from weft.export.folder import merge_folder
from weft.generation.engine import generate
from weft.generation.open import open_target
from weft.generation.ways import Request

ANSWER = 12
QUESTION = [Message("user", "What comes after one?")]
LINES = [Message("user", "write two lines.\n")]
SYSTEM = [Message("system", "be brief."), *QUESTION]
TALK = [*QUESTION, Message("assistant", "two"), Message("user", "and then?")]
LONG_TALK = [*SYSTEM, Message("assistant", "one.\ntwo.\n"), Message("user", "a b"), *TALK[1:]]
CONVERSATIONS = [QUESTION, LINES, SYSTEM, TALK, LONG_TALK]


@dataclass(frozen=True)
class Kind:
    """A base, and whether its tokenizer joins letters across the end of a turn, which no template can change."""

    make: Callable[[Path], str]
    joins: bool = False


def made(kind: str, tokenizer: Callable[[], Any]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        own = tokenizer()
        config = kit.model_config(kind)
        config.vocab_size, config.max_position_embeddings, config.pad_token_id = len(own), 1024, None
        config.bos_token_id, config.eos_token_id = own.bos_token_id, own.eos_token_id
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
        own.save_pretrained(folder / "base")
        return str(folder / "base")

    return make


def without_template() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


BASES = {
    "tiny-llama": Kind(lambda folder: "tiny-llama"),
    "tiny-bloom": Kind(lambda folder: "tiny-bloom"),
    "like Qwen": Kind(made("qwen2", without_template)),
    "like Llama 2": Kind(made("mistral", space_tokenizer)),  # BOS, and a blank before the first word
    "like Llama 3": Kind(made("qwen2", lambda: byte_tokenizer(adds_bos=True)), joins=True),
}


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    process = Elsewhere()
    yield process
    process.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The adapters of a base: LoRA and llama_pro, far enough from the base to answer otherwise. Trained once."""
    runs: dict[str, Path] = {}

    def adapters(base: str) -> Path:
        if base not in runs:
            runs[base] = train(base, tmp_path_factory.mktemp("runs"))
        return runs[base]

    return adapters


def train(base: str, folder: Path) -> Path:
    from weft.cli.main import main

    rows = [{"instruction": f"what is {n}?", "output": f"it is {n}, a number."} for n in range(16)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs = [{"name": "lora", "method": "lora"}, {"name": "pro", "method": "llama_pro", "num_new_blocks": 1}]
    config = {"model": BASES[base].make(folder), "data": str(folder / "data.jsonl"), "output_dir": str(folder / "run"),
              "steps": 6, "learning_rate": 0.02, "batch_size": 4, "dtype": "float32", "chat_template": "plain",
              "jobs": jobs}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(config))
    assert main(["train", str(folder / "run.json"), "--quiet"]) == 0
    return folder / "run/adapters"


def with_template(adapter: Path, name: str, folder: Path) -> Path:
    """The adapter as if it had been trained with another template."""
    shutil.copytree(adapter, folder)
    file = folder / "weft.json"
    own = json.loads(file.read_text())
    own["data"] |= {"chat_template": TEMPLATES[name].text, "template_from": "configuration"}
    file.write_text(json.dumps(own))
    return folder


def check(adapter: Path, merged: Path, elsewhere: Elsewhere, *, joins: bool) -> tuple[int, int, list[str]]:
    """Compare ids and greedy tokens; give the numbers of conversations and of equal ones, and the merge's notes."""
    result = merge_folder(adapter, merged, device="cpu")
    opened = open_target(adapter, device="cpu")
    asked, wanted = [], []
    for messages in CONVERSATIONS:
        try:
            wanted.append(opened.renderer.prompt(messages).ids)
        except UserError:  # the template takes no system message, or no earlier answer
            continue
        asked.append(messages)
    assert len(asked) >= 3
    requests = [Request(ids, opened.names[0], ANSWER) for ids in wanted]
    answers = [done.ids for done in generate(opened.adapters, requests, stop_ids=opened.stop_ids)]
    opened.close()
    found = elsewhere(merged, [message_fields(messages) for messages in asked], ANSWER)
    same = 0
    for messages, ids, answer, other in zip(asked, wanted, answers, found, strict=True):
        if joins and len(messages) > 2 and other["ids"] != ids:
            continue
        assert other["ids"] == ids
        assert other["answer"] == answer
        same += 1
    assert result.proof.rendering is not None
    assert result.proof.rendering.openings == result.proof.rendering.openings_alike > 15
    told = result.proof.rendering.turns_alike < result.proof.rendering.turns
    assert told == any("other tools give other tokens" in note for note in result.notes)
    assert joins or not told
    return len(asked), same, list(result.notes)


@pytest.mark.parametrize(("base", "name"), [
    pytest.param(*one.values[::-1], marks=[*one.marks, *[pytest.mark.slow] * (place // len(BASES) % 2)], id=one.id)
    for place, one in enumerate(kit.in_turn(TEMPLATES, BASES))
])  # fmt: skip
def test_every_named_template(base: str, name: str, trained: Callable[[str], Path], elsewhere: Elsewhere,
                              tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("weft.export.folder.fresh_ids", rendered_here)
    method = ("lora", "pro")[list(TEMPLATES).index(name) % 2]
    adapter = with_template(trained(base) / method, name, tmp_path / "adapter")
    asked, same, _ = check(adapter, tmp_path / "merged", elsewhere, joins=BASES[base].joins)
    print(f"[elsewhere] {base} | {name} | {method} | {asked} | {same}")
    kit.measured(f"other conversations, {base}, {name}", asked - same, 2 * BASES[base].joins, derived=True)


def test_a_process_without_weft_proves_it(trained: Callable[[str], Path], elsewhere: Elsewhere, tmp_path: Path) -> None:
    """As `weft merge` does it, and what it says."""
    adapter = with_template(trained("like Llama 2") / "lora", "vicuna", tmp_path / "adapter")
    _, _, notes = check(adapter, tmp_path / "merged", elsewhere, joins=False)
    assert notes == []
    told = json.loads((tmp_path / "merged/weft.json").read_text())["merged"]["proof"]["rendering"]
    assert told == {"openings": 21, "openings_alike": 21, "turns": 3, "turns_alike": 3}


def test_a_template_that_writes_what_it_should_stays(trained: Callable[[str], Path], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("weft.export.folder.fresh_ids", rendered_here)
    adapter = trained("tiny-llama") / "lora"
    merge_folder(adapter, tmp_path / "plain", device="cpu")
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template == TEMPLATES["alpaca"].text
    own = AutoTokenizer.from_pretrained(Path(fresh.__file__).parents[1] / "assets/tiny-llama").chat_template
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter/weft.json"
    kept = json.loads(file.read_text())
    # Each turn ends with the end-of-sequence token, as it should.
    kept["data"] |= {"chat_template": own, "template_from": "tokenizer"}
    file.write_text(json.dumps(kept))
    merge_folder(tmp_path / "adapter", tmp_path / "merged", device="cpu")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == own
    assert (tmp_path / "merged/chat_template.jinja").read_text() == own


@pytest.mark.parametrize("fault", ["other ids", "no answer", "too slow"])
def test_a_folder_that_renders_otherwise_is_not_kept(trained: Callable[[str], Path], tmp_path: Path, fault: str,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    adapter = with_template(trained("like Llama 2") / "lora", "zephyr", tmp_path / "adapter")
    script = tmp_path / "script.py"
    script.write_text(
        "raise SystemExit('no such tokenizer')" if fault == "no answer" else "import time; time.sleep(60)"
    )
    if fault == "other ids":
        monkeypatch.setattr("weft.export.folder.fresh_ids", rendered_here)
        monkeypatch.setattr("weft.export.folder.served_template", lambda renderer, task, known: renderer.chat_template)
        message = "does not give the tokens of training by transformers alone, and nothing is kept. From token 0 on"
    else:
        monkeypatch.setattr(fresh, "__file__", str(script))
        monkeypatch.setattr(rendering, "SECONDS", 60 if fault == "no answer" else 0.1)
        message = "cannot render messages with the merged folder, and nothing is kept: no " + (
            "such" if fault == "no answer" else "answer"
        )
    with pytest.raises(UserError, match=message):
        merge_folder(adapter, tmp_path / "merged", device="cpu")
    assert not (tmp_path / "merged").exists()


def test_answers_end_elsewhere_where_training_ends_them(trained: Callable[[str], Path], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A base without `eos_token_id` in its generation_config.json never stops by itself."""
    monkeypatch.setattr("weft.export.folder.fresh_ids", rendered_here)
    base = trained("like Qwen").parents[1] / "base"
    shutil.copytree(base, tmp_path / "base")
    stored = json.loads((base / "generation_config.json").read_text())
    eos = AutoTokenizer.from_pretrained(base).eos_token_id
    for before, after in ((None, eos), (5, [5, eos]), ([5, eos], [5, eos])):
        text = json.dumps({key: value for key, value in stored.items() if key != "eos_token_id"} | (
            {} if before is None else {"eos_token_id": before}))  # fmt: skip
        (tmp_path / "base/generation_config.json").write_text(text)
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        merge_folder(trained("like Qwen") / "lora", tmp_path / "merged", model=str(tmp_path / "base"), device="cpu")
        assert json.loads((tmp_path / "merged/generation_config.json").read_text())["eos_token_id"] == after
