"""What ``weft plan`` says beside what ``weft train`` takes: memory at the fullest, and seconds per step.

    python benchmarks/plan_accuracy.py --data alpaca_en.json [--folder DIR] [--only WORD] [--output FILE]

Random models of 130 to 160 million parameters in bf16 (Llama, GPT-2, Qwen2 with shared keys, BLOOM) are written to a
folder. Each combination is planned by one process and trained for some steps by another, which is not told to plan.
Memory is VmHWM of that process. Seconds are the mean of its steps without the first, for as many tokens as a mean step
of the plan has.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_STEPS = 3
_SMALL = {"batch_size": 4}
_CHECKED = {"gradient_checkpointing": True, "batch_size": 8}
_CHEAP = {"gradient_checkpointing": "cheap", "batch_size": 8}
_NF4, _INT8, _FP32 = {"quantization": "nf4"}, {"quantization": "int8"}, {"dtype": "float32"}
COMBINATIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("llama", {"method": method, **_SMALL}) for method in (
        "lora", "adalora", "bitfit", "prompt_tuning", "p_tuning", "prefix_tuning", "bottleneck", "llama_pro", "ia3",
        "full",
    )),
    *(("llama", {"method": method, **_CHECKED}) for method in ("lora", "prefix_tuning", "bottleneck", "full")),
    *(("llama", {"method": "lora", **_CHEAP, **kept}) for kept in ({}, _NF4, _INT8, _FP32)),
    *(("llama", {"method": method, **_SMALL, **_NF4}) for method in ("lora", "prompt_tuning", "bottleneck")),
    *(("llama", {"method": method, **_SMALL, **_INT8}) for method in ("lora", "prefix_tuning")),
    *(("llama", {"method": method, **_SMALL, **_FP32}) for method in ("lora", "full", "prefix_tuning")),
    ("llama", {"method": "lora", "batch_size": 16}),
    ("llama", {"method": "lora", "batch_size": 32, "pack_tokens": 1024}),
    ("llama", {"method": "full", "optimizer": "adamw_8bit", **_SMALL}),
    ("llama", {"method": "full", "layerwise_updates": True, "max_grad_norm": 0, **_CHECKED}),
    ("llama", {"method": ["lora", "prefix_tuning"], **_SMALL}),
    ("llama", {"method": ["lora", "bottleneck", "prompt_tuning", "bitfit"], **_SMALL, **_NF4}),
    ("llama", {"method": ["lora"] * 10, **_SMALL}),
    *(("gpt2", {"method": method, **_SMALL}) for method in ("lora", "prefix_tuning", "full")),
    *(("qwen2", {"method": method, **_SMALL}) for method in ("lora", "p_tuning")),
    ("qwen2", {"method": "lora", **_CHECKED, **_NF4}),
    *(("bloom", {"method": method, **_SMALL}) for method in ("lora", "bottleneck")),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Planned and measured bytes, and seconds of a step."""

    planned: float
    measured: float
    planned_step: float | None
    step: float | None
    unknown: tuple[str, ...] = ()


def write_models(folder: Path) -> None:
    """Write the random models that are not there yet, with the tokenizer of an embedded base."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BloomConfig,
        GPT2Config,
        LlamaConfig,
        Qwen2Config,
    )

    from weft.assets import model_path

    sizes: dict[str, Any] = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12}
    configs: dict[str, Any] = {
        "llama": LlamaConfig(**sizes, intermediate_size=2048, vocab_size=32000, max_position_embeddings=2048),
        "gpt2": GPT2Config(n_layer=14, n_embd=768, n_head=12, vocab_size=50257),
        "qwen2": Qwen2Config(**sizes, num_key_value_heads=4, intermediate_size=2560, vocab_size=50000),
        "bloom": BloomConfig(n_layer=12, hidden_size=768, n_head=12, vocab_size=64000),
    }
    for name, config in configs.items():
        if (folder / name).is_dir():
            continue
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(model_path("tiny-llama"), trust_remote_code=False).save_pretrained(folder / name)


def words(options: argparse.Namespace, model: str, settings: dict[str, Any], out: Path) -> Path:
    """The configuration of a combination, as a file."""
    config = {
        "model": str(options.folder / model), "data": str(options.data), "limit": 400, "empty_answers": "skip",
        "max_length": 512, "truncation": "right", "logging_steps": 1, "output_dir": str(out / "run"), "steps": _STEPS,
        **settings,
    }  # fmt: skip
    method = config.pop("method")
    names = method if isinstance(method, list) else [method]
    config["jobs"] = [{"name": f"{one}{number}", "method": one} for number, one in enumerate(names)]
    path = out / "run.json.yaml"
    path.write_text(json.dumps(config))
    return path


def answer(*command: str) -> dict[str, Any]:
    """The JSON that a command of Weft prints."""
    weft = str(Path(sys.executable).with_name("weft"))
    done = subprocess.run([weft, *command, "--json"], capture_output=True, text=True)
    try:
        found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        found = {"error": done.stderr[-300:]}
    if "error" in found:
        raise RuntimeError(str(found["error"]).splitlines()[-1])
    return found


def cell(options: argparse.Namespace, model: str, settings: dict[str, Any], out: Path) -> Cell:
    """Plan a combination, and train it."""
    config = str(words(options, model, settings, out))
    plan = answer("plan", config, *(["--no-time"] if options.no_time else []))
    found = answer("train", config, "check_memory=false", "--quiet")
    events = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    by_job: dict[str, list[tuple[float, float]]] = {}
    for event in steps:
        by_job.setdefault(event["job"], []).append((event["tokens"], event["tokens"] / event["tokens_per_second"]))
    # All jobs take part in every pass, so each has the whole pass' seconds.
    first, last = next(iter(by_job.values()))[0], next(iter(by_job.values()))[-1]
    tokens = sum(points[-1][0] - points[0][0] for points in by_job.values()) / (_STEPS - 1)
    planned = sum(job["tokens_per_step"] for job in plan["jobs"])
    seconds = (last[1] - first[1]) / (_STEPS - 1) * planned / tokens
    time = plan["time"] or {}
    return Cell(
        plan["memory"]["total"], found["measured"]["memory"], time.get("step"), seconds, tuple(time.get("unknown", ()))
    )


@contextlib.contextmanager
def folder_of(options: argparse.Namespace) -> Iterator[None]:
    """The folder of the models; a temporary one goes again."""
    temporary = options.folder is None
    options.folder = options.folder or Path(tempfile.mkdtemp())
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        write_models(options.folder)
        yield
    finally:
        if temporary:
            shutil.rmtree(options.folder, ignore_errors=True)


def report(options: argparse.Namespace) -> None:
    """Run the combinations and print the table; the worst stand under it."""
    rows = [
        "# What weft plan says beside what weft train takes", "",
        f"`python {' '.join(sys.argv)}`, {datetime.date.today()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}. {_STEPS} steps each; memory in MB.", "",
        "| model | settings | planned | measured | off | planned step, s | measured, s | off |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    print("\n".join(rows), flush=True)
    off: list[float] = []
    late: list[float] = []
    for model, settings in COMBINATIONS[options.first :]:
        label = ", ".join(str(v) if k == "method" else f"{k} {v}" for k, v in settings.items())
        if options.only and options.only not in f"{model} {label}":
            continue
        with tempfile.TemporaryDirectory() as out:
            try:
                found = cell(options, model, settings, Path(out))
            except (RuntimeError, OSError) as error:
                rows.append(f"| {model} | {label} | {error} | | | | | |")
                print(rows[-1], flush=True)
                continue
        off.append(found.planned / found.measured - 1)
        cells = [f"{found.planned / 1e6:,.0f}", f"{found.measured / 1e6:,.0f}", f"{100 * off[-1]:+.1f} %"]
        if found.planned_step and found.step:
            late.append(found.planned_step / found.step - 1)
            cells += [f"{found.planned_step:.2f}", f"{found.step:.2f}", f"{100 * late[-1]:+.0f} %"]
        else:
            cells += ["", "", ""]
        rows.append(f"| {model} | {label} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
        write(options, rows)
    for what, found_off, most in (("memory", off, 0.05), ("seconds", late, 0.2)):
        if found_off:
            near = sum(abs(one) <= most for one in found_off)
            rows += ["", f"{what}: {near} of {len(found_off)} within {most:.0%}; from {min(found_off):+.1%} to "
                         f"{max(found_off):+.1%}."]  # fmt: skip
            print(rows[-1], flush=True)
    write(options, rows)


def write(options: argparse.Namespace, rows: list[str]) -> None:
    """Write what there is of the table."""
    if options.output:
        options.output.write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a data set of instructions")
    parser.add_argument("--folder", type=Path, help="where the models go, and stay; default: temporary")
    parser.add_argument("--only", help="combinations whose words hold this")
    parser.add_argument("--first", type=int, default=0, help="leave out so many combinations")
    parser.add_argument("--no-time", action="store_true", help="plan memory alone")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with folder_of(options):
        report(options)


if __name__ == "__main__":
    main()
