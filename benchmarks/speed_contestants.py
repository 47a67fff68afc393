"""One contestant of ``train_speed.py``, in a process of its own:

    python benchmarks/speed_contestants.py CONTESTANT --shape 1.26b --steps 5 --seed 0

prints its figures as one line of JSON. Every contestant trains LoRA of rank 16 on all linear layers (``weft-5`` and
``weft-alone``: five methods) from the same weights on the same records.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import speed_setting as setting
from weft.api import Adapters
from weft.data import Sample
from weft.models.facts import describe

Batches = list[list[Sample]]
FIVE: dict[str, dict[str, Any]] = {
    "lora": {"r": setting.RANK, "lora_alpha": setting.ALPHA},
    "prefix_tuning": {"prefix_init": "random"},
    "prompt_tuning": {},
    "bitfit": {"add_missing": True},
    "bottleneck": {},
}


Moment = tuple[float, float]


def now() -> Moment:
    """Wall-clock and processor seconds (of all threads)."""
    return time.perf_counter(), time.process_time()


def timed(batches: Batches, ends: list[Moment], losses: list[float], model: nn.Module) -> dict[str, Any]:
    """A contestant's figures from the moments at which its steps ended; the first step warmed up."""
    return {
        "tokens": sum(len(s.input_ids) for batch in batches[1:] for s in batch),
        "seconds": ends[-1][0] - ends[1][0],
        "cpu_seconds": ends[-1][1] - ends[1][1],
        "step_seconds": [b[0] - a[0] for a, b in itertools.pairwise(ends)],
        "losses": losses,
        "parameters": setting.matmul_parameters(model),
        "peak_bytes": setting.peak_resident(),
    }


def run_weft(shape: setting.Shape, plan: setting.Plan) -> dict[str, Any]:
    """Weft's Trainer with one job."""
    model = setting.build_model(shape)
    with _adapters(model) as adapters:
        job = _job(adapters, "lora", FIVE["lora"], plan.shuffled, "lora")
        with torch.no_grad():
            for key, tensor in adapters["lora"].tensors().items():
                if "lora_A" in key:
                    tensor.copy_(setting.initial_adapter(key, tensor))
        ends, losses = _train(adapters, [job])
        return timed(plan.shuffled, ends, losses["lora"], model)


@contextlib.contextmanager
def _adapters(model: nn.Module) -> Iterator[Adapters]:
    """``Adapters`` that are closed afterwards."""
    adapters = Adapters(model, describe(model))
    try:
        yield adapters
    finally:
        adapters.close()


def _job(adapters: Adapters, method: str, settings: dict[str, Any], batches: Batches, name: str) -> Any:
    """A job that sees exactly ``batches``, in this order."""
    from weft.ops.seeds import stable_seed
    from weft.training import Job, JobConfig

    flat = [sample for batch in batches for sample in batch]
    config = JobConfig(
        name=name,
        method=method,
        method_settings=settings,
        batch_size=len(batches[0]),
        epochs=1,
        learning_rate=setting.LEARNING_RATE,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
    )
    # A job shuffles its samples; they are laid where its shuffle finds them in the wanted order.
    generator = torch.Generator().manual_seed(stable_seed(config.seed, "order", 0))
    order = torch.randperm(len(flat), generator=generator).tolist()
    samples: list[Sample] = list(flat)
    for place, sample in zip(order, flat, strict=True):
        samples[place] = sample
    return Job(config, adapters.add(name, config.method_config(), seed=0), samples)


def _train(adapters: Adapters, jobs: list[Any]) -> tuple[list[Moment], dict[str, list[float]]]:
    """Run to the end; the start and the end of each step, and the losses of each job."""
    from weft.training import Trainer

    ends = [now()]
    losses: dict[str, list[float]] = {job.name: [] for job in jobs}

    def note(event: Any) -> None:
        if event["event"] == "step":
            losses[event["job"]].append(event["loss"])
            if event["job"] == jobs[-1].name:
                ends.append(now())

    Trainer(adapters, jobs, logging_steps=1, on_event=note).run()
    return ends, losses


def run_five(shape: setting.Shape, plan: setting.Plan, together: bool) -> dict[str, Any]:
    """Five methods, each with batches of its own: in one pass, or one run after the other."""
    model = setting.build_model(shape)
    total = [(0.0, 0.0)] * (len(plan.shuffled) + 1)
    losses: dict[str, list[float]] = {}
    # Job j sees the batches rotated by j, so that five different batches of 8 share a step.
    turned = {m: [plan.shuffled[0], *_rotate(plan.shuffled[1:], i)] for i, m in enumerate(FIVE)}
    groups = [list(FIVE)] if together else [[method] for method in FIVE]
    for group in groups:
        with _adapters(model) as adapters:
            jobs = [_job(adapters, method, FIVE[method], turned[method], method) for method in group]
            ends, found = _train(adapters, jobs)
            total = [(t[0] + e[0], t[1] + e[1]) for t, e in zip(total, ends, strict=True)]
            losses |= found
    result = timed(plan.shuffled, total, [sum(step) / len(FIVE) for step in zip(*losses.values(), strict=True)], model)
    return {**result, "tokens": result["tokens"] * len(FIVE)}


def _rotate(batches: Batches, by: int) -> Batches:
    by %= len(batches)
    return batches[by:] + batches[:by]


def run_trainer(shape: setting.Shape, batches: Batches, expert: bool) -> dict[str, Any]:
    """transformers.Trainer with PEFT: its defaults, or with bf16 adapters (and, by ``batches``, length grouping)."""
    import tempfile

    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = setting.build_model(shape)
    parameters = setting.matmul_parameters(model)
    config = LoraConfig(
        r=setting.RANK, lora_alpha=setting.ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    tuned = get_peft_model(model, config, autocast_adapter_dtype=not expert)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_A" in name:
                parameter.copy_(setting.initial_adapter(name.replace(".default", ""), parameter))
    ends: list[Moment] = []
    losses: list[float] = []

    class Note(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            ends.append(now())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(now())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(batches[0]),
            num_train_epochs=1,
            learning_rate=setting.LEARNING_RATE,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",  # the order was fixed beforehand, the same for all
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        flat = [_features(sample) for batch in batches for sample in batch]
        Trainer(tuned, arguments, train_dataset=flat, data_collator=_collate, callbacks=[Note()]).train()
    return {**timed(batches, ends, losses, model), "parameters": parameters}


def _features(sample: Sample) -> dict[str, list[int]]:
    labels = [i if w else -100 for i, w in zip(sample.input_ids, sample.weights, strict=True)]
    return {"input_ids": sample.input_ids, "labels": labels}


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Right padding to the longest of the batch, as DataCollatorForSeq2Seq does."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["labels"]) + [0] * (width - len(row["labels"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def run_gemm(quick: bool) -> dict[str, Any]:
    """The machine's own bf16 matrix product, GFLOP/s per shape (best of several: what it can do when left alone)."""
    rates: dict[str, float] = {}
    for rows in (1024, 2048, 4096) if not quick else (64,):
        for out, inner in ((2048, 2048), (2048, 5632)):
            x, w = (torch.randn(n, inner, dtype=torch.bfloat16) for n in (rows, out))
            times = []
            for _ in range(12):
                start = time.perf_counter()
                torch.nn.functional.linear(x, w)
                times.append(time.perf_counter() - start)
            rates[f"{rows}x{inner}x{out}"] = 2 * rows * out * inner / min(times) / 1e9
    return {"rates": rates}


CONTESTANTS: dict[str, Callable[[setting.Shape, setting.Plan], dict[str, Any]]] = {
    "defaults": lambda shape, plan: run_trainer(shape, plan.shuffled, expert=False),
    "expert": lambda shape, plan: run_trainer(shape, plan.grouped, expert=True),
    "weft": run_weft,
    "weft-5": lambda shape, plan: run_five(shape, plan, together=True),
    "weft-alone": lambda shape, plan: run_five(shape, plan, together=False),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=[*CONTESTANTS, "gemm"])
    parser.add_argument("--shape", choices=setting.SHAPES, default="1.26b")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.contestant == "gemm":
        setting.hand_over(run_gemm(args.shape == "tiny"))
        return
    shape = setting.SHAPES[args.shape]
    setting.hand_over(CONTESTANTS[args.contestant](shape, setting.make_plan(shape.batch, args.steps, args.seed)))


if __name__ == "__main__":
    main()
