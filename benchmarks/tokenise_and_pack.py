"""How long does it take from a file to full packs, and how full are they?

    python benchmarks/tokenise_and_pack.py [--data DIR] [--tokenizer NAME] [--capacity 2048] [--limit N] [--json]

Reads, renders and packs Stanford Alpaca and LIMA (in ``WEFT_SHARED_DATA`` or ``--data``). Every phase is timed by
itself, in one process; then the way that a run takes (``load_samples``, with whatever it does to be quick, and the
batches of the first epoch) as a whole. Records longer than the capacity are cut, records with an empty answer left
out, as ``truncate: true`` and ``empty_answers: skip`` do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from weft.core.stream import Part
from weft.data import EmptyAnswerError, Renderer, Sample, load_samples, read_records, to_example
from weft.data.pack import fill, pack, pack_in_order
from weft.data.sources import Mixture
from weft.errors import UserError
from weft.layouts.building import build_stream
from weft.models.load import load_tokenizer
from weft.ops.attention import SequenceLayout
from weft.training import JobConfig
from weft.training.batches import Batches

SHARED = Path(os.environ.get("WEFT_SHARED_DATA") or Path(__file__).parents[2] / "shared/data")
FILES = {"alpaca": "sft/alpaca_en.json", "lima": "sft/lima.json"}


def timed(make: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    made = make()
    return made, time.perf_counter() - begun


def phases(path: Path, renderer: Renderer, limit: int | None) -> tuple[list[Sample], dict[str, float]]:
    """The samples of a file, and the seconds of each phase."""
    records, reading = timed(lambda: list(read_records(path, limit=limit)))

    def understand() -> list[Any]:
        found = []
        for record in records:
            try:
                found.append(to_example(record))
            except EmptyAnswerError:
                continue
        return found

    examples, understanding = timed(understand)
    samples, rendering = timed(lambda: [renderer.sample(example) for example in examples])
    return samples, {"read": reading, "recognise the format": understanding, "render and tokenise": rendering}


def padding(lengths: Sequence[int], batch: int = 8) -> float:
    """The share of pad tokens in padded batches of records as they come."""
    groups = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    return 1 - sum(lengths) / sum(len(group) * max(group) for group in groups)


def stream_padding(samples: Sequence[Sample], packs: Sequence[Sequence[int]]) -> float:
    """Share of the rows of the streams, which norms, linears and the head compute, that are no token of a record."""
    some = packs[:: max(1, len(packs) // 50)]
    parts = [[samples[i].input_ids for i in one] for one in some]
    rows = sum(len(build_stream([Part(None, ids)], {}, device=torch.device("cpu")).input_ids) for ids in parts)
    return 1 - sum(len(sequence) for ids in parts for sequence in ids) / rows


def attention_padding(lengths: Sequence[int], packs: Sequence[Sequence[int]]) -> float:
    """Share of rows that the CPU's attention adds by itself, for it takes sequences of similar lengths together."""
    some = packs[:: max(1, len(packs) // 50)]
    layouts = [SequenceLayout.build([lengths[i] for i in one]) for one in some]
    rows = sum(bucket.tokens.numel() for layout in layouts for bucket in layout.buckets)
    return 1 - sum(layout.tokens for layout in layouts) / rows


def spread(lengths: Sequence[int], packs: Sequence[Sequence[int]]) -> float:
    """How much of the variance of the records' (log) lengths lies between packs: 1 if each holds one length only."""
    logs = [math.log(length) for length in lengths]
    mean = statistics.fmean(logs)
    between = sum(len(one) * (statistics.fmean(logs[i] for i in one) - mean) ** 2 for one in packs)
    return between / sum((x - mean) ** 2 for x in logs)


def measure(name: str, path: Path, tokenizer: Any, capacity: int, limit: int | None) -> dict[str, Any]:
    renderer = Renderer(tokenizer, max_length=capacity, truncate=True)
    samples, seconds = phases(path, renderer, limit)
    lengths = [len(sample.input_ids) for sample in samples]
    order = Mixture((len(samples),)).order(0, 0)
    inside, packing = timed(lambda: pack_in_order([lengths[i] for i in order], capacity))
    packs = [[order[place] for place in one] for one in inside]
    assert sorted(i for one in packs for i in one) == list(range(len(samples)))
    decreasing, sorting = timed(lambda: pack(lengths, capacity))
    seconds["pack"] = packing
    rest = iter(order)
    chance = [[next(rest) for _ in one] for one in packs]

    def whole() -> Batches:
        loaded = load_samples(path, renderer, limit=limit, empty_answers="skip")
        return Batches(JobConfig(name="one", method="lora", batch_tokens=capacity, epochs=1), loaded)

    batches, taken = timed(whole)
    return {
        "data": name,
        "records": len(samples),
        "tokens": sum(lengths),
        "phases": seconds,
        "phases together": sum(seconds.values()),
        "as a run does it": taken,
        "steps of an epoch": batches.total_steps,
        "packs": len(packs),
        "fewest possible": math.ceil(sum(lengths) / capacity),
        "fill": fill(lengths, packs, capacity),
        "padding": stream_padding(samples, packs),
        "padding of padded batches of 8": padding(lengths),
        "rows that attention adds on a CPU": attention_padding(lengths, packs),
        "length told by the pack": spread(lengths, packs),
        "… by chance": spread(lengths, chance),
        "best-fit decreasing": {
            "seconds": sorting,
            "fill": fill(lengths, decreasing, capacity),
            "length told by the pack": spread(lengths, decreasing),
        },
    }


def show(found: dict[str, Any]) -> None:
    print(f"## {found['data']}: {found['records']:,} records, {found['tokens']:,} tokens")
    for phase, seconds in found["phases"].items():
        print(f"  {phase:<36}{seconds:8.2f} s")
    print(f"  {'together':<36}{found['phases together']:8.2f} s")
    print(f"  {'load_samples and batches, as a run':<36}{found['as a run does it']:8.2f} s")
    print(f"  {'packs (fewest possible)':<36}{found['packs']:8,} ({found['fewest possible']:,})")
    for key in ("fill", "padding", "padding of padded batches of 8", "rows that attention adds on a CPU"):
        print(f"  {key:<36}{100 * found[key]:8.2f} %")
    other = found["best-fit decreasing"]
    print(f"  {'length told by the pack':<36}{100 * found['length told by the pack']:8.1f} % "
          f"(by chance {100 * found['… by chance']:.1f} %)")  # fmt: skip
    print(f"  best-fit decreasing: {other['seconds']:.2f} s, fill {100 * other['fill']:.2f} %, length told by the pack "
          f"{100 * other['length told by the pack']:.1f} %")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="folder with sft/alpaca_en.json and sft/lima.json")
    parser.add_argument("--tokenizer", default=str(SHARED / "tokenizers/llama2"))
    parser.add_argument("--capacity", type=int, default=2048)
    parser.add_argument("--limit", type=int, help="read only so many records of each file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    missing = [str(args.data / file) for file in FILES.values() if not (args.data / file).is_file()]
    if missing:
        print(f"not there: {', '.join(missing)}; name the folder with --data", file=sys.stderr)
        return 1
    tokenizer, loading = timed(lambda: load_tokenizer(args.tokenizer))
    try:
        found = [measure(name, args.data / file, tokenizer, args.capacity, args.limit) for name, file in FILES.items()]
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    if args.json:
        print(json.dumps({"machine": machine, "tokenizer": loading, "results": found}, ensure_ascii=False))
        return 0
    print(f"{machine}; capacity {args.capacity}; tokenizer {Path(args.tokenizer).name} loaded in {loading:.2f} s")
    for one in found:
        show(one)
    return 0


if __name__ == "__main__":
    sys.exit(main())
