"""Mistakes are told before torch is imported, in the words of the full check; what the full check takes is taken."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import weft as package

BAD = [
    "train nowhere.yaml",
    "train {good} learning_rat=1",
    "train {good} jobs.0.rr=4",
    "train {good} method=lorra",
    "train {good} method=lora+bitfot",
    "train {good} optimizer=adamv",
    "train {good} optim=muon",
    "train {good} optim=sgd optim_args=nesterov",
    "train {good} optim=apollo optim_args.rank=0",
    "train {good} lr_scheduler_type=linear lr_scheduler_kwargs.power=2",
    "train {good} lr_scheduler_type=cosin",
    "train {good} lr_scheduler_type=greedy",
    "train {good} quantization=nf5",
    "train {good} task=seq2sec",
    "train {good} audit=of",
    "train {good} audit=false",
    "train {good} exact=perhaps",
    "train {good} r=many",
    "train {good} epochs=-1",
    "train {good} name=a/b",
    "train {good} early_stopping_patience=2",
    "train {good} init_lora_weights=pizza",
    "train {good} method=bottleneck architecture=pfeifer",
    "train {good} method=bottleneck residual_before_ln=perhaps",
    "train {good} dtype=float12",
    "train {good} device=cdua",
    "train {good} device=mps",
    "train {good} data_format=alpacca",
    "train {good} chat_template=chatmll",
    "train {good} chat_template=nowhere.jinja",
    "train {good} objective=missing",
    "train {good} callbacks=[missing]",
    "train {good} data=nowhere.jsonl",
    "train {good} add_tokens=[a,b,a]",
    "train {good} num_virtual_tokens=20",
    "train {good} method=bitfit r=8",
    "train {good} 'data=0.5*nowhere.jsonl + 0.5*{data}'",
    "train {good} eval_data=nowhere.jsonl",
    "train {good} model={model}x",
    "train {good} model=tiny-lama",
    "train {good} model=here/lama",
    "train {good} output_dir={data}",
    "train {good} stray",
    "train here",
    "train --model {model} --data nowhere.jsonl --method lora",
    "preview {good} learning_rat=1",
    "preview {good} data=nowhere.jsonl",
    "preview --model nowhere.d --data {data}",
    "generate ./nowhere --prompt x",
    "generate here --prompt x",
    "generate {model} --input nowhere.txt",
    "generate {model} --prompt x --dtype float12",
    "generate {run} --prompt x --adapter lara",
    "generate {run} --prompt x --model ./nowhere",
    "generate {run}/adapters/lora --prompt x --model ./nowhere",
    "chat ./nowhere",
    "chat {run} --adapter lara",
    "chat {run} --device cdua",
    "combine {run} ./nowhere --output new",
    "combine {run} --adapter lara --output new",
    "combine {run} {run} --adapter lora --output new --type tie",
    "combine {run} {run} --adapter lora --output new --type ties",
    "combine {run} {run} --adapter lora --output here",
    "merge --adapter ./nowhere --output new",
    "merge --adapter {run}/adapters/lora --output here",
    "merge --adapter {run}/adapters/lora --output new --dtype float12",
    "merge --adapter {run}/adapters/lora --adapter {run}/adapters/lora --output new",
    "merge --adapter {run}/adapters/lora --output new --weights 1,2",
    "export {run} --adapter lara --to peft --output new",
    "export {run} --adapter lora --to ggfu --output new",
    "export {run} --adapter lora --to gguf --output new --dtype q4",
    "export {run} --adapter prefix_tuning --to gguf-lora --output new",
    "export {run} --adapter lora --to peft --output new --push-to-hub me",
    "export {model} --to peft --output new",
    "export tiny-bloom --to gguf --output new",
    "judge nowhere.jsonl nowhere.jsonl --judge http://127.0.0.1:1/v1#m --output new",
    "judge {answers} {answers}#lara --judge http://127.0.0.1:1/v1#m --output new",
    "judge {answers} {answers} --judge ./nowhere --output new",
]
GOOD = [
    "train {good}",
    "train {good} optim=adamw_torch_fused lr_scheduler_type=constant_with_warmup packing=no lora_r=4",
    "train {good} method=lora+bitfit jobs.0.r=16",
    "train {good} method=[lora,prefix_tuning,bottleneck,p_tuning_v2,llama_pro,adalora,ia3,vera,freeze,full,ln_tuning]",
    "train {good} 'data=0.5*{data} + 0.5*{data2}' chat_template=chatml",
    "train {good} model=owner/name data=owner/data:train",
    "train {good} model=tiny-bloom dtype=bf16 device=cuda:7 threads=1 audit=off exact=yes",
    "train {good} 'data=[{{path: {data}, limit: 3}}]' data_format=alpaca",
    "train {good} task=sequence_classification data_format=anything",
    "train {run} --resume",
    "preview {good}",
    "preview --model {model} --data {data}",
    "preview tokenizer.yaml",
    "generate {run} --prompt x",
    "generate {run} --prompt x --adapter lora --chat-template chatml --dtype bf16",
    "generate {run}/adapters/lora --prompt x --model {model}",
    "generate {model} --input {data}",
    "generate tiny-bloom --prompt x --device cuda",
    "chat {run}",
    "chat {model}",
    "combine {run} {run} --adapter lora --output new",
    "merge --adapter {run}/adapters/lora --output new",
    "export {run} --adapter lora --to peft --output new",
    "export {run} --adapter lora --to gguf --output new",
    "export {model} --to ollama --output new",
    "judge {answers} {answers} --judge {model} --output new",
]
NOTHING = "it goes on"
# The copies of the process are left out, which would import Weft for each line.
RUN = """
import contextlib, io, json, sys
from weft.cli import early
from weft.cli.main import main
from weft.errors import UserError

def refuse(check):
    try:
        check()
    except early.NotHereError:
        pass
    raise UserError("it goes on")

bad, good = json.load(sys.stdin)
early.refuse, found = refuse, []
early.set_up()
for words in [*bad, *good]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(words)
    found.append([code, said.getvalue()])
print(json.dumps(found))
"""


@pytest.fixture
def words(
    tmp_path: Path, weft: object, tiny_llama_dir: Path, tiny_data: Path, run_dir: Path
) -> Callable[[str], list[str]]:
    """The words of a line, in which names stand for paths."""
    (tmp_path / "work" / "here" / "llama").mkdir(parents=True)
    (tmp_path / "good.yaml").write_text(f"model: {tiny_llama_dir}\ndata: {tiny_data}\nmethod: lora\n")
    (tmp_path / "work" / "tokenizer.yaml").write_text(f"model: {run_dir}/tokenizer\ndata: {tiny_data}\nmethod: lora\n")
    (tmp_path / "second.jsonl").write_bytes(tiny_data.read_bytes())
    (tmp_path / "answers.jsonl").write_text('{"index": 0, "prompt": "a", "adapter": "lora", "text": "b"}\n')
    places = {
        "good": tmp_path / "good.yaml",
        "answers": tmp_path / "answers.jsonl",
        "data": tiny_data,
        "data2": tmp_path / "second.jsonl",
    }
    places |= {"model": tiny_llama_dir, "run": run_dir}
    return lambda line: shlex.split(line.format(**places))


def test_told_before_torch_in_the_same_words(
    words: Callable[[str], list[str]], weft: Callable[..., object], tmp_path: Path
) -> None:
    bad, good = [words(line) for line in BAD], [words(line) for line in GOOD]
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([bad, good]),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path / "work",
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    wrong = [(line, said, "") for line, (_, said) in zip(GOOD, found[len(bad) :], strict=True) if NOTHING not in said]
    for line, given, (code, said) in zip(BAD, bad, found, strict=False):
        full = weft(*given)
        if (code, said) != (2, full.err):  # type: ignore[attr-defined]
            wrong.append((line, said, full.err))  # type: ignore[attr-defined]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    ("line", "expected"),
    [("train {good} learning_rat=1", "Did you mean 'learning_rate'?"), ("chat ./nowhere", "no model at './nowhere'")],
)
def test_torch_is_not_imported(line: str, expected: str, words: Callable[[str], list[str]]) -> None:
    code = (
        "import sys; from weft.cli.main import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; "
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words(line)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr


def test_what_looks_like_a_path_is_not_looked_up(
    words: Callable[[str], list[str]], weft: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("a hub is asked")

    monkeypatch.setattr("weft.models.hub._unreachable", asked)
    for name in ("here/lama", "./a/b", "a/b/c", "models/x.safetensors", "a b/c", r"C:\models\x"):
        said = weft("generate", name, "--prompt", "x").err  # type: ignore[attr-defined]
        assert f"no model at {name!r}" in said, said
    assert "Did you mean 'here/llama'?" in weft("chat", "here/lama").err  # type: ignore[attr-defined]
