"""What tuning makes the embedded base forget, what the stop rule keeps, and what general text in the data costs.

    python benchmarks/forgetting.py --output benchmarks/results/FILE.md

The recipe is recipes/forgetting_tiny-llama.yaml, once per seed; all its jobs share the passes of one base. To these
comes ``replay``: as ``mixed``, but the general text is what the base itself wrote. Forgetting is measured on 160
documents of the kind that the base was pre-trained on; exact match on 200 questions that no job has seen.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from weft.assets import instructions_path
from weft.evaluate.exact_match import answer_questions, exact_match, read_questions
from weft.foreign import read_yaml
from weft.generation.rollouts import writer
from weft.training import make_config
from weft.training.forgetting import draw_texts
from weft.training.run import Setup, train

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "forgetting_tiny-llama.yaml"
INSTRUCTIONS = "src/weft/assets/instructions/train.jsonl"


@dataclass(frozen=True)
class Row:
    """A job of one seed: exact match in %, nats per token forgotten by the weights that are kept, and the end."""

    job: str
    seed: int
    exact: float
    forgot: float
    forgot_last: float
    eval_loss: float
    best_eval_loss: float
    steps: int
    kept: int
    ended: str


def settings(folder: Path, seed: int, *, steps: int | None, own_text: Path | None) -> dict[str, Any]:
    """The recipe for one seed, with paths from the root."""
    values: Any = read_yaml(RECIPE)
    if own_text is not None:
        values["jobs"].append({"name": "replay", "data": f"0.7*{INSTRUCTIONS} + 0.3*{own_text}"})
    text = json.dumps(values).replace("src/weft/assets/", f"{ROOT}/src/weft/assets/")
    values = json.loads(text.replace("recipes/data/", f"{ROOT}/recipes/data/"))
    values |= {"output_dir": str(folder / f"seed-{seed}"), "seed": seed, "overwrite_output_dir": True}
    if steps:
        values["jobs"] = [{key: value for key, value in job.items() if key != "steps"} for job in values["jobs"]]
        values["steps"] = steps
    return values


def own_texts(folder: Path, count: int) -> Path:
    """A file of texts that the embedded base wrote, each once."""
    path, texts = folder / "own.jsonl", dict[str, None]()
    config = make_config(settings(folder, 0, steps=1, own_text=None) | {"jobs": [{"name": "it"}]})

    def write(setup: Setup) -> None:
        ask = writer(setup.adapters, setup.renderer)
        for seed in range(1, 200):
            if len(texts) < count:
                texts.update(dict.fromkeys(draw_texts(setup.adapters, setup.renderer, ask, seed=seed)))

    train(config, on_ready=write)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in [*texts][:count]))
    return path


def measure(folder: Path, seed: int, *, steps: int | None, own_text: Path | None) -> list[Row]:
    """The rows of one seed."""
    questions, answers = read_questions(instructions_path("eval")), {}

    def ask(setup: Setup) -> None:
        names = [None, *(job.name for job in setup.jobs)]
        answers.update(answer_questions(setup.adapters, setup.renderer, questions, names))

    config = make_config(settings(folder, seed, steps=steps, own_text=own_text))
    result = train(config, on_trained=ask, writer=writer)
    nothing = float("nan")
    rows = [Row("base", seed, 100 * exact_match(answers[None]), 0.0, 0.0, nothing, nothing, 0, 0, "")]
    for name, state in result.jobs.items():
        kept = state["step"] if state["best_at"] is None else state["best_at"]
        forgot = state["forgetting"] if state["best_at"] is None else state["forgetting_kept"]
        rows.append(
            Row(name, seed, 100 * exact_match(answers[name]), forgot, state["forgetting"], state["eval_loss"],
                state["best_eval_loss"], state["step"], kept, state["ended"])
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def mean(values: Sequence[float], form: str) -> str:
    """Mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):{form}} ± {error:{form.lstrip('+')}}"


def report(rows: Sequence[Row], command: str) -> str:
    """The table, and the cost of each cure beside ``plain``."""
    jobs = list(dict.fromkeys(row.job for row in rows))
    own = {job: [row for row in rows if row.job == job] for job in jobs}
    lines = [
        "# Forgetting on the embedded base",
        "",
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} thread, {len(own['plain'])} seeds "
        f"(mean ± standard error). `{command}`",
        "",
        "| job | exact match, % | forgot, nats per token | at the last step | held-out loss, best → last | steps | "
        "kept | ended |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for job, found in own.items():
        losses = [
            statistics.fmean(each) for each in zip(*((r.best_eval_loss, r.eval_loss) for r in found), strict=True)
        ]
        lines.append(
            f"| {job} | {mean([r.exact for r in found], '.1f')} | {mean([r.forgot for r in found], '+.3f')} | "
            f"{mean([r.forgot_last for r in found], '+.3f')} | "
            f"{f'{losses[0]:.3f} → {losses[1]:.3f}' if job != 'base' else '–'} | "
            f"{', '.join(str(r.steps) for r in found)} | "
            f"{', '.join(str(r.kept) for r in found)} | {', '.join(dict.fromkeys(r.ended for r in found))} |"
        )
    lines += ["", "| cure, beside plain | exact match by seed | change, points | forgetting by seed | of plain's |"]
    lines += ["|---|---|---|---|---|"]
    for job in [job for job in ("mixed", "mixed_longer", "replay") if job in own]:
        change = [one.exact - plain.exact for one, plain in zip(own[job], own["plain"], strict=True)]
        share = statistics.fmean(r.forgot for r in own[job]) / statistics.fmean(r.forgot for r in own["plain"])
        pairs = [f"{plain.exact:.1f} → {one.exact:.1f}" for one, plain in zip(own[job], own["plain"], strict=True)]
        lost = [f"{plain.forgot:+.3f} → {one.forgot:+.3f}" for one, plain in zip(own[job], own["plain"], strict=True)]
        losses = [
            statistics.fmean(each) for each in zip(*((r.best_eval_loss, r.eval_loss) for r in found), strict=True)
        ]
        lines.append(
            f"| {job} | {'; '.join(pairs)} | {mean(change, '+.1f')} | {'; '.join(lost)} | {100 * share:.0f} % |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the recipe for each seed and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of the recipe's, to try it out")
    parser.add_argument("--no-replay", action="store_true", help="leave out the job on the base's own texts")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        own_text = None if options.no_replay else own_texts(folder, 1200)
        rows = [
            row
            for seed in range(options.seeds)
            for row in measure(folder, seed, steps=options.steps, own_text=own_text)
        ]
    told = report(rows, f"python benchmarks/forgetting.py --seeds {options.seeds}")
    print(told)
    if options.output:
        options.output.write_text(told, encoding="utf-8")


if __name__ == "__main__":
    main()
