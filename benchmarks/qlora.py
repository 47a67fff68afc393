"""QLoRA beside peft + bitsandbytes, on a Llama shape of random weights: memory and time of loading, and of a step.

    python benchmarks/qlora.py --shape 7b --folder /big/disk --tokens 512,2048 --output benchmarks/results/FILE.md

The model is written as ``streaming.py`` writes it. Every contestant loads it to NF4, quantised twice, in a process
of its own and trains LoRA (r 16, all linears, gradient checkpointing, AdamW) on one sequence a step. ``weft`` and
``peft bf16`` multiply in bfloat16, ``peft fp32`` in float32, which is what an expert takes on a CPU without
instructions for bfloat16. ``weft cheap`` has ``gradient_checkpointing: cheap``, and ``weft cheap disk`` besides
``offload_activations: disk``. Peak is VmHWM of the process. Reading is the time of reading the files once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from speed_setting import ALPHA, LEARNING_RATE, RANK, SHAPES, hand_over, peak_resident
from streaming import MORE, forget, placed, reading

CONTESTANTS = ("weft", "weft cheap", "weft cheap disk", "peft bf16", "peft fp32")


def train_peft(options: argparse.Namespace) -> None:
    """One cell of peft, in this process."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if options.contestant == "peft bf16" else torch.float32
    begun = time.perf_counter()
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        options.folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"}, trust_remote_code=False
    )
    loaded, peak_of_load = time.perf_counter() - begun, peak_resident()
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    rng, seconds = random.Random(0), []
    for _ in range(options.steps + 1):
        ids = torch.tensor([[rng.randrange(5, 1000) for _ in range(options.tokens)]])
        begun = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
    timed = seconds[1:] or seconds
    hand_over({
        "load": loaded, "peak_of_load": peak_of_load, "peak": peak_resident(), "seconds": sum(timed) / len(timed),
    })  # fmt: skip


def cell(options: argparse.Namespace, contestant: str, tokens: int) -> dict[str, Any]:
    """The result of one cell, from a process of its own."""
    name, *how = contestant.split()
    script, words = "qlora.py", ["--contestant", contestant]
    if name == "weft":
        script, words = "streaming.py", ["--kind", "nf4", "--plain", "--accumulate", "1"]
        words += [option for word, option in (("cheap", "--cheap"), ("disk", "--offload")) if word in how]
    command = [sys.executable, str(Path(__file__).with_name(script)), "--train", "--folder", str(options.folder),
               "--tokens", str(tokens), "--steps", str(options.steps), *words]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    last = next((line for line in done.stdout.splitlines()[::-1] if line.startswith("RESULT ")), None)
    if done.returncode or last is None:
        return {"failed": f"ended with {done.returncode}"}
    found: dict[str, Any] = json.loads(last.removeprefix("RESULT "))
    return found


def report(options: argparse.Namespace, size: int) -> None:
    """Run all cells and print the table."""
    files = sorted(options.folder.glob("*.safetensors"))
    once = reading(files)
    timed = f"means of {options.steps} steps after a first one" if options.steps else "the first step alone"
    rows = [
        f"# QLoRA of a Llama of the {options.shape} shape", "",
        f"`python {' '.join(sys.argv)}`, {datetime.date.today()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}. {size / 1e9:.2f} GB in bf16, read once in "
        f"{once:.1f} s. NF4 with double quantisation, LoRA of rank {RANK} on all linears, gradient checkpointing; "
        f"{timed}. Peak: VmHWM of the process, in GB.", "",
        "| contestant | tokens | peak | of loading | load, s | load / reading | step, s | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    print("\n".join(rows), flush=True)
    for tokens in map(int, options.tokens.split(",")):
        for contestant in options.contestants.split(","):
            forget(files)
            found = cell(options, contestant, tokens)
            if "failed" in found:
                rows.append(f"| {contestant} | {tokens:,} | {found['failed']} |" + " |" * 5)
            else:
                cells = [
                    f"{found['peak'] / 1e9:.2f}", f"{found['peak_of_load'] / 1e9:.2f}", f"{found['load']:.1f}",
                    f"{found['load'] / once:.1f}", f"{found['seconds']:.1f}", f"{tokens / found['seconds']:.2f}",
                ]  # fmt: skip
                rows.append(f"| {contestant} | {tokens:,} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
            if options.output:
                options.output.write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=[*SHAPES, *MORE])
    parser.add_argument("--folder", type=Path, help="where the model goes; default: temporary")
    parser.add_argument("--tokens", default="512,2048", help="tokens of a step")
    parser.add_argument("--steps", type=int, default=1, help="timed steps after a first one; 0: that one is timed")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--keep", action="store_true", help="do not delete the model")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        options.tokens = int(options.tokens)
        train_peft(options)
        return
    with placed(options, room=1.1) as size:
        report(options, size)


if __name__ == "__main__":
    main()
