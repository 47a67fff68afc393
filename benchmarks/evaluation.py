"""Eight adapters of eight methods and their base on lm_eval's tasks: together, one after the other, and with peft.

    python benchmarks/evaluation.py --output benchmarks/results/evaluation_<hardware>_<date>.md

The tasks: multiple choice (MMLU, five examples before each question), generation (GSM8K, three examples, 48 tokens) and
perplexity (6,000 letters of pages of Wikipedia). ``weft together`` evaluates all nine in one process;
``weft NAME`` is one of them in a process of its own, as nine calls of the command line are; ``peft NAME`` is lm_eval
with its own model of transformers and peft, for the methods that peft has, on the same files. Every contestant gets the
same prompts, and lm_eval scores all of them. *all* counts from the start of the process, *evaluation* without imports
and loading. Needs ``pip install -e .[bench,harness]``. ``--shape tiny --items 4`` to try it out.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import json
import math
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from speed_setting import SHAPES, Shape, build_model, shared_data

# Eight methods, each with its defaults; what they need to be told stands here.
NAMES = ("lora", "adalora", "ia3", "vera", "prompt_tuning", "prefix_tuning", "bitfit", "bottleneck")
IN_PEFT = NAMES[:6]
SETTINGS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": 8},
    "prefix_tuning": {"num_virtual_tokens": 8},
    "bitfit": {"add_missing": True},
}
MORE_SHAPES = {"30m": Shape(384, 1024, 8, 6)}
TASKS = ("mmlu", "gsm8k", "wiki")


def make_files(folder: Path, shape: str, items: int, seed: int = 0) -> None:
    """The base, its adapters, and the tasks' questions, which all contestants read."""
    from transformers import AutoTokenizer

    from weft.api import Adapters
    from weft.methods import METHODS
    from weft.models import describe

    model = build_model((SHAPES | MORE_SHAPES)[shape]).float()
    model.config.max_position_embeddings = 2048
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(shared_data() / "tokenizers" / "llama2", trust_remote_code=False)
    tokenizer.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(seed)
    with Adapters(model, describe(model)) as adapters:
        for name in NAMES:
            adapter = adapters.add(name, METHODS[name](**SETTINGS.get(name, {})))
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
            adapters.save(name, folder / "adapters" / name, base_name=str(folder / "base"))
    make_tasks(folder, items, random.Random(seed))


def make_tasks(folder: Path, items: int, rng: random.Random) -> None:
    """The configurations and questions of the three tasks, with data of their own files."""
    data = shared_data()

    def write(name: str, rows: Iterable[object]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    with zipfile.ZipFile(data / "evaluation" / "mmlu.zip") as archive:
        for split, count in (("dev", 5), ("test", items)):
            text = archive.read(f"data/{split}/high_school_world_history_{split}.csv").decode()
            table = list(csv.reader(io.StringIO(text)))[:count]
            write(f"mmlu_{split}", [{"q": r[0], "choices": r[1:5], "answer": "ABCD".index(r[5])} for r in table])
    lines = (data / "evaluation" / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    write("gsm8k_dev", map(json.loads, lines[:3]))
    write("gsm8k_test", map(json.loads, lines[3 : 3 + items]))
    pages = (data / "text" / "wiki.txt").read_text(encoding="utf-8").splitlines()
    write("wiki_test", [{"text": page[:6000]} for page in rng.sample(pages, min(len(pages), max(1, items // 4)))])


def tasks(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """The tasks as lm_eval's files hold them."""

    def task(name: str, kind: str, metrics: list[str], **more: Any) -> dict[str, Any]:
        files = {split: str(folder / f"{name}_{split}.jsonl") for split in ("dev", "test")}
        files = {split: path for split, path in files.items() if Path(path).is_file()}
        shots = {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}} if "dev" in files else {}
        return {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "output_type": kind,
            "test_split": "test", "metric_list": [{"metric": metric} for metric in metrics], **shots, **more,
        }  # fmt: skip

    options = "\n".join(f"{letter}. {{{{choices[{i}]}}}}" for i, letter in enumerate("ABCD"))
    every = {
        "mmlu": task("mmlu", "multiple_choice", ["acc"], doc_to_text=f"{{{{q}}}}\n{options}\nAnswer:",
                     doc_to_choice=list("ABCD"), doc_to_target="answer", num_fewshot=5),
        "gsm8k": task("gsm8k", "generate_until", ["exact_match"], doc_to_text="Question: {{question}}\nAnswer:",
                      doc_to_target="{{answer}}", num_fewshot=3,
                      generation_kwargs={"until": ["Question:", "</s>"], "do_sample": False, "max_gen_toks": 48}),
        "wiki": task("wiki", "loglikelihood_rolling", ["byte_perplexity"], doc_to_text="", doc_to_target="{{text}}"),
    }  # fmt: skip
    return [every[name] for name in names]


def weft(folder: Path, names: list[str | None], chosen: list[str]) -> dict[str, Any]:
    """Some contestants, by Weft."""
    from weft.evaluate.harness import HarnessSettings, find_tasks, run_harness
    from weft.generation.open import open_target

    found = find_tasks(tasks(folder, chosen), HarnessSettings(bootstrap=0))
    alone = names[0] if len(names) == 1 else None
    # As on the command line: an adapter's folder opens its base.
    base = str(folder / "base")
    opened = {"target": folder / "adapters" / alone, "model": base} if alone else {"target": base}
    with open_target(**opened, dtype="float32") as target:
        names = [target.names[0]] if alone else names
        for name in names if alone is None else ():
            if name is not None:
                target.adapters.load(name, folder / "adapters" / name)
        begun = time.perf_counter()
        results = run_harness(target, names, found, max_rows=32 * len(names))
        seconds = time.perf_counter() - begun
    scores = {}
    for item in results.items:
        likelihoods = json.loads(item.output) if item.task == "mmlu" else []
        scores[f"{item.contestant} {item.task} {item.item}"] = {
            **item.scores, **{f"choice {i}": logprob for i, (logprob, _) in enumerate(likelihoods)}
        }  # fmt: skip
    return {"evaluation": seconds, "scores": scores}


def peft(folder: Path, name: str | None, chosen: list[str], batch: int) -> dict[str, Any]:
    """One contestant, by lm_eval's own model with peft."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    adapter = {} if name is None else {"peft": str(folder / "adapters" / name)}
    model = HFLM(pretrained=str(folder / "base"), dtype="float32", device="cpu", batch_size=batch, **adapter)
    begun = time.perf_counter()
    found = simple_evaluate(
        model=model, tasks=tasks(folder, chosen), task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    seconds = time.perf_counter() - begun
    scores = {}
    for task, samples in found["samples"].items():
        for one in samples:
            figures = {
                metric: math.exp(-one[metric][0] / one[metric][1]) if task == "wiki" else one[metric]
                for metric in one["metrics"]
            }
            likelihoods = one["filtered_resps"] if task == "mmlu" else []
            scores[f"{name or 'base'} {task} {one['doc_id']}"] = {
                **figures, **{f"choice {i}": logprob for i, (logprob, _) in enumerate(likelihoods)}
            }  # fmt: skip
    return {"evaluation": seconds, "scores": scores}


def cell(options: argparse.Namespace) -> None:
    """One process's part; its figures as one line."""
    torch.set_num_threads(options.threads)
    tool, _, who = options.cell.partition(" ")
    name = None if who == "base" else who
    if tool == "weft":
        found = weft(options.folder, [None, *NAMES] if who == "together" else [name], options.tasks)
    else:
        found = peft(options.folder, name, options.tasks, options.batch)
    print("RESULT " + json.dumps(found), flush=True)


def run_cell(which: str, options: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """The figures of a cell, with the seconds of its whole process; None: it failed, and why was printed."""
    given = ["--cell", which, "--folder", str(folder), "--threads", str(options.threads), "--batch", str(options.batch)]
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, *given, "--tasks", *options.tasks], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - begun
    told = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not told:
        print(f"{which} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}", flush=True)
        return None
    found = json.loads(told[-1].removeprefix("RESULT ")) | {"all": seconds}
    print(f"{which}: {seconds:.1f} s, of which evaluation {found['evaluation']:.1f} s", flush=True)
    return found


def unequal(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[int, int, float]:
    """Of the items of ``wanted``: how many, in how many a 0 or 1 is another one, and the largest other difference."""
    flips, worst = 0, 0.0
    for key, scores in wanted["scores"].items():
        own = found["scores"][key]
        for metric in scores.keys() & own.keys():
            if {own[metric], scores[metric]} <= {0.0, 1.0}:
                flips += own[metric] != scores[metric]
            else:
                worst = max(worst, abs(own[metric] - scores[metric]) / max(1.0, abs(scores[metric])))
    return len(wanted["scores"]), flips, worst


def report(cells: dict[str, dict[str, Any] | None], options: argparse.Namespace) -> str:
    """The table."""
    lines = [
        f"# Nine contestants evaluated: the {options.shape} shape", "",
        f"`python {' '.join(sys.argv)}`, {datetime.date.today()}, {options.threads} threads, torch "
        f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, float32; tasks: {', '.join(options.tasks)}; "
        f"{options.items} items.",
        "", "| who | seconds, all | evaluation alone | together is faster by (all) | (evaluation alone) |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    together = cells["weft together"]
    assert together is not None
    lines.append(f"| weft, nine together | {together['all']:.1f} | {together['evaluation']:.1f} | | |")
    for tool, members in (("weft", (*NAMES, "base")), ("peft", (*IN_PEFT, "base"))):
        own = [one for name in members if (one := cells.get(f"{tool} {name}")) is not None]
        if not own:
            continue
        scale = (len(NAMES) + 1) / len(own)  # to nine, where peft has not all of them
        sums = [sum(one[key] for one in own) * scale for key in ("all", "evaluation")]
        shown = f"{tool if tool == 'weft' else 'lm_eval + peft'}, {len(own)} one after the other"
        shown += "" if scale == 1 else f", times 9 / {len(own)}"
        ratios = [total / together[key] for total, key in zip(sums, ("all", "evaluation"), strict=True)]
        lines.append(f"| {shown} | {sums[0]:.1f} | {sums[1]:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    lines += ["", "| beside weft together | items | other outcomes (0 or 1) | largest other difference, relative |"]
    lines.append("|---|---|---|---|")
    for which, one in cells.items():
        if one is not None and which != "weft together":
            count, flips, worst = unequal(together, one)
            lines.append(f"| {which} | {count} | {flips} | {worst:.1e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="30m", choices=sorted(SHAPES | MORE_SHAPES))
    parser.add_argument("--items", type=int, default=32, help="questions of MMLU and GSM8K; a quarter of them pages")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=16, help="lm_eval's batch size")
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        cell(options)
        return
    names = [f"weft {name}" for name in ("together", "base", *NAMES)]
    names += [] if options.without_peft else [f"peft {name}" for name in ("base", *IN_PEFT)]
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder), options.shape, options.items)
        text = report({which: run_cell(which, options, Path(folder)) for which in names}, options)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
