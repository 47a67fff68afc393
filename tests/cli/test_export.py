"""``weft export``: an adapter or a model for other programs, checked by those of them that are installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests import kit
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.assets import model_path
from weft.export import llama_cpp
from weft.export.gguf_file import read_settings, read_tensors
from weft.generation.open import open_target

pytest.importorskip("gguf")

JOBS = [
    {"name": "lora", "method": "lora"},
    {"name": "patterns", "method": "lora", "use_rslora": True, "rank_pattern": {"q_proj": 4, "down_proj": 2},
     "alpha_pattern": {"k_proj": 3.0}},
    {"name": "dora", "method": "lora", "use_dora": True},
    {"name": "ia3", "method": "ia3"},
    {"name": "prompt", "method": "prompt_tuning", "num_virtual_tokens": 2},
    {"name": "mixed", "method": "lora+bitfit"},
]  # fmt: skip
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.installed(), reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over the embedded base, far enough from it to answer otherwise."""
    from weft.cli.main import main

    folder = tmp_path_factory.mktemp("runs")
    rows = [{"instruction": f"what is {n}?", "output": f"it is {n}, a number."} for n in range(16)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model": "tiny-llama", "data": str(folder / "data.jsonl"), "output_dir": str(folder / "run"), "steps": 4,
              "jobs": JOBS, "learning_rate": 0.02, "batch_size": 4, "eval_size": 4, "logging_steps": 1}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(config))
    assert main(["train", str(folder / "run.json"), "--quiet"]) == 0
    return folder / "run"


def exported(weft: Callable[..., Any], *words: object) -> dict[str, Any]:
    result = weft("export", *words, "--json")
    assert result.code == 0, result.err
    told: dict[str, Any] = json.loads(result.out)
    return told


def greedy(target: Path, prompt: list[int], tokens: int) -> list[int]:
    """The greedy tokens of an adapter on its base, by Weft."""
    from weft.generation.engine import generate
    from weft.generation.ways import Request

    with open_target(target, device="cpu") as opened:
        request = Request(prompt, opened.names[0], tokens)
        return list(generate(opened.adapters, [request], stop_ids=opened.stop_ids)[0].ids)


def routed(target: Path, ids: list[int]) -> torch.Tensor:
    """The logits of an adapter on its base, by Weft."""
    from weft.export.proof import routed_logits

    with open_target(target, device="cpu") as opened:
        return routed_logits(opened.adapters, opened.names[0], [ids])[0].double()


@needs_llama_cpp
def test_gguf_of_a_merged_model_answers_alike(weft: Callable[..., Any], trained: Path) -> None:
    """From messages, in llama.cpp: the ids of training's prompt, and the adapter's greedy tokens."""
    import llama_cpp as library

    told = exported(weft, trained, "--adapter", "lora", "--to", "gguf", "--dtype", "f32", "-o", "out")
    assert told["llama_cpp"]["agreement"] == 1
    kit.measured("llama.cpp - merged", told["llama_cpp"]["difference"], 2e-5)
    messages = [{"role": "user", "content": "what is 3?"}]
    with open_target(trained / "adapters/lora", device="cpu") as opened:
        prompt = opened.prompt_ids("what is 3?")
    wanted = greedy(trained / "adapters/lora", prompt, 12)
    model: Any = library.Llama(f"out/{told['file']}", n_ctx=256, verbose=False)
    try:
        answer = model.create_chat_completion(messages, temperature=0.0, max_tokens=12)
    finally:
        model.close()
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny-llama"))
    # llama.cpp drops bytes that are no letter, where transformers writes a mark.
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(wanted).replace("\ufffd", "")


@needs_llama_cpp
@pytest.mark.parametrize("name", ["lora", "patterns"])
def test_gguf_of_a_lora(weft: Callable[..., Any], trained: Path, name: str) -> None:
    """On the base's own GGUF, in llama.cpp: the adapter's logits, whatever scales it."""
    exported(weft, "tiny-llama", "--to", "gguf", "--dtype", "f32", "-o", "base")
    told = exported(weft, trained / "adapters" / name, "--to", "gguf-lora", "-o", "lora")
    ids = AutoTokenizer.from_pretrained(model_path("tiny-llama"))("What colour is the sky? it is")["input_ids"]
    expected = [(ids, routed(trained / "adapters" / name, ids))]
    base = Path("base/tiny-llama-f32.gguf")
    alone = AutoModelForCausalLM.from_pretrained(model_path("tiny-llama"))(torch.tensor([ids])).logits[0]
    assert float((alone - expected[0][1]).abs().max() / expected[0][1].abs().max()) > 1e-2, "the adapter does nothing"
    proof = llama_cpp.prove(base, expected, Path("lora") / told["file"])
    kit.measured(f"llama.cpp with the LoRA {name} - routed", proof.difference, 2e-5)
    assert llama_cpp.prove(base, [(ids, alone.detach())]).difference < 2e-5


def test_peft_layout_loads_in_peft(weft: Callable[..., Any], trained: Path) -> None:
    """Byte for byte; what the statement says of peft is so for every job."""
    for job in JOBS:
        name = str(job["name"])
        told = exported(weft, trained, "--adapter", name, "--to", "peft", "-o", name)
        source = trained / "adapters" / name
        for path in [one for one in source.rglob("*") if one.is_file()]:
            assert (Path(name) / path.relative_to(source)).read_bytes() == path.read_bytes()
        base = AutoModelForCausalLM.from_pretrained(model_path("tiny-llama"))
        if told["loads"]["peft"] is True:
            assert PeftModel.from_pretrained(base, name)
        else:
            with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
                PeftModel.from_pretrained(base, name)
    loads = {name: json.loads(_json(weft, trained, name))["loads"] for name in ("patterns", "dora", "mixed")}
    assert "rank_pattern or alpha_pattern" in loads["patterns"]["vLLM"]
    assert loads["patterns"]["llama.cpp"] is True
    assert loads["dora"]["peft"] is True
    assert {loads["dora"][name] for name in ("vLLM", "llama.cpp", "Ollama")} == {"it knows no DoRA (use_dora)"}
    assert loads["mixed"]["peft"].startswith("it loads one method; each of 1-lora, 2-bitfit loads alone")


def _json(weft: Callable[..., Any], trained: Path, name: str) -> str:
    shutil.rmtree("again", ignore_errors=True)
    return str(weft("export", trained, "--adapter", name, "--to", "peft", "-o", "again", "--json").out)


def test_the_card(weft: Callable[..., Any], trained: Path) -> None:
    """It says what the run records, and no path of this machine."""
    exported(weft, trained, "--adapter", "lora", "--to", "peft", "--base-name", "someone/tiny", "-o", "out")
    card = Path("out/README.md").read_text()
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(metrics) if row.get("job") == "lora" and "eval_loss" in row)
    for text in ('base_model: "someone/tiny"', 'tags: ["weft", "lora"]', "| data | data.jsonl |", "| records | 12 |",
                 f"| last evaluation loss | {last['eval_loss']:.6g} |", "| r | 8 |", "| steps | 4 |",
                 "peft: yes (PeftModel.from_pretrained(base, folder))", "<|assistant|>"):  # fmt: skip
        assert text in card, text
    assert str(trained.parent) not in card
    entries = json.loads(Path("out/adapter_config.json").read_text())
    assert entries["base_model_name_or_path"] == "someone/tiny"
    before = card
    weights = load_file("out/adapter_model.safetensors")
    assert len(weights) == 56
    exported(weft, "out", "--to", "peft", "--model", "tiny-llama", "-o", "again")
    after = Path("again/README.md").read_text()
    marker = "the adapter's tensors (names and values): "
    assert before.split(marker)[1].splitlines()[0] == after.split(marker)[1].splitlines()[0]


def test_ollama(weft: Callable[..., Any], trained: Path) -> None:
    told = exported(weft, trained, "--adapter", "ia3", "--to", "ollama", "--dtype", "q8_0", "-o", "out")
    text = Path("out/Modelfile").read_text()
    assert text.startswith(f"FROM ./{told['file']}\n")
    assert Path("out", told["file"]).is_file()
    assert 'PARAMETER stop "<|end|>"' in text
    assert "PARAMETER repeat_penalty 1.0" in text
    assert any("gives the text of the chat template in 27 conversations" in line for line in told["checked"])
    settings = read_settings(Path("out", told["file"]))
    assert settings["general.file_type"] == 7
    assert "blk.0.attn_q.weight" in read_tensors(Path("out", told["file"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--to", "gguf"], "is a run with the adapters lora, patterns"),
        (["run", "--adapter", "lor", "--to", "peft"], "has no adapter 'lor'. Did you mean 'lora'?"),
        (["run", "--adapter", "lora", "--to", "ggfu"], "there is no such format. Did you mean 'gguf'?"),
        (["run", "--adapter", "lora", "--to", "gguf", "--dtype", "q4"], "expected one of f16, q8_0, f32, bf16"),
        (["run", "--adapter", "lora", "--to", "peft", "--dtype", "f16"], "--dtype does nothing --to peft"),
        (["run", "--adapter", "ia3", "--to", "gguf-lora"], "it knows LoRA alone, and this is IA3"),
        (["run", "--adapter", "dora", "--to", "gguf-lora"], "it knows no DoRA"),
        (["run", "--adapter", "mixed", "--to", "gguf-lora"], "it knows LoRA alone, and this is several methods"),
        (["run", "--adapter", "prompt", "--to", "gguf"], "what it adds are virtual tokens"),
        (["tiny-llama", "--to", "peft"], "is a model, not an adapter"),
        (["tiny-llama", "--to", "gguf", "--model", "tiny-bloom"], "--model has no base to replace"),
        (["tiny-llama", "--to", "gguf", "--adapter", "lora"], "chooses among the adapters of a run"),
        (["tiny-bloom", "--to", "gguf"], "bloom models are not written as GGUF"),
        (["run", "--adapter", "lora", "--to", "peft", "--push-to-hub", "me/it"], "names its base by a path of this"),
        (["run", "--adapter", "lora", "--to", "peft", "--push-to-hub", "it"], "expected OWNER/NAME"),
        (["run", "--adapter", "lora", "--to", "peft", "--quantization", "nf4"], "--quantization is for the merge"),
        (["tiny-llama", "--to", "gguf", "--quantization", "nf4"], "--quantization is for the merge"),
        (["run", "--adapter", "lora", "--to", "peft", "--public"], "--public does nothing without"),
    ],
)
def test_refused(weft: Callable[..., Any], trained: Path, words: list[str], message: str) -> None:
    result = weft("export", *(str(trained) if word == "run" else word for word in words), "-o", "out")
    assert result.code == 2
    assert message.replace("names its", "name its") in result.err
    assert list(Path().iterdir()) == [], "nothing half-written"


def test_without_the_gguf_package(weft: Callable[..., Any], trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = weft("export", "tiny-llama", "--to", "gguf", "-o", "out")
    assert (result.code, 'pip install "weft[gguf]"' in result.err) == (2, True)


class Hub:
    """A hub that remembers what it is asked."""

    asked: list[tuple[Any, ...]] = []
    refuses = False

    def create_repo(self, name: str, **options: Any) -> None:
        if self.refuses:
            raise ConnectionError("no hub here")
        self.asked.append(("create", name, options))

    def upload_folder(self, **options: Any) -> Any:
        self.asked.append(("upload", sorted(path.name for path in Path(options["folder_path"]).iterdir()), options))
        return type("Done", (), {"commit_url": "https://hub.example/me/it/commit/1"})


def test_push_to_the_hub(weft: Callable[..., Any], trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only when asked, private unless asked otherwise, and a refusal leaves the folder."""
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    words = [trained, "--adapter", "ia3", "--to", "peft", "--base-name", "someone/tiny"]
    exported(weft, *words, "-o", "alone")
    assert Hub.asked == []
    told = exported(weft, *words, "-o", "pushed", "--push-to-hub", "me/it")
    assert told["pushed"] == "https://hub.example/me/it/commit/1"
    (_, name, options), (_, names, _) = Hub.asked
    assert (name, options["private"]) == ("me/it", True)
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(names)
    exported(weft, *words, "-o", "public", "--push-to-hub", "me/it", "--public")
    assert Hub.asked[2][2]["private"] is False
    monkeypatch.setattr(Hub, "refuses", True)
    result = weft("export", *words, "-o", "kept", "--push-to-hub", "me/it")
    assert result.code == 2
    assert "no hub here" in result.err
    assert "The folder itself is written" in result.err
    assert Path("kept/adapter_config.json").is_file()
