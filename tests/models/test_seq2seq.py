"""T5 from the command line: trained, evaluated, stopped, resumed, asked; and what is known of its parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from tests.contracts.test_seq2seq import make_model

from weft.api import Adapters
from weft.data import Message
from weft.errors import UserError
from weft.evaluate import Question, answer_questions
from weft.files.adapter_folder import read_tensors
from weft.generation import Engine, Request, generate
from weft.generation.open import open_target
from weft.methods import METHODS
from weft.models import describe
from weft.models.load import load_base
from weft.training.config import build_config
from weft.training.run import prepare, train

METHODS_HERE = ["lora", "bitfit", "bottleneck", "prompt_tuning", "prefix_tuning"]


@pytest.fixture(scope="module")
def t5_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random T5 with a tokenizer that ends every text with </s> and has no chat template, as T5's."""
    from tests.conftest import make_tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2, num_decoder_layers=2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0, decoder_start_token_id=0, dtype="float32",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny-t5"
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def weft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The command line inside the test's process, in an empty working directory: what it prints."""
    from weft.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


def settings(t5_dir: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    jobs = [
        {"method": name, **kit.SETTINGS[name], **kit.DROPOUT.get(name, {}), "seed": i}
        for i, name in enumerate(METHODS_HERE)
    ]
    return {
        "model": str(t5_dir), "data": str(data), "output_dir": str(out), "jobs": jobs, "task": "seq2seq", "steps": 6,
        "batch_size": 3, "gradient_accumulation_steps": 2, "eval_size": 4, "eval_steps": 3, "logging_steps": 1,
        "save_steps": 1, "threads": 1, "neftune_noise_alpha": 5.0, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(t5_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of every method."""
    out = tmp_path_factory.mktemp("runs") / "t5"
    assert train(build_config(settings(t5_dir, tiny_data, out))).completed
    return out


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_the_run_evaluates_and_learns(run_dir: Path) -> None:
    for name in METHODS_HERE:
        steps = [e["step"] for e in events(run_dir, "eval") if e["job"] == name]
        assert steps == [0, 3, 6], name
        assert [e["step"] for e in events(run_dir, "step") if e["job"] == name] == [1, 2, 3, 4, 5, 6]
        assert list((run_dir / "adapters" / name).glob("*.safetensors"))
    first, last = ([e["eval_loss"] for e in events(run_dir, "eval") if e["step"] == s] for s in (0, 6))
    assert sum(last) < sum(first)


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_stopped_run_ends_bit_for_bit_as_the_unbroken_one(
    stop_at: int, run_dir: Path, t5_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    begun: list[int] = []

    def note(event: Any) -> None:
        if event["event"] == "step":
            begun.append(event["step"])

    values = settings(t5_dir, tiny_data, out)
    stopped = train(build_config(values), on_event=note, should_stop=lambda: stop_at in begun)
    assert not stopped.completed
    assert train(build_config({**values, "resume": True})).completed
    for name in METHODS_HERE:
        (file,) = (out / "adapters" / name).glob("*.safetensors")
        a, b = read_tensors(file), read_tensors(run_dir / file.relative_to(out))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_other_answers_are_other_data(t5_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    """What is to be written counts for a resume, though it is not in the input."""
    data = tmp_path / "data.jsonl"
    data.write_text(tiny_data.read_text())
    values = settings(t5_dir, data, tmp_path / "run")
    assert not train(build_config(values), should_stop=lambda: True).completed
    data.write_text(tiny_data.read_text().replace("(3)", "(4)"))
    with pytest.raises(UserError, match="cannot resume: the data of job"):
        train(build_config({**values, "resume": True}))


def test_generate_answers_as_training_asked(
    weft: Callable[..., str], run_dir: Path, t5_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    result = weft("generate", run_dir, "--prompt", "What comes after one?", "--all-adapters", "--json",
                  "--max-new-tokens", 5)  # fmt: skip
    rows = json.loads(result)["results"]
    assert [row["adapter"] for row in rows] == METHODS_HERE
    opened = open_target(run_dir)
    tokenizer = AutoTokenizer.from_pretrained(t5_dir)
    ids = opened.prompt_ids("What comes after one?")
    assert ids == tokenizer("What comes after one?")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    asked: list[list[int]] = []

    check = Engine._check

    def note(self: Engine, request: Request, what: str) -> None:
        asked.append(list(request.prompt))
        check(self, request, what)

    monkeypatch.setattr(Engine, "_check", note)
    question = Question((Message("user", "What comes after one?"),), "two", "here")
    answers = answer_questions(opened.adapters, opened.renderer, [question], METHODS_HERE, max_new_tokens=5)
    assert asked == [ids] * len(METHODS_HERE)
    assert [answers[row["adapter"]][0].text for row in rows] == [row["text"].strip() for row in rows]
    opened.close()


def test_generate_from_a_plain_model(weft: Callable[..., str], t5_dir: Path) -> None:
    """What transformers writes, from the same folder."""
    result = weft("generate", t5_dir, "--prompt", "one two", "--json", "--max-new-tokens", 6)
    base = load_base(str(t5_dir))
    ids = base.tokenizer("one two", return_tensors="pt")["input_ids"]
    out = base.model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0]  # type: ignore[operator]
    text = base.tokenizer.decode(out[1:], skip_special_tokens=True)
    (row,) = json.loads(result)["results"]
    assert row["text"] == text


def test_training_from_the_command_line(weft: Callable[..., str], t5_dir: Path, tiny_data: Path) -> None:
    """Nothing needs to be said: the base is an encoder-decoder."""
    weft("train", "--model", t5_dir, "--data", tiny_data, "--method", "lora", "steps=2", "--quiet",
         "gradient_checkpointing=true", "--output-dir", "run")  # fmt: skip
    assert (Path("run") / "adapters" / "lora" / "adapter_model.safetensors").is_file()


# -- refused before weights are loaded


def refused(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str) -> None:
    monkeypatch.setattr("weft.training.settings.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        prepare(build_config(values))


def test_misfits_are_refused_before_weights_are_loaded(
    t5_dir: Path, tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings(t5_dir, tiny_data, tmp_path / "run")
    refused(monkeypatch, {**values, "model": str(tiny_llama_dir)}, "job 'lora': task is seq2seq, but a llama model")
    refused(monkeypatch, {**values, "exact": True}, "exact mode needs the packed stream")
    monkeypatch.setattr(METHODS["bottleneck"], "tasks", frozenset({"causal_lm"}))
    values.pop("task")
    refused(monkeypatch, values, "method bottleneck does not work with t5, whose task is seq2seq")
    values |= {"task": "seq2seq"}
    refused(monkeypatch, values, "task seq2seq: method bottleneck is not for that")
    values.pop("task")
    both = [{"method": "lora+bottleneck", **kit.SETTINGS["lora"]}]
    refused(monkeypatch, {**values, "jobs": both}, "method bottleneck does not work with t5")


@pytest.mark.parametrize("method", ["full", "freeze", "llama_pro"])
def test_methods_that_change_whole_blocks_are_refused(
    method: str, t5_dir: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings(t5_dir, tiny_data, tmp_path / "run", jobs=[{"method": method}])
    refused(monkeypatch, values, f"task seq2seq: method {method} is not for that")
    values.pop("task")
    refused(monkeypatch, values, f"method {method} does not work with t5, whose task is seq2seq")


def test_inserted_blocks_are_refused(
    t5_dir: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.methods.lora.Lora.inserted_blocks", lambda self: {"decoder.block.0": ()})
    refused(monkeypatch, settings(t5_dir, tiny_data, tmp_path / "run"), "method lora adds blocks")


def test_plain_text_has_no_answer(t5_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "once upon a time"}\n')
    refused(monkeypatch, settings(t5_dir, data, tmp_path / "run"), "plain text has no answer to write")


# -- what is known of a T5


def test_the_parts_of_a_t5() -> None:
    shape = describe(make_model("t5", num_decoder_layers=2))
    assert shape.task == "seq2seq"
    assert shape.blocks == (*(f"encoder.block.{i}" for i in range(3)), *(f"decoder.block.{i}" for i in range(2)))
    assert (shape.num_layers, shape.num_heads, shape.head_dim, shape.hidden_size) == (2, 4, 6, 32)
    # q, k, v, o and the two of the MLP; the decoder's blocks attend twice.
    assert len(shape.linears) == 3 * 6 + 2 * 10
    assert len(shape.attention_output) == 3 + 2 * 2
    assert len(shape.mlp_output) == 3 + 2
    assert set(shape.memory_linears) == {
        f"decoder.block.{i}.layer.1.EncDecAttention.{side}" for i in range(2) for side in "kv"
    }
    assert (shape.embeddings, shape.head, shape.peft_task) == ("shared", "lm_head", "SEQ_2_SEQ_LM")


def test_layers_are_those_of_both_stacks() -> None:
    shape = describe(make_model("t5", num_decoder_layers=5))
    found = shape.match(["SelfAttention.q"], [0, 4])
    assert found == [f"{b}.layer.0.SelfAttention.q" for b in ("encoder.block.0", "decoder.block.0", "decoder.block.4")]
    with pytest.raises(UserError, match="no layer 5; this model has 0 to 4"):
        shape.match("all-linear", [5])


def test_a_decoder_needs_a_token_to_begin_with() -> None:
    model = make_model("t5")
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(UserError, match="no decoder_start_token_id"):
        describe(model)


@pytest.mark.parametrize("name", ["google/mt5-small", "google/flan-t5-base"])
def test_a_tiny_shape_of_a_t5_writes(name: str) -> None:
    """Nothing is downloaded: the name tells the architecture."""
    base = load_base(name, shape="tiny", device="cpu")
    adapters = Adapters(base.model, base.architecture)
    (answer,) = generate(adapters, [Request([5, 6, 7], None, 4)], stop_ids=())
    assert len(answer.ids) == 4
    adapters.close()


def test_an_unknown_encoder_decoder_is_refused() -> None:
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    with pytest.raises(UserError, match="marian is an encoder-decoder that Weft does not know"):
        describe(MarianMTModel(config))
