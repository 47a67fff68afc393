"""``weft merge``: an adapter's folder in, a plain model's folder out, which answers and renders as the adapter did."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import kit
from tests.kit.words import quantise_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.assets import model_path
from weft.data import Message
from weft.export import folder as merging
from weft.export import proof as proofs
from weft.files.adapter_folder import merged_from, provenance_of
from weft.generation.open import open_target
from weft.methods.dense import how_kept

ASKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TALK = [Message("user", "What comes after one?"), Message("assistant", "two"), Message("user", "And then?")]
JOBS = [
    {"name": "lora", "method": "lora"},
    {"name": "pro", "method": "llama_pro", "num_new_blocks": 1},
    {"name": "several", "method": "lora+ln_tuning", "use_dora": True},
    {"name": "prompt", "method": "prompt_tuning", "num_virtual_tokens": 2},
    {"name": "mixed", "method": "lora+bottleneck", "reduction_factor": 8},
]


@pytest.fixture(scope="module")
def trained(tiny_llama_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, far enough from its base to answer otherwise."""
    return train(tmp_path_factory.mktemp("runs"), "configuration", tiny_llama_dir, tiny_data)


@pytest.fixture(scope="module", params=["tokenizer", "configuration", "plain"])
def trained_with(request: Any, trained: Path, tiny_llama_dir: Path, tiny_data: Path,
                 tmp_path_factory: pytest.TempPathFactory) -> Path:  # fmt: skip
    """The same, its template from one of the three places."""
    if request.param == "configuration":
        return trained
    return train(tmp_path_factory.mktemp("runs"), request.param, tiny_llama_dir, tiny_data)


def train(folder: Path, template: str, tiny_llama_dir: Path, tiny_data: Path) -> Path:
    from weft.cli.main import main

    base = folder / "base"
    shutil.copytree(tiny_llama_dir, base)
    file = base / "generation_config.json"
    generation = json.loads(file.read_text())
    file.write_text(json.dumps(generation | {"eos_token_id": [generation["eos_token_id"], 5]}))
    if template == "plain":
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = None
        (base / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(base)
    config = {"model": str(base), "data": str(tiny_data), "output_dir": str(folder / "run"), "steps": 8, "jobs": JOBS,
              "learning_rate": 0.05, "batch_size": 4}  # fmt: skip
    if template == "configuration":
        config["chat_template"] = ASKED
    (folder / "run.json").write_text(json.dumps(config))
    assert main(["train", str(folder / "run.json"), "--quiet"]) == 0
    return folder / "run"


def answers(weft: Callable[..., Any], target: Path, *more: object) -> list[Any]:
    words = ["generate", target, "--max-new-tokens", 12, "--json"]
    for prompt in ("one", "What colour is the sky?", "Count from one to five."):
        words += ["--prompt", prompt]
    result = weft(*words, *more)
    assert result.code == 0, result.err
    return [(row["text"], row["tokens"], row["prompt_tokens"]) for row in json.loads(result.out)["results"]]


def may_differ(told: dict[str, Any]) -> float:
    """What the merge's own proof asks of a difference on this machine."""
    return max(1e-5, proofs.ROUNDINGS * (told["proof"]["own_rounding"] or 0.0))


@pytest.mark.parametrize("name", ["pro", "several"])
def test_answers_as_the_adapter(weft: Callable[..., Any], trained: Path, name: str) -> None:
    check_answers(weft, trained, name)


def test_answers_and_renders_as_the_adapter(weft: Callable[..., Any], trained_with: Path) -> None:
    check_answers(weft, trained_with, "lora")


def check_answers(weft: Callable[..., Any], trained: Path, name: str) -> None:
    """Token for token, greedily; prompts too, in Weft and by transformers alone."""
    adapter = trained / "adapters" / name
    result = weft("merge", "--adapter", adapter, "--output", "merged", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert told["proof"]["exact"]
    kit.measured("merged - adapter", told["proof"]["precise_difference"], may_differ(told), derived=True)
    assert told["proof"]["agreement"] == 1
    own = answers(weft, adapter)
    assert answers(weft, Path("merged")) == own
    assert answers(weft, trained, "--adapter", "base") != own

    opened, first = open_target("merged"), open_target(adapter)
    assert opened.notes == []
    assert opened.names == ()
    ids = opened.prompt_ids(TALK)
    assert ids == first.prompt_ids(TALK)
    opened.close()
    first.close()
    tokenizer = AutoTokenizer.from_pretrained("merged")
    messages = [{"role": m.role, "content": m.content} for m in TALK]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert provenance_of(Path("merged")) == provenance_of(adapter)
    model = AutoModelForCausalLM.from_pretrained("merged")
    assert model.config.num_hidden_layers == 2 + (name == "pro")
    generation = json.loads((trained.parent / "base/generation_config.json").read_text())
    assert model.generation_config.eos_token_id == generation["eos_token_id"]


def test_a_template_on_the_command_line_and_another_tokenizer(weft: Callable[..., Any], trained_with: Path) -> None:
    """The same warnings as of an adapter's folder."""
    trained = trained_with
    assert weft("merge", "--adapter", trained / "adapters/lora", "-o", "merged").code == 0
    opened = open_target("merged", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    opened.close()
    assert opened.notes == ["warning: the chat template given is not the one of training; the one given is used."]
    wanted = open_target(trained / "adapters/lora").prompt_ids(TALK)
    tokenizer = AutoTokenizer.from_pretrained("merged")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained("merged")
    opened = open_target("merged")
    opened.close()
    assert opened.prompt_ids(TALK) == wanted
    of_configuration = provenance_of(Path("merged"))["template_from"] == "configuration"  # type: ignore[index]
    assert len(opened.notes) == (not of_configuration)
    tokenizer.add_tokens([" after"])
    tokenizer.save_pretrained("merged")
    assert any("the tokenizer is not the one of training" in note for note in open_target("merged").notes)


def test_variables_of_a_template_are_kept(weft: Callable[..., Any], trained: Path) -> None:
    """The saved template has them as defaults, so other tools need not be told; who gives others is heard."""
    shutil.copytree(trained / "adapters/lora", "lora")
    file = Path("lora/weft.json")
    own = json.loads(file.read_text())
    variables = {"mode": "fast", "on": False, "nothing": None, "list": [1, {"key": "'\"\n🧵"}]}
    own["data"]["template_kwargs"] = variables
    own["data"]["chat_template"] = "{{ [mode, on, nothing, list] | tojson }}" + ASKED
    file.write_text(json.dumps(own))
    result = weft("merge", "--adapter", "lora", "-o", "merged", "--model", trained.parent / "base")
    assert (result.code, result.err) == (0, "")
    tokenizer = AutoTokenizer.from_pretrained("merged")
    messages = [{"role": m.role, "content": m.content} for m in TALK]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.startswith(json.dumps(list(variables.values()), ensure_ascii=False))
    assert tokenizer.apply_chat_template(messages, tokenize=False, mode="slow").startswith('["slow", false')
    opened = open_target("merged")
    opened.close()
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == opened.prompt_ids(TALK)
    assert opened.notes == []


def test_what_it_came_from(weft: Callable[..., Any], trained: Path) -> None:
    result = weft("merge", "--adapter", trained / "adapters/several", "-o", "merged")
    assert result.code == 0, result.err
    assert "largest relative difference of logits" in result.out
    assert "weft chat merged" in result.out
    told = merged_from(Path("merged"))
    assert told is not None
    run = json.loads((trained / "run.json").read_text())["base"]
    assert (told["adapter"], told["method"], told["quantization"], told["dtype"]) == (
        "several", "lora+ln_tuning", None, "float32"
    )  # fmt: skip
    assert told["base"] == {**run, "model": "base"}, "no path of this machine"
    assert set(told["adapter_sha256"]) == {f"{n}/adapter_model.safetensors" for n in ("1-lora", "2-ln_tuning")}
    assert sorted(path.name for path in Path().iterdir()) == ["merged"], "nothing half-written"
    # A merged model is a base like any other, and no adapter.
    again = weft("merge", "--adapter", "merged", "-o", "twice")
    assert (again.code, "is a merged model already" in again.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "prompt"], "(prompt_tuning) cannot be merged: what it adds are virtual tokens"),
        (["--adapter", "mixed"], "(lora+bottleneck: its part bottleneck) cannot be merged"),
        (["--adapter", ".."], "mixed. Name the folder of one, such as"),
        (["--adapter", ".."], "is a run with the adapters lora, pro, several"),
        (["--adapter", "nowhere"], "holds no adapter"),
        (["--adapter", "lora", "--output", "here"], "is there already"),
        (["--adapter", "lora", "--output", "here/file/new"], "here/file is no folder"),
        (["--adapter", "lora", "--model", "nowhere/at/all"], "no model at"),
        (["--adapter", "lora", "--model", "tiny-bloom"], "on tiny-bloom: this is not the base of its training"),
        (["--adapter", "lora", "--model", "tiny-llama"], "shape"),
        (["--adapter", "lora", "--dtype", "float31"], "float31"),
        (["--adapter", "lora", "--quantization", "nf4"], "was not quantised"),
        (["--adapter", "lora", "--quantization", "int4"], "one of nf4"),
    ],
)
def test_refused(weft: Callable[..., Any], trained: Path, words: list[str], message: str) -> None:
    Path("here").mkdir()
    Path("here/file").write_text("mine")
    words = [
        str(trained / "adapters" / w) if before == "--adapter" else w
        for before, w in zip(["", *words], words, strict=False)
    ]
    result = weft("merge", "--output", "new", *words)
    assert result.code == 2, result.err
    assert message in result.err
    assert sorted(str(path) for path in Path().rglob("*")) == ["here", "here/file"]


def test_a_run_with_one_adapter_stands_for_it(weft: Callable[..., Any], tiny_llama_dir: Path, tiny_data: Path) -> None:
    words = [
        "train",
        "--model",
        tiny_llama_dir,
        "--data",
        tiny_data,
        "--method",
        "ia3",
        "steps=2",
        "--output-dir",
        "run",
    ]
    assert weft(*words, "--quiet").code == 0
    Path("merged").mkdir()  # empty: may be taken
    assert weft("merge", "--adapter", "run", "-o", "merged").code == 0
    assert merged_from(Path("merged"))["method"] == "ia3"  # type: ignore[index]


def test_moved_from_its_run_and_another_base_of_its_shape(
    weft: Callable[..., Any], trained: Path, tiny_llama_dir: Path
) -> None:
    """The folder itself says which base it was."""
    shutil.copytree(trained / "adapters/lora", "moved")
    assert weft("merge", "--adapter", "moved", "-o", "merged").code == 0
    base = trained.parent / "base"
    shutil.copytree(base, "other")
    tensors = load_file("other/model.safetensors")
    save_file(
        {k: t + 0.01 if t.dim() == 1 else t for k, t in tensors.items()}, "other/model.safetensors", {"format": "pt"}
    )
    entries = json.loads(Path("moved/adapter_config.json").read_text())
    Path("moved/adapter_config.json").write_text(
        json.dumps({**entries, "base_model_name_or_path": str(Path("other").absolute())})
    )
    result = weft("merge", "--adapter", "moved", "-o", "new")
    assert result.code == 2
    assert "is not the one that moved was trained on" in result.err
    result = weft("merge", "--adapter", "moved", "-o", "new", "--model", "other")
    assert result.code == 0
    assert "warning: other is not the base that the adapter was trained on" in result.err


def test_a_merge_that_does_not_answer_alike_is_not_kept(
    weft: Callable[..., Any], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = merging.merged_model
    for change in (1e-3, float("nan")):

        def wrong(*args: Any, by: float = change) -> Any:
            model = plain(*args)
            with torch.no_grad():
                weight = model.model.layers[1].mlp.down_proj.weight
                model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(weight + by)
            return model

        monkeypatch.setattr(merging, "merged_model", wrong)
        result = weft("merge", "--adapter", trained / "adapters/lora", "-o", "merged")
        assert result.code == 2
        assert "does not answer as the adapter does, and nothing is kept" in result.err
        found, limit = (
            re.search(pattern, result.err)
            for pattern in (r"difference of logits (\S+),", r"asked for: a relative difference of at most (\S+?)\. ")
        )
        assert found is not None
        assert limit is not None
        # The fault is far larger than what this machine's rounding is allowed.
        assert 1e-5 <= float(limit[1]) <= 3e-4
        assert not float(found[1]) <= 10 * float(limit[1])
        assert list(Path().iterdir()) == []


@pytest.mark.parametrize("fault", [0.0, 3e-5])
def test_where_rounding_is_large_it_is_measured(
    weft: Callable[..., Any], trained: Path, monkeypatch: pytest.MonkeyPatch, fault: float
) -> None:
    """As on a base, or a machine, that rounds more than the usual limit: a right merge is kept, a wrong one is not."""
    monkeypatch.setattr(proofs, "LARGEST_DIFFERENCE", 1e-9)
    plain = merging.merged_model

    def changed(*args: Any) -> Any:
        model = plain(*args)
        with torch.no_grad():
            weight = model.model.layers[1].mlp.down_proj.weight
            model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(weight + fault)
        return model

    monkeypatch.setattr(merging, "merged_model", changed)
    result = weft("merge", "--adapter", trained / "adapters/lora", "-o", "merged", "--json")
    if fault:
        assert result.code == 2
        assert "own rounding in 32 bits is" in result.err
        return
    assert result.code == 0, result.err
    proof = json.loads(result.out)["proof"]
    # Rounding of 32 bits: some multiple of eps, far from a fault's size.
    assert torch.finfo(torch.float32).eps / 4 < proof["own_rounding"] < 1e-4
    assert proof["precise_difference"] <= proofs.ROUNDINGS * proof["own_rounding"]


def test_in_sixteen_bits(weft: Callable[..., Any], trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As good as rounding allows, and a merge that has lost its adapter is not."""
    adapter = trained / "adapters/lora"
    for dtype, name in (("bfloat16", "pro"), ("bfloat16", "lora"), ("float16", "several")):
        shutil.rmtree(dtype, ignore_errors=True)
        result = weft("merge", "--adapter", trained / "adapters" / name, "-o", dtype, "--dtype", dtype, "--json")
        assert result.code == 0, result.err
        proof = json.loads(result.out)["proof"]
        assert not proof["exact"]
        assert proof["decided_agreement"] >= 0.999
        assert 0.01 < proof["rounding"] <= 1.5
        # So many that the check after this one can fail.
        assert proof["decided"] > proof["positions"] / 20
        assert {t.dtype for t in load_file(f"{dtype}/model.safetensors").values()} == {getattr(torch, dtype)}
    plain = merging.merged_model

    def forgetful(model: Any, shape: Any, merged: Any, head: Any) -> Any:
        merged.tensors.update({key: tensor.bfloat16() for key, tensor in model.state_dict().items()})
        return plain(model, shape, merged, head)

    monkeypatch.setattr(merging, "merged_model", forgetful)
    result = weft("merge", "--adapter", adapter, "-o", "lost", "--dtype", "bfloat16")
    assert (result.code, "does not answer as the adapter does" in result.err) == (2, True)


BOTH = [pytest.param("auto", False, id="auto"), pytest.param("float32", True, id="float32")]


@pytest.mark.parametrize(
    ("base", "method", "dtype", "exact"),
    kit.in_turn(
        ["tiny-bloom", pytest.param("tiny-llama", id="tiny-llama", marks=pytest.mark.slow)],
        ["lora", pytest.param("llama_pro", id="llama_pro", marks=pytest.mark.slow)],
        BOTH,
    ),
)
def test_trained_in_sixteen_bits(
    weft: Callable[..., Any], tiny_data: Path, base: str, method: str, dtype: str, exact: bool
) -> None:
    """Written as it was trained by default; in 32 bits the same without another rounding. (BLOOM as transformers
    runs it is off by four times as much in bfloat16 as here, whatever its weights.)"""
    words = ["train", "--model", base, "--data", tiny_data, "--method", method, "steps=3"]
    assert weft(*words, "dtype=bfloat16", "learning_rate=0.01", "--output-dir", "run", "--quiet").code == 0
    result = weft("merge", "--adapter", f"run/adapters/{method}", "-o", "merged", "--dtype", dtype, "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert (told["dtype"], told["proof"]["exact"]) == ("float32" if exact else "bfloat16", exact)


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_quantised_base(weft: Callable[..., Any], tiny_data: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    words = ["train", "--model", "tiny-llama", "--data", tiny_data, "--method", "lora", "steps=3", "dtype=float32"]
    details = {"double_quantization": False, "quantization_block_size": 128} if quantization == "nf4" else {}
    words += [f"quantization={quantization}", *(f"{key}={value}" for key, value in details.items())]
    assert weft(*words, "learning_rate=0.01", "--output-dir", "run", "--quiet").code == 0
    shutil.copytree("run/adapters/lora", "moved")  # it says by itself how its base was kept
    for adapter in ("run", "moved"):
        result = weft("merge", "--adapter", adapter, "-o", f"of-{adapter}", "--json")
        assert result.code == 0, result.err
        told = json.loads(result.out)
        assert f"the base of the training was {quantization}: its dequantised weights" in result.err
        assert (told["quantization"], told["dtype"], told["proof"]["exact"]) == (quantization, "float32", True)
        assert {key: told[key] for key in details} == details
        allowed = may_differ(told)
        kit.measured("merged - adapter in 32 bits", told["proof"]["precise_difference"], allowed, derived=True)
        kit.measured("merged - adapter as trained", told["proof"]["routed_difference"], allowed, derived=True)
    assert answers(weft, Path("moved"), "--dtype", "float32") == answers(weft, Path("run"), "--dtype", "float32")
    opened = open_target("moved")
    opened.close()
    assert opened.base.model.is_quantized
    assert how_kept(opened.base.model, torch.bfloat16) == {"dtype": "bfloat16", "quantization": quantization, **details}
    one, other = (load_file(f"of-{name}/model.safetensors") for name in ("run", "moved"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    if quantization == "nf4":
        # Quantised once more, the change is compared with the rounding: of the weights that training saw, nearly none.
        result = weft("merge", "--adapter", "run", "-o", "small", "--quantize", "nf4")
        assert result.code == 0, result.err
        assert "in nf4: the change is" in result.out
        assert "dB over the rounding of the weights that it changed" in result.out
        assert "largest relative difference of logits" in result.out
        # Without the word of the folder it can only be told that nothing is known.
        own = json.loads(Path("moved/weft.json").read_text())
        del own["base"]
        Path("moved/weft.json").write_text(json.dumps(own))
        result = weft("merge", "--adapter", "moved", "-o", "guessed")
        assert "does not say how its base was kept" in result.err
        assert (
            weft("merge", "--adapter", "moved", "-o", "said", "--quantization", "nf4", "--dtype", "float32").code == 0
        )


def test_a_base_by_gptq(weft: Callable[..., Any], tiny_data: Path) -> None:
    quantise_folder(model_path("tiny-llama"), Path("base"), "gptq")
    words = ["train", "--model", "base", "--data", tiny_data, "--method", "lora", "steps=2", "dtype=float32"]
    assert weft(*words, "learning_rate=0.01", "--output-dir", "run", "--quiet").code == 0
    shutil.copytree("run/adapters/lora", "moved")
    assert answers(weft, Path("moved"), "--dtype", "float32") == answers(weft, Path("run"), "--dtype", "float32")
    result = weft("merge", "--adapter", "run", "-o", "merged", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert (told["quantization"], told["dtype"], told["proof"]["exact"]) == ("gptq", "float32", True)
    kit.measured("merged - adapter as trained", told["proof"]["routed_difference"], may_differ(told), derived=True)
    assert "quantization_config" not in json.loads(Path("merged/config.json").read_text())
    result = weft("verify", "run", "merged")
    assert result.code == 0, result.err


def test_a_classifier_becomes_transformers_own(weft: Callable[..., Any], tiny_llama_dir: Path) -> None:
    from transformers import AutoModelForSequenceClassification, pipeline

    rows = [{"text": f"{w} {i}", "label": c} for i in range(8) for w, c in (("sky", "up"), ("stone", "down"))]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model": str(tiny_llama_dir), "data": "data.jsonl", "output_dir": "run", "steps": 6,
              "learning_rate": 0.01, "task": "sequence_classification",
              "jobs": [{"name": "it", "method": "lora"}]}  # fmt: skip
    Path("run.json").write_text(json.dumps(config))
    assert weft("train", "run.json", "--quiet").code == 0
    result = weft("merge", "--adapter", "run", "-o", "merged", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    kit.measured("merged - adapter", told["proof"]["precise_difference"], may_differ(told), derived=True)
    model = AutoModelForSequenceClassification.from_pretrained("merged")
    assert sorted(model.config.id2label.values()) == ["down", "up"]
    asked = weft("generate", "run", "--prompt", "sky 3", "--json")
    row = json.loads(asked.out)["results"][0]
    found = pipeline("text-classification", "merged", device="cpu")("sky 3")[0]
    assert found["label"] == row["text"]
    assert found["score"] == pytest.approx(row["probabilities"][row["text"]], abs=1e-4)
    refused = weft("generate", "merged", "--prompt", "sky 3")
    assert (refused.code, "is a merged classifier" in refused.err) == (2, True)
