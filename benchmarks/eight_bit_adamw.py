"""AdamW with a state in 8 bits beside AdamW: the loss on held-out data, and the bytes of the state.

    python benchmarks/eight_bit_adamw.py [--output FILE]

Full fine-tuning, with three seeds, of an embedded base on its own instructions, and of stories260K on Alpaca: the same
data, order and learning rates. A state is quantised from 4,096 numbers of a tensor on, as bitsandbytes does, so the
norms and the biases keep theirs.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from methods_on_alpaca import SHARED, write_records
from weft.assets import instructions_path
from weft.objectives.passes import evaluate_loss
from weft.training import make_config
from weft.training.run import Setup, train

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")


def settings_of(task: str, folder: Path) -> dict[str, Any]:
    """The base and the data of a task."""
    if task == "alpaca":
        write_records(folder / "alpaca.json")
        return {
            "model": str(SHARED / "models" / "stories260K"), "data": str(folder / "alpaca.json"), "batch_size": 8,
            "max_length": 448, "truncation": "right", "eval_size": 100,
        }  # fmt: skip
    return {"model": task, "data": str(instructions_path("train")), "batch_size": 16,
            "eval_data": str(instructions_path("eval"))}  # fmt: skip


def measure(task: str, optimizers: list[str], seeds: int, steps: int) -> dict[str, list[tuple[float, int]]]:
    """For each optimizer and seed, the loss per learned token on held-out data and the bytes of the state."""
    found: dict[str, list[tuple[float, int]]] = {}

    def after(setup: Setup) -> None:
        for job in setup.jobs:
            loss = evaluate_loss(setup.adapters, job.name, job.eval_samples)
            found.setdefault(job.name.rpartition("-")[0], []).append((loss, state_bytes(job.optimizer)))

    for name in optimizers:
        with tempfile.TemporaryDirectory() as folder:
            jobs = [
                {"name": f"{name}-{seed}", "method": "full", "optimizer": name, "seed": seed} for seed in range(seeds)
            ]
            config = make_config(
                {
                    **settings_of(task, Path(folder)), "output_dir": f"{folder}/run", "steps": steps,
                    "warmup_ratio": 0.05, "threads": 2, "jobs": jobs,
                },
                source="benchmarks/eight_bit_adamw.py",
            )  # fmt: skip
            train(config, on_trained=after)
    return found


def state_bytes(optimizer: Any) -> int:
    """The bytes of an optimizer's state; the table of levels, which all parameters share, counts once."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    tensors = {value.data_ptr(): value for value in values if isinstance(value, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=["tiny-llama", "alpaca"])
    parser.add_argument("--optimizers", nargs="*", default=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = [
        "# AdamW with a state in 8 bits", "",
        f"`python {' '.join(sys.argv)}`, {datetime.date.today()}, torch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}. Full fine-tuning, {options.steps} steps, {options.seeds} seeds; "
        "loss per learned token on held-out data.", "",
        "| task | optimizer | loss, mean of the seeds | against AdamW | the seeds apart | state, MB | share |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for task in options.tasks:
        found = measure(task, options.optimizers, options.seeds, options.steps)
        plain = found[options.optimizers[0]]
        mean = statistics.mean(loss for loss, _ in plain)
        for name, figures in found.items():
            loss = statistics.mean(loss for loss, _ in figures)
            apart = ", ".join(f"{one / other - 1:+.2%}" for (one, _), (other, _) in zip(figures, plain, strict=True))
            size, whole = figures[0][1], plain[0][1]
            lines.append(f"| {task} | {name} | {loss:.4f} | {loss / mean - 1:+.2%} | {apart} | {size / 1e6:.2f} | "
                         f"{size / whole:.3f} |")  # fmt: skip
            print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
