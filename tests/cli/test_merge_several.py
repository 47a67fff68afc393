"""``weft merge`` of several adapters, quantised once more, with the tokenizer's own files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.export import tokenizer_files
from weft.export.proof import plain_logits
from weft.files.adapter_folder import merged_from
from weft.generation.open import open_target
from weft.methods.dense import dense_weight

JOBS = [
    {"name": "lora", "method": "lora"},
    {"name": "dora", "method": "lora", "use_dora": True, "learning_rate": 0.01},
    {"name": "ia3", "method": "ia3"},
    {"name": "pro", "method": "llama_pro", "num_new_blocks": 1},
]


@pytest.fixture(scope="module")
def trained(tiny_llama_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, far enough from its base to answer otherwise."""
    from weft.cli.main import main

    folder = tmp_path_factory.mktemp("runs")
    config = {"model": str(tiny_llama_dir), "data": str(tiny_data), "output_dir": str(folder / "run"), "steps": 6,
              "jobs": JOBS, "learning_rate": 0.05, "batch_size": 4}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(config))
    assert main(["train", str(folder / "run.json"), "--quiet"]) == 0
    return folder / "run"


def several(trained: Path, *names: str) -> list[object]:
    return [word for name in names for word in ("--adapter", trained / "adapters" / name)]


def test_the_weighted_sum(weft: Callable[..., Any], trained: Path, tiny_llama_dir: Path) -> None:
    """Proved like a merge of one; its tensors are the base's plus the weighted changes of each merge alone."""
    result = weft("merge", *several(trained, "lora", "ia3", "dora"), "--weights", "0.7,0.3,-0.5", "-o", "sum", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert told["proof"]["exact"]
    assert told["proof"]["agreement"] == 1
    assert [(one["adapter"], one["weight"]) for one in merged_from(Path("sum"))["adapters"]] == [  # type: ignore[index,attr-defined]
        ("lora", 0.7), ("ia3", 0.3), ("dora", -0.5)
    ]  # fmt: skip
    base, found = (load_file(folder / "model.safetensors") for folder in (tiny_llama_dir, Path("sum")))
    wanted = {key: tensor.double() for key, tensor in base.items()}
    for name, weight in (("lora", 0.7), ("ia3", 0.3), ("dora", -0.5)):
        assert weft("merge", *several(trained, name), "-o", name).code == 0
        for key, tensor in load_file(f"{name}/model.safetensors").items():
            wanted[key] += weight * (tensor.double() - base[key].double())
    for key, tensor in found.items():
        assert torch.allclose(tensor.double(), wanted[key], rtol=0, atol=1e-6), key
    equal = weft("merge", *several(trained, "lora", "dora"), "-o", "equal", "--json")
    assert [one["weight"] for one in json.loads(equal.out)["adapters"]] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("names", "words", "message"),
    [
        (("lora", "pro"), [], "(llama_pro) has no weight in a sum: it inserts blocks"),
        (("lora", "lora"), [], "an adapter is named twice"),
        (("lora", "ia3"), ["--weights", "1"], "--weights: 1 given for 2"),
        (("lora", "ia3"), ["--weights", "1,x"], "expected numbers separated by commas"),
        (("lora", "ia3"), ["--weights", "1,inf"], "every weight must be a finite number"),
        (("lora",), ["--quantize", "int4"], "one of nf4, fp4, int8"),
    ],
)
def test_refused(weft: Callable[..., Any], trained: Path, names: tuple[str, ...], words: list[str],
                 message: str) -> None:  # fmt: skip
    result = weft("merge", *several(trained, *names), *words, "-o", "new")
    assert result.code == 2
    assert message in result.err
    assert list(Path().iterdir()) == []


def test_adapters_of_other_bases_have_no_sum(weft: Callable[..., Any], trained: Path) -> None:
    shutil.copytree(trained / "adapters/ia3", "other")
    file = Path("other/weft.json")
    own = json.loads(file.read_text())
    for change, message in (({"sha256_of_small_tensors": "0" * 64}, "was trained on another base than"),
                            ({"quantization": "nf4"}, "their changes are of different weights")):  # fmt: skip
        file.write_text(json.dumps(own | {"base": own["base"] | change}))
        result = weft("merge", *several(trained, "lora"), "--adapter", "other", "-o", "new")
        assert result.code == 2
        assert message in result.err


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_once_more(weft: Callable[..., Any], trained: Path, tiny_llama_dir: Path, kind: str) -> None:
    """The ratio that is told is that of the tensors in the folder, and the folder answers."""
    pytest.importorskip("bitsandbytes")
    assert weft("merge", *several(trained, "lora"), "-o", "plain").code == 0
    result = weft("merge", *several(trained, "lora"), "-o", "small", "--quantize", kind, "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)["requantized"]
    model = AutoModelForCausalLM.from_pretrained("small")
    base, plain = (load_file(folder / "model.safetensors") for folder in (tiny_llama_dir, Path("plain")))
    signal = noise = 0.0
    for key, tensor in plain.items():
        if torch.equal(tensor, base[key]):
            continue
        found = dense_weight(model.get_submodule(key.removesuffix(".weight")), torch.float32)
        signal += float((tensor - base[key]).square().sum())
        noise += float((found - tensor).square().sum())
    assert told["decibels"] == pytest.approx(10 * torch.tensor(signal / noise).log10().item(), abs=1e-3)
    assert (told["decibels"] > 20) == (kind == "int8"), "rounding of 8 bits is far below that of 4"
    assert f"in {kind}: the change is {told['decibels']:.1f} dB" in "\n".join(
        weft("merge", *several(trained, "lora"), "-o", "again", "--quantize", kind).out.splitlines()
    )
    with open_target("small") as opened:
        assert opened.adapters.model.is_quantized
    assert sorted(path.name for path in Path("small").iterdir() if "safetensors" in path.name) == ["model.safetensors"]


def test_a_change_that_drowns_is_told(weft: Callable[..., Any], trained: Path) -> None:
    pytest.importorskip("bitsandbytes")
    result = weft("merge", *several(trained, "lora", "ia3"), "--weights", "0.001,0", "-o", "small", "--quantize", "nf4")
    assert result.code == 0
    assert "warning: in nf4 the rounding of the weights is larger than what the adapter changed" in result.err


def test_a_quantised_model_of_no_numbers_is_refused(
    weft: Callable[..., Any], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One NaN is enough, though a later prompt has none."""
    pytest.importorskip("bitsandbytes")
    spoilt = []

    def run(*words: Any) -> torch.Tensor:
        logits = plain_logits(*words)
        if not spoilt:
            spoilt.append(logits[0, 0].fill_(float("nan")))
        return logits

    monkeypatch.setattr("weft.export.requantized.plain_logits", run)
    result = weft("merge", *several(trained, "lora"), "-o", "small", "--quantize", "nf4")
    assert result.code == 2
    assert "in nf4 the merged model gives logits that are not finite" in result.err
    assert list(Path().iterdir()) == []


def test_files_of_a_tokenizer(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """What did not change is the base's, byte for byte, in every form that tokenizers have been saved in."""
    source, part = tmp_path / "source", tmp_path / "part"
    shutil.copytree(tiny_llama_dir, source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    # An older form: the template in the settings, another layout of the JSON, and files that are not written any more.
    (source / "chat_template.jinja").unlink()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = tokenizer.chat_template
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "tokenizer.json").write_text(json.dumps(json.loads((source / "tokenizer.json").read_text())))
    (source / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = AutoTokenizer.from_pretrained(source)
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]

    tokenizer.save_pretrained(part)
    assert tokenizer_files.keep_unchanged(part, source) == names
    assert all((part / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert not (part / "chat_template.jinja").exists()
    assert AutoTokenizer.from_pretrained(part).chat_template == tokenizer.chat_template

    # Another template: the settings would bring the old one along.
    shutil.rmtree(part)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(part)
    assert tokenizer_files.keep_unchanged(part, source) == names[:2]
    assert AutoTokenizer.from_pretrained(part).chat_template == "{{ messages[0].content }}"

    # Another token: no file of the vocabulary is the base's.
    shutil.rmtree(part)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(part)
    assert tokenizer_files.keep_unchanged(part, source) == []
    assert "<new>" in AutoTokenizer.from_pretrained(part).get_vocab()
