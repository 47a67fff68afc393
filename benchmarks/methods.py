"""Every method with its defaults on both embedded bases: the figures of docs/methods.md.

    python benchmarks/methods.py                            all methods, one run per base
    python benchmarks/methods.py --sweep lora p_tuning      several learning rates of each, to choose defaults by
    python benchmarks/methods.py --speed                    tokens/s and memory of each method alone, beside LoRA

Methods train at once, one job each: jobs sharing a pass end as if alone (tests/contracts), so the table is that of
single runs and costs a fraction. Speed is measured apart, a method at a time, LoRA in between as the yardstick.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.assets import EMBEDDED_MODELS, instructions_path
from weft.core.adapters import Adapters
from weft.evaluate.exact_match import exact_match
from weft.evaluate.measure import Measure
from weft.files.adapter_folder import weights_path
from weft.methods import METHODS
from weft.objectives.passes import Work, forward_losses
from weft.training import make_config
from weft.training.run import Setup, prepare, train
from weft.training.step import train_step

STEPS, BATCH_SIZE = 800, 16
# What a method cannot do without on these bases, and nothing else: everything besides is the method's default.
NEEDED: dict[str, dict[str, Any]] = {"hard_prompt": {"prompt_text": "Answer the question in a few words."}}
RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
RESULTS = Path(__file__).parent / "results"


def jobs_of(methods: list[str]) -> list[dict[str, Any]]:
    """One job per method, with its defaults."""
    return [{"name": method, "method": method, **NEEDED.get(method, {})} for method in methods]


def config_of(model: str, jobs: list[dict[str, Any]], folder: str, steps: int, **more: Any) -> Any:
    """The run: 16 instructions a step, cosine, 5 % warm-up, and ``more`` settings."""
    return make_config(
        {
            "model": model,
            "data": str(instructions_path("train")),
            "output_dir": folder,
            "overwrite_output_dir": True,
            "steps": steps,
            "batch_size": BATCH_SIZE,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.05,
            "logging_steps": 100,
            "threads": 1,
            "jobs": jobs,
            **more,
        },
        source="benchmarks/methods.py",
    )


def measure(model: str, jobs: list[dict[str, Any]], steps: int, **more: Any) -> list[dict[str, Any]]:
    """Train all jobs at once, with ``more`` settings; a row of figures per job, the plain base first."""
    found = Measure()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(model, jobs, f"{folder}/run", steps, **more)
        begun = time.monotonic()
        result = train(config, on_ready=found.before, on_trained=found.after)
        rows = [{"job": None, "exact_match": exact_match(found.answers[None])}]
        for job in config.jobs:
            adapter = Path(folder) / "run" / "adapters" / job.name
            files = [p for p in adapter.rglob("*.safetensors")] or [weights_path(adapter)]
            rows.append(
                {
                    "job": job.name,
                    "method": job.method,
                    "settings": job.method_settings,
                    "learning_rate": job.learning_rate,
                    "parameters": found.parameters[job.name],
                    "file_bytes": sum(p.stat().st_size for p in files),
                    "exact_match": exact_match(found.answers[job.name]),
                    "text_loss_change": found.text_losses[job.name] - found.text_losses[None],
                    "ended": result.jobs[job.name]["ended"],
                }
            )
        print(f"{model}: {steps} steps of {len(jobs)} jobs in {time.monotonic() - begun:.0f} s")
    return rows


def speed(model: str, methods: list[str], rounds: int = 5, steps: int = 4) -> dict[str, dict[str, float]]:
    """Tokens/s of each method alone as a share of LoRA's, the two by turns; and the memory that it adds."""
    found: dict[str, dict[str, float]] = {}
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            pair = [prepare(config_of(model, jobs_of([m]), f"{folder}/{m}", 10_000)) for m in ("lora", method)]
            if not pair[1].jobs[0].parameters:
                continue
            ratios, rates = [], []
            for _ in range(rounds):
                seconds = []
                for setup in pair:
                    begun, tokens = time.process_time(), 0
                    for _ in range(steps):
                        (step,) = train_step(setup.adapters, setup.jobs).values()
                        tokens += step.tokens
                    seconds.append((time.process_time() - begun) / tokens)
                ratios.append(seconds[0] / seconds[1])
                rates.append(1 / seconds[1])
            found[method] = {
                "speed_of_lora": statistics.median(ratios),
                "tokens_per_cpu_second": statistics.median(rates),
                "training_mb": training_bytes(pair[1], method) / 2**20,
            }
            print(model, method, found[method])
    return found


def saved_bytes(adapters: Adapters, work: Work) -> int:
    """The bytes that one forward pass keeps for its backward pass without parameters: the activations of one step."""
    own = {p.untyped_storage().data_ptr() for p in adapters.model.parameters()}
    if work.adapter is not None:
        own |= {p.untyped_storage().data_ptr() for p in adapters[work.adapter].parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that no other tensor gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (loss,) = forward_losses(adapters, [work])
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def training_bytes(setup: Setup, name: str, samples: int = 16) -> int:
    """The memory that training one job adds to the base's: its numbers, gradients and two moments, and one step's
    activations, for the first ``samples`` samples."""
    job = next(job for job in setup.jobs if job.name == name)
    trained = sum(p.numel() * p.element_size() for p in job.parameters)
    batch = list(job.samples[:samples])
    work = Work(name, batch, 1, divisor=sum(map(job.adapter.head.loss_weight, batch)))
    return 4 * trained + (saved_bytes(setup.adapters, work) if trained else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="default: all")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--models", nargs="*", default=list(EMBEDDED_MODELS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES), help="multiples of the default")
    parser.add_argument("--set", nargs="*", default=[], help="settings of the swept method, key=value (JSON)")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    methods = arguments.methods or sorted(METHODS.keys() - {"trainable_tokens"})
    result: dict[str, Any] = {"steps": arguments.steps, "batch_size": BATCH_SIZE, "torch": torch.__version__}
    result |= {"date": date.today().isoformat(), "cpu": platform.processor() or platform.machine()}
    for model in arguments.models:
        if arguments.speed:
            result[model] = speed(model, methods)
        elif arguments.sweep:
            extra = {k: json.loads(v) for k, v in (pair.split("=", 1) for pair in arguments.set)}
            jobs = [
                {**job, **extra, "name": f"{method}-{rate:g}",
                 "learning_rate": METHODS[method].learning_rate(128) * rate}
                for method in methods for job in jobs_of([method]) for rate in arguments.rates
            ]  # fmt: skip
            result[model] = measure(model, jobs, arguments.steps)
        else:
            result[model] = measure(model, jobs_of(methods), arguments.steps)
        if not arguments.speed:
            for row in result[model]:
                rate = row.get("learning_rate") or 0
                print(f"  {row['job'] or 'base':28} lr {rate:<8.3g} exact {row['exact_match']:6.1%} "
                      f"base text {row.get('text_loss_change', 0):+.2f}")  # fmt: skip
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
