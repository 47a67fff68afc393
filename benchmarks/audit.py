"""How long does a whole audit of 50,000 records take, and how well are near duplicates found?

    python benchmarks/audit.py                       50,806 real records (WEFT_SHARED_DATA), or made-up ones without
    python benchmarks/audit.py --records 5000        fewer, to try it out
    python benchmarks/audit.py --out benchmarks/results/NAME.md

Reading, rendering, every check and the figures are timed apart, in one process; then each check alone.
Near duplicates are planted: records with some characters or words changed, whose similarity plain Python sets tell.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from weft.data import Renderer
from weft.data.auditing.audit import audit, audit_before_training
from weft.data.auditing.base import CHECKS, Facts, Item, Records
from weft.data.auditing.duplicates import SHINGLE, near, normalise
from weft.data.auditing.items import collect
from weft.data.auditing.statistics import statistics
from weft.data.pipeline import TextRecipe, outcomes
from weft.models.load import load_tokenizer

T = TypeVar("T")
FILES = ("sft/alpaca_en.json", "sft/huatuo_med_zh.json")
WORDS = [
    "the",
    "of",
    "river",
    "answer",
    "because",
    "people",
    "light",
    "water",
    "under",
    "seven",
    "house",
    "morning",
    "bread",
    "cold",
    "tea",
    "school",
    "bird",
    "tree",
]


def shared() -> Path:
    """Where the real data is, if it is."""
    return Path(os.environ.get("WEFT_SHARED_DATA", Path(__file__).parents[1].parent / "shared" / "data"))


def made_up(folder: Path, count: int) -> list[Path]:
    """Records of random words, of about Alpaca's lengths."""
    generator = random.Random(0)
    path = folder / "made_up.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            words = [generator.choice(WORDS) + str(generator.randrange(99)) for _ in range(generator.randrange(20, 90))]
            row = {"instruction": f"Question {number}: {' '.join(words[:15])}?", "output": " ".join(words[15:])}
            file.write(json.dumps(row) + "\n")
    return [path]


def timed(times: dict[str, tuple[float, float]], name: str, run: Callable[[], T]) -> T:
    """Run it and note wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    times[name] = (time.perf_counter() - wall, time.process_time() - cpu)
    return result


def shingles(text: str) -> set[str]:
    """The definition, in plain Python."""
    letters = "".join(c * 2 if "\u2e80" <= c < "\ufb00" else c for c in normalise(text))
    return {letters[i : i + SHINGLE] for i in range(max(1, len(letters) - SHINGLE + 1))}


def planted(texts: list[str], count: int) -> dict[str, float]:
    """Plant changed copies among the texts; how many of those at 0.8 and more are found, how many finds are right."""
    generator = random.Random(1)
    all_texts, pairs = list(texts), []
    for place in generator.sample(range(len(texts)), min(count, len(texts))):
        letters = list(texts[place])
        for _ in range(generator.randrange(1, max(2, len(letters) // 30))):
            at = generator.randrange(len(letters))
            letters[at : at + generator.randrange(3)] = generator.choice(texts[place])
        pairs.append((place, len(all_texts)))
        all_texts.append("".join(letters))
    similarity = {pair: _jaccard(all_texts[pair[0]], all_texts[pair[1]]) for pair in pairs}
    truth = {pair for pair, value in similarity.items() if value >= 0.8}
    found = {(pair.first, pair.second) for pair in near(all_texts)}
    right = sum(_jaccard(all_texts[a], all_texts[b]) >= 0.8 for a, b in found)
    return {
        "planted": len(pairs),
        "at 0.8 and more": len(truth),
        "between 0.80 and 0.85": sum(0.8 <= value < 0.85 for value in similarity.values()),
        "recall": len(truth & found) / max(len(truth), 1),
        "precision": right / max(len(found), 1),
    }


def _jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def measure(records: int | None, tokenizer: Any, files: list[Path]) -> dict[str, Any]:
    """All figures."""
    times: dict[str, tuple[float, float]] = {}
    renderer = Renderer(tokenizer, max_length=2048, truncate=True)
    unlimited = Renderer(tokenizer)
    items: list[Item] = []

    def read() -> None:
        for file in files:
            left = None if records is None else records - len(items)
            if left is None or left > 0:
                found = outcomes(file, TextRecipe(renderer=renderer, watched=True), limit=left)
                items.extend(collect(found, renderer, unlimited=unlimited)[0])

    begun = time.perf_counter()
    timed(times, "read and render", read)
    facts = Facts(renderer)
    findings = timed(times, "audit", lambda: audit(items, facts))
    timed(times, "figures", lambda: statistics(items, findings=findings))
    total = time.perf_counter() - begun
    samples = [sample for item in items for sample in item.samples]
    timed(times, "before training", lambda: audit_before_training(renderer, samples, [], "warn"))
    each: dict[str, tuple[float, float]] = {}
    held = Records(items, facts)
    for check in CHECKS.values():
        timed(each, check.code, lambda check=check: list(check.run(held)))  # type: ignore[misc]
    counts: dict[str, int] = {}
    for finding in findings:
        counts[finding.code] = counts.get(finding.code, 0) + 1
    texts = [item.text for item in items if item.text]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"records": len(items), "total": total, "times": times, "checks": each, "findings": counts,
            "near": planted(texts, 2000), "memory": memory}  # fmt: skip


def report(found: dict[str, Any], command: str) -> str:
    """The figures as Markdown."""
    lines = [f"# The audit of {found['records']:,} records", "", f"`{command}`, {date.today()}, {platform.machine()}, "
             f"{os.cpu_count()} cores, Python {platform.python_version()}", "", "| part | seconds | CPU seconds |",
             "|---|---|---|"]  # fmt: skip
    lines += [f"| {name} | {wall:.2f} | {cpu:.2f} |" for name, (wall, cpu) in found["times"].items()]
    lines += [
        f"| **in all** (without the last) | {found['total']:.2f} | |",
        "",
        f"Peak memory {found['memory']:.2f} GB.",
        "",
    ]
    slow = sorted(found["checks"].items(), key=lambda entry: -entry[1][0])[:8]
    lines += ["Slowest checks: " + ", ".join(f"{name} {wall:.2f} s" for name, (wall, _) in slow) + ".", ""]
    lines += ["Findings: " + ", ".join(f"{name} {count:,}" for name, count in found["findings"].items()) + ".", ""]
    lines += ["| near duplicates | |", "|---|---|"]
    for name, value in found["near"].items():
        lines.append(f"| {name} | {value if isinstance(value, int) else f'{value:.4f}'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--records", type=int, help="no more than these")
    parser.add_argument("--tokenizer", default="minimind", help="a folder of the real data, or an embedded model")
    parser.add_argument("--out", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    real = all((shared() / file).is_file() for file in FILES)
    with tempfile.TemporaryDirectory() as folder:
        files = [shared() / file for file in FILES] if real else made_up(Path(folder), options.records or 50_000)
        own = shared() / "tokenizers" / options.tokenizer
        tokenizer = load_tokenizer(str(own) if own.is_dir() else "tiny-llama")
        found = measure(options.records, tokenizer, files)
    command = "python benchmarks/audit.py" + (f" --records {options.records}" if options.records else "")
    text = report(found, command)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
