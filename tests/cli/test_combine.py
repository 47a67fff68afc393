"""``weft combine``: folders in, a folder out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.files.adapter_folder import read, read_tensors


@pytest.fixture(scope="session")
def pair_dir(tiny_llama_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of LoRA twice and of two methods in one job twice."""
    from weft.cli.main import main

    folder = tmp_path_factory.mktemp("runs") / "pair"
    config = {
        "model": str(tiny_llama_dir), "data": str(tiny_data), "output_dir": str(folder), "steps": 2,
        "learning_rate": 0.01, "num_virtual_tokens": 2, "reduction_factor": 8,
        "chat_template": "{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
        "jobs": [
            {"name": "a", "method": "lora", "seed": 1, "r": 2},
            {"name": "b", "method": "lora", "seed": 2, "r": 3},
            {"name": "c", "method": "prefix_tuning+bottleneck", "seed": 3},
            {"name": "d", "method": "prefix_tuning+bottleneck", "seed": 4},
        ],
    }  # fmt: skip
    file = folder.parent / "pair.json"
    file.write_text(json.dumps(config))
    assert main(["train", str(file), "--quiet"]) == 0
    return folder


def test_two_folders_become_one(weft: Callable[..., Any], pair_dir: Path, tiny_llama_dir: Path) -> None:
    from weft.generation.open import open_target

    words = ["combine", pair_dir / "adapters/a", pair_dir / "adapters/b", "--output", "both", "--type", "svd"]
    result = weft(*words, "--weights=-0.5,2", "--svd-rank", 4, "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert (told["combination_type"], told["weights"]) == ("svd", [-0.5, 2.0])
    config, tensors, _ = read(Path("both"))
    assert (config.method, config.r) == ("lora", 4)  # type: ignore[attr-defined]
    assert told["parameters"] == sum(t.numel() for t in tensors.values())
    assert json.loads(Path("both/adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_llama_dir)
    # As in memory, and answering with the chat template of the run that it comes from.
    opened = open_target("both")
    run = open_target(pair_dir)
    assert opened.prompt_ids("Hi") == run.prompt_ids("Hi")
    run.adapters.combine("both", ["a", "b"], [-0.5, 2], combination_type="svd", svd_rank=4)
    mine, theirs = opened.adapters[opened.names[0]].tensors(), run.adapters["both"].tensors()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert weft("generate", "both", "--prompt", "one", "--max-new-tokens", 2).code == 0


def test_a_run_stands_for_its_adapters(weft: Callable[..., Any], pair_dir: Path) -> None:
    result = weft("combine", pair_dir, "--adapter", "c", "--adapter", "d", "-o", "mean")
    assert result.code == 0, result.err
    assert "2 adapters, linear -> mean" in result.out
    config, tensors, _ = read(Path("mean"))
    assert [part.method for part in config.parts] == ["prefix_tuning", "bottleneck"]  # type: ignore[attr-defined]
    # Bottlenecks' files name the adapter in every tensor.
    one, other = (
        {key.replace(f".{name}.", ".mean."): t for key, t in read(pair_dir / "adapters" / name)[1].items()}
        for name in "cd"
    )
    assert all(torch.allclose(tensors[key], (one[key] + other[key]) / 2) for key in one)
    assert any((one[key] != other[key]).any() for key in one)
    assert weft("generate", "mean", "--prompt", "one", "--max-new-tokens", 2).code == 0


def test_dare_depends_on_its_seed_alone(weft: Callable[..., Any], pair_dir: Path) -> None:
    files = []
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        words = ["combine", pair_dir, "--adapter", "c", "--adapter", "d", "-o", name]
        assert weft(*words, "--type", "dare_linear", "--density", 0.5, "--seed", seed).code == 2
        words = ["combine", pair_dir / "adapters/a", pair_dir / "adapters/b", "-o", name, "--type", "dare_linear_svd"]
        assert weft(*words, "--density", 0.5, "--seed", seed).code == 0
        files.append(read_tensors(Path(name) / "adapter_model.safetensors"))
    key = next(key for key in files[0] if "lora_B" in key)
    assert torch.equal(files[0][key], files[1][key])
    assert not torch.equal(files[0][key], files[2][key])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "1,x"], "numbers separated by commas"),
        (["--weights", "1"], "--weights: 1 given for 2: "),
        (["--type", "tie"], "Did you mean 'ties'"),
        (["--type", "ties"], "--type ties needs --density"),
        (["--density", "0.5"], "--density means nothing to --type cat"),
        (["--type", "svd", "--svd-rank", "0"], "--svd-rank is 0"),
        (["--type", "linear"], "ranks must be equal"),
        (["--output", "here"], "is there already"),
        (["--model", "nowhere/at/all"], "no model at"),
    ],
)
def test_bad_input(weft: Callable[..., Any], pair_dir: Path, words: list[str], message: str) -> None:
    Path("here").mkdir()
    Path("here/file").write_text("mine")
    given = ["combine", pair_dir / "adapters/a", pair_dir / "adapters/b", "--output", "new", "--type", "cat"]
    result = weft(*given, *words)
    assert result.code == 2
    assert message in result.err
    assert sorted(path.name for path in Path().iterdir()) == ["here"]


def test_sources_that_do_not_fit(weft: Callable[..., Any], pair_dir: Path, tiny_llama_dir: Path) -> None:
    def refused(*words: object) -> str:
        result = weft("combine", *words, "--output", "new", "--type", "cat")
        assert result.code == 2
        assert not Path("new").exists()
        return str(result.err)

    Path("empty").mkdir()
    assert "neither a run" in refused("empty")
    assert "has no adapter nobody" in refused(pair_dir, "--adapter", "nobody")
    assert "only adapters of one kind" in refused(pair_dir)
    other = Path("other")
    other.mkdir()
    for file in (pair_dir / "adapters/b").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "adapter_config.json").read_text())
    for name, message in (("another/base", "different bases"), (None, "does not say which base")):
        (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        assert message in refused(pair_dir / "adapters/a", other)
    assert "has shape" in refused(pair_dir / "adapters/a", other, "--model", "tiny-llama")
    words = ["combine", pair_dir / "adapters/a", other, "-o", "new", "--type", "cat", "--model", tiny_llama_dir]
    assert weft(*words).code == 0


def test_what_the_parents_have_in_common_travels(
    weft: Callable[..., Any], pair_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    from weft.files.adapter_folder import provenance_of

    parents = [provenance_of(pair_dir / "adapters" / name) for name in "ab"]
    assert parents[0] == parents[1]
    result = weft("combine", pair_dir / "adapters/a", pair_dir / "adapters/b", "--output", "both", "--type", "svd")
    assert result.code == 0, result.err
    assert "trained alike" not in result.err
    told = provenance_of(Path("both"))
    assert told is not None
    assert parents[0] is not None
    assert told | {"parents": []} == parents[0]
    assert [(parent["adapter"], parent["sha256"]) for parent in told["parents"]] == [
        ("a", parents[0]["sha256"]), ("b", parents[0]["sha256"])
    ]  # fmt: skip

    # An adapter of another template: that is said, and no template is claimed.
    other = tmp_path / "other"
    shutil.copytree(pair_dir / "adapters/b", other)
    file = other / "weft.json"
    own = json.loads(file.read_text())
    own["data"]["chat_template"] = "{{ messages[0].content }}"
    own["data"]["settings"]["train_on"] = "all"
    file.write_text(json.dumps(own))
    result = weft("combine", pair_dir / "adapters/a", other, "--output", "mixed", "--type", "svd")
    assert result.code == 0, result.err
    assert "not trained alike: chat_template is not the same for all" in result.err
    assert "not trained alike: train_on: 'answers' (a), 'all' (other)" in result.err
    told = provenance_of(Path("mixed"))
    assert told is not None
    assert (told["chat_template"], told["template_from"]) == (None, None)
    assert "train_on" not in told["settings"]
    assert told["tokenizer"] == parents[0]["tokenizer"]
    result = weft("generate", "mixed", "--prompt", "one", "--max-new-tokens", 2)
    assert result.code == 0, result.err
    assert "trained with different chat templates" in result.err
    # And one that does not say.
    del own["data"]
    file.write_text(json.dumps(own))
    result = weft("combine", pair_dir / "adapters/a", other, "--output", "unsaid", "--type", "svd")
    assert f"not trained alike: {other}: the folder does not say" in result.err
    assert provenance_of(Path("unsaid")) is None


def test_options_that_do_nothing(weft: Callable[..., Any], pair_dir: Path) -> None:
    words = ["combine", pair_dir / "adapters/a", pair_dir / "adapters/b", "-o", "new"]
    for extra, why in (
        (["--seed", 1], "only dare chooses"),
        (["--majority-sign-method", "frequency"], "only ties elects"),
        (["--adapter", "a"], "chooses among those of a run"),
    ):
        result = weft(*words, *extra)
        assert (result.code, why in result.err) == (2, True), result.err
    assert not Path("new").exists()
