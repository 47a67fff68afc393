"""DPO and GRPO: a prompt computed once against once for each answer, and TRL beside them; memory and steps per second.

    python benchmarks/preferences.py --data dpo_en.json --tokenizer DIR --shape 160m --output benchmarks/results/FILE.md

Real pairs, Llama-2's tokens, a Llama of random float32 weights, LoRA (r 16, all linears). Every contestant has a
process of its own. ``weft apart`` is Weft with the prompt computed for each answer. ``dpo`` is a whole step, reference
included; ``update`` the update of GRPO on eight answers to each prompt; ``grpo`` a whole step: eight answers are
written to each prompt, rewarded and learned from. ``ppo`` is a step of PPO with policy, reference, reward and value,
each an adapter or the base, and ``sft`` one of plain fine-tuning on as many texts of the same lengths. Pairs and
prompts are taken evenly from all, ordered by the length of the prompt. TRL: ``pip install "trl>=1.16,<1.17"``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from speed_setting import ALPHA, LEARNING_RATE, RANK, SHAPES, build_model, hand_over, peak_resident
from weft.api import Adapters
from weft.core.layout import Layout
from weft.data import Renderer, Sample
from weft.data.judged import JudgedRecipe
from weft.data.pipeline import Acceptance, outcomes
from weft.generation.engine import generate
from weft.generation.request import Request
from weft.generation.sampling import Sampling
from weft.heads.reward import RewardTask
from weft.models import describe
from weft.rewards import Rewarder, RewardSettings
from weft.training import Job, JobConfig
from weft.training.rolled import Ask, Written
from weft.training.rollouts import Roller, credited, group_of, roll_out, scorer
from weft.training.step import train_step

PAIRS, PROMPTS, GROUP, NEW = 4, 4, 8, 64
METHOD = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
CELLS = (
    ("dpo", "weft"), ("dpo", "weft apart"), ("dpo", "trl"), ("update", "weft"), ("update", "weft apart"),
    ("grpo", "weft"), ("grpo", "trl"), ("sft", "weft"), ("ppo", "weft"),
)  # fmt: skip


def pairs(options: argparse.Namespace, count: int, steps: int) -> list[Sample]:
    """Real pairs, cut to 1,024 tokens, of short and long prompts as in all of the file; so many for each step."""
    from transformers import AutoTokenizer

    renderer = Renderer(AutoTokenizer.from_pretrained(options.tokenizer), max_length=1024, truncation="right")
    found = [
        one.samples[0]
        for one in outcomes(options.data, JudgedRecipe(renderer=renderer))
        if isinstance(one, Acceptance)
    ]
    found.sort(key=lambda sample: sample.branches[0])
    total = count * steps
    spread = [found[(2 * i + 1) * len(found) // (2 * total)] for i in range(total)]
    return [sample for step in range(steps) for sample in spread[step::steps]]


def timed(step: Callable[[], object], steps: int) -> list[float]:
    """Seconds of each step after a first one."""
    found = []
    for _ in range(steps + 1):
        begun = time.perf_counter()
        step()
        found.append(time.perf_counter() - begun)
    return found[1:]


def job_for(adapters: Adapters, name: str, samples: Sequence[Sample], steps: int, **more: Any) -> Job:
    """A job of LoRA over these samples, of which a step has as many as ``batch_size``."""
    head = RewardTask() if more.get("objective") == "value" else None
    config = JobConfig(
        name=name, method="lora", method_settings=METHOD, steps=steps + 1, learning_rate=LEARNING_RATE, **more
    )
    adapter = adapters.add(name, config.method_config(), head=head)
    return Job(config, adapter, samples, shares_rows=True)


def weft(options: argparse.Namespace) -> dict[str, Any]:
    """One cell of Weft."""
    if options.contestant == "weft apart":
        Layout.can_share = lambda self, part: False  # type: ignore[method-assign]
    model = build_model(SHAPES[options.shape]).to(getattr(torch, options.dtype))
    adapters = Adapters(model, describe(model), checkpointing=options.checkpointing)
    steps = options.steps
    if options.cell == "dpo":
        samples = pairs(options, PAIRS, steps + 1)
        job = job_for(adapters, "lora", samples, steps, batch_size=PAIRS, objective="dpo")
        return {"seconds": timed(lambda: train_step(adapters, [job]), steps)}
    prompts = [one.each[0] for one in pairs(options, PROMPTS, 1)]
    prompts = [Sample(p.input_ids[: p.answer], [0.0] * (p.answer or 0), p.source) for p in prompts]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(5, 30_000, (GROUP, NEW), generator=generator).tolist() for _ in prompts]
    if options.cell == "sft":
        texts = [
            Sample([*p.input_ids, *ids], [*p.weights, *[1.0] * NEW], p.source)
            for p, group in zip(prompts, drawn, strict=True)
            for ids in group
        ]
        job = job_for(adapters, "lora", texts, steps, batch_size=PROMPTS * GROUP)
        return {"seconds": timed(lambda: train_step(adapters, [job]), steps)}
    settings = {"rewards": ["regex"], "num_generations": GROUP, "max_completion_length": NEW, "num_iterations": 1}
    objective = options.cell.replace("update", "grpo")
    jobs = [job_for(adapters, "lora", prompts, steps, batch_size=PROMPTS, objective=objective,
                    objective_settings=settings)]  # fmt: skip
    one = {"reward": "length", "max_tokens": NEW // 2, "slack": NEW}
    rewarder = Rewarder([RewardSettings.of(one)], {})
    if options.cell == "ppo":
        own = {"of": "lora", "num_iterations": 1}
        jobs.append(job_for(adapters, "value", prompts, steps, batch_size=PROMPTS, objective="value",
                            objective_settings=own))  # fmt: skip
        adapters.add("judge", jobs[0].config.method_config(), head=RewardTask()).requires_grad_(False)
        rewarder = Rewarder([RewardSettings.of({"adapter": "judge"})], {"judge": scorer(adapters, "judge")})
    roller = Roller(jobs[0], rewarder, lambda ids: "")
    roller.values = jobs[1] if len(jobs) > 1 else None

    def write(asks: Sequence[Ask]) -> list[Written]:
        requests = [Request(a.prompt, a.adapter, a.max_new_tokens, sampling=Sampling(a.temperature, seed=a.seed),
                            logprobs=0) for a in asks]  # fmt: skip
        done = generate(adapters, requests, stop_ids=[], batch_size=64)
        return [Written(tuple(c.ids), tuple(float(t.logprob or 0) for t in c.tokens), False, "") for c in done]

    def whole() -> None:
        roll_out(adapters, [roller], write)
        train_step(adapters, jobs)

    if options.cell != "update":
        return {"seconds": timed(whole, steps)}
    groups = [
        group_of(prompt, [Written(tuple(ids), (-1.0,) * NEW, True, "") for ids in group])
        for prompt, group in zip(prompts, drawn, strict=True)
    ]
    told = {"advantages": [torch.full((NEW,), 1.0 if n % 2 else -1.0) for n in range(PROMPTS * GROUP)]}
    rolled = credited(groups, [True] * (PROMPTS * GROUP), told)

    def update() -> None:
        jobs[0].rolled.put(jobs[0].progress.step, [rolled], {})
        train_step(adapters, jobs)

    return {"seconds": timed(update, steps)}


def trl(options: argparse.Namespace) -> dict[str, Any]:
    """One cell of TRL: the same texts, LoRA and optimizer."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    model = build_model(SHAPES[options.shape]).to(getattr(torch, options.dtype))
    samples = pairs(options, PAIRS, options.steps + 1) if options.cell == "dpo" else pairs(options, PROMPTS, 1)
    words = [
        {
            "prompt": tokenizer.decode(sample.input_ids[1 : sample.branches[0]]),
            **{key: tokenizer.decode(one.input_ids[sample.branches[0] : -1])
               for key, one in zip(("chosen", "rejected"), sample.each, strict=True)},
        }
        for sample in samples
    ]  # fmt: skip
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - self.begun)

    common = {
        "use_cpu": True, "report_to": "none", "max_steps": options.steps + 1, "bf16": False, "save_strategy": "no",
        "gradient_checkpointing": bool(options.checkpointing), "learning_rate": LEARNING_RATE, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        if options.cell == "dpo":
            args = DPOConfig(output_dir=folder, per_device_train_batch_size=PAIRS, max_length=1024, **common)
            trainer: Any = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(words),
                                      processing_class=tokenizer, peft_config=lora, callbacks=[Clock()])  # fmt: skip
            trainer.train()
            return {"seconds": times[1:]}
        args = GRPOConfig(output_dir=folder, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
                          max_completion_length=NEW, **common)  # fmt: skip

        def reward(completions: list[str], **_: Any) -> list[float]:
            return [float(len(text) % 7) for text in completions]

        begun = [time.perf_counter()]
        trainer = GRPOTrainer(model=model, reward_funcs=[reward], args=args, processing_class=tokenizer,
                              train_dataset=Dataset.from_list([{"prompt": w["prompt"]} for w in words]),
                              peft_config=lora)  # fmt: skip

        class Ends(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:  # answers are written before a step begins
                times.append(time.perf_counter() - begun[0])
                begun[0] = time.perf_counter()

        trainer.add_callback(Ends())
        begun[0] = time.perf_counter()
        trainer.train()
        return {"seconds": times[1:]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="pairs")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--shape", default="160m", choices=list(SHAPES))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="*", help="cells, as dpo:weft")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        hand_over((trl if options.contestant == "trl" else weft)(options) | {"peak": peak_resident()})
        return
    lines = [
        f"# Preferences and rollouts: the {options.shape} shape", "",
        f"`python {' '.join(sys.argv)}`, {datetime.date.today()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}. {PAIRS} pairs a step; {PROMPTS} prompts, "
        f"{GROUP} answers of {NEW} tokens each.", "",
        "| task | contestant | seconds per step, mean | all | peak, GB |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for cell, contestant in CELLS:
        if options.only and f"{cell}:{contestant}" not in options.only:
            continue
        given = [*sys.argv[1:], "--cell", cell, "--contestant", contestant]
        done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True, check=False)
        told = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not told:
            lines.append(f"| {cell} | {contestant} | failed | {done.stderr.strip().splitlines()[-1:]} | |")
        else:
            found = json.loads(told[-1].removeprefix("RESULT "))
            seconds = found["seconds"]
            each = ", ".join(f"{one:.2f}" for one in seconds)
            mean = sum(seconds) / len(seconds)
            lines.append(f"| {cell} | {contestant} | {mean:.2f} | {each} | {found['peak'] / 1e9:.2f} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
