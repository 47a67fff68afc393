"""Training over a base that stays on the disk: peak memory, seconds per step, and what reading the weights allows.

A random Llama of a shape is written to a folder, shard by shard through a mapped file, so that never more than a tensor
is in memory. Each cell trains it in a process of its own, by Weft's own jobs and steps: peak resident memory is that
process' (VmHWM, which counts mapped pages too, while they are in it). "Reading" is the time of reading all weights once
in the order of the files, before which the system was asked to forget them. A step reads them twice, forward and back;
its share of what reading allows is 2 x reading / step, and above 1 where the system had some in memory.

    python benchmarks/streaming.py --shape 13b --folder /big/disk --kinds bf16,nf4 --tokens 512,2048 --accumulate 1 \
        --output benchmarks/results/streaming_<hardware>_<date>.md
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speed_setting import ALPHA, LEARNING_RATE, RANK, SHAPES, Shape, hand_over, peak_resident

MORE = {"7b": Shape(4096, 11008, 32, 32), "13b": Shape(5120, 13824, 40, 40)}
_SHARD = 1 << 30  # bytes
_SPREAD = 0.02  # standard deviation of the weights


def tensors_of(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    """(name, sizes) of all tensors, in the order of the blocks."""
    d, wide = shape.hidden, shape.intermediate
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (shape.vocabulary, d))]
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        found += [(f"{at}.self_attn.{name}_proj.weight", (d, d)) for name in "qkvo"]
        found += [(f"{at}.mlp.{name}_proj.weight", (wide, d)) for name in ("gate", "up")]
        found += [(f"{at}.mlp.down_proj.weight", (d, wide))]
        found += [(f"{at}.{name}_layernorm.weight", (d,)) for name in ("input", "post_attention")]
    return [*found, ("model.norm.weight", (d,)), ("lm_head.weight", (shape.vocabulary, d))]


def write_model(folder: Path, shape: Shape) -> int:
    """Write the model in bf16, with the tokenizer of an embedded one; returns its bytes."""
    from transformers import AutoTokenizer, LlamaConfig

    from weft.assets import model_path

    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path("tiny-llama"), trust_remote_code=False).save_pretrained(folder)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, sizes in tensors_of(shape):
        count = 2 * int(np.prod(sizes))
        if held and held + count > _SHARD:
            shards.append([])
            held = 0
        shards[-1].append((name, sizes))
        held += count
    where, total = {}, 0
    generator = torch.Generator().manual_seed(0)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(folder / file, shard, generator)
        where |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_shard(path: Path, shard: list[tuple[str, tuple[int, ...]]], generator: torch.Generator) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, sizes in shard:
        begin, end = end, end + 2 * int(np.prod(sizes))
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    mapped = np.memmap(path, np.int16, "r+", 8 + len(text), (end // 2,))
    # The same million of numbers over and over, begun elsewhere in each row of pieces: drawing billions takes an hour.
    some = (torch.randn(1 << 20, generator=generator) * _SPREAD).bfloat16()
    for name, sizes in shard:
        begin, stop = (place // 2 for place in header[name]["data_offsets"])
        if len(sizes) == 1:
            mapped[begin:stop] = torch.ones(stop - begin).bfloat16().view(torch.int16).numpy()
            continue
        for at in range(begin, stop, len(some)):
            shift = int(torch.randint(len(some), (1,), generator=generator))
            piece = some.roll(shift)[: stop - at].view(torch.int16).numpy()
            mapped[at : at + len(piece)] = piece
        mapped.flush()
    os.posix_fadvise(os.open(path, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
    return end


def forget(files: list[Path]) -> None:
    """Ask the system to keep nothing of the files in memory."""
    for path in files:
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def reading(files: list[Path]) -> float:
    """Seconds of reading all of the files once, in large pieces, into memory that is used again."""
    forget(files)
    piece = memoryview(bytearray(16 << 20))
    begun = time.perf_counter()
    for path in files:
        number, at = os.open(path, os.O_RDONLY), 0
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := os.preadv(number, [piece], at):
            at += count
        os.close(number)
    return time.perf_counter() - begun


def train(options: argparse.Namespace) -> None:
    """One cell, in this process: load, ``--steps`` steps after a first one that is not timed, and what they took."""
    from weft.api import Adapters
    from weft.base.streaming import streaming_of
    from weft.data import Sample
    from weft.models import load_base
    from weft.training import Job, JobConfig
    from weft.training.loop import freed_memory_kept
    from weft.training.step import train_step

    begun = time.perf_counter()
    offload = None if options.plain else "disk"
    quantization = None if options.kind == "bf16" else options.kind
    base = load_base(
        str(options.folder), device="cpu", dtype="bfloat16", quantization=quantization, offload_param=offload
    )
    loaded, peak_of_load = time.perf_counter() - begun, peak_resident()
    adapters = Adapters(
        base.model, base.architecture, checkpointing="cheap" if options.cheap else True, offload_param=offload,
        offload="disk" if options.offload else None,
        offload_folder=str(options.folder.parent) if options.offload else None,
    )  # fmt: skip
    job_config = JobConfig(
        name="lora", method="lora", steps=options.steps + 1, batch_size=1, learning_rate=LEARNING_RATE,
        gradient_accumulation_steps=options.accumulate,
        method_settings={"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"},
    )  # fmt: skip
    adapter = adapters.add("lora", job_config.method_config())
    length = options.tokens // options.accumulate
    rng, samples = random.Random(0), []
    for number in range(options.accumulate * (options.steps + 1)):
        ids = [rng.randrange(5, base.token_rows) for _ in range(length)]
        samples.append(Sample(ids, [0.0] + [1.0] * (length - 1), f"text {number}"))
    job = Job(job_config, adapter, samples, [])
    seconds, waited, read = [], 0.0, 0
    with freed_memory_kept("cpu"):
        for step in range(options.steps + 1):
            if (streaming := streaming_of(base.model)) and step == 1:
                streaming.waited, streaming.bytes_read = 0.0, 0
            begun = time.perf_counter()
            train_step(adapters, [job])
            seconds.append(time.perf_counter() - begun)
    if streaming := streaming_of(base.model):
        counted = max(1, options.steps)
        waited, read = streaming.waited / counted, streaming.bytes_read // counted
    mean = sum(seconds[1:]) / options.steps if options.steps else seconds[0]
    hand_over({
        "load": loaded, "peak_of_load": peak_of_load, "peak": peak_resident(), "seconds": mean, "waited": waited,
        "read": read,
    })  # fmt: skip
    adapters.close()


def cell(options: argparse.Namespace, kind: str, tokens: int, *, plain: bool) -> dict[str, Any]:
    """The result of one cell, from a process of its own."""
    command = [
        sys.executable, __file__, "--train", "--folder", str(options.folder), "--kind", kind, "--tokens", str(tokens),
        "--steps", str(options.steps), "--accumulate", str(options.accumulate), *(["--plain"] if plain else []),
        *(["--cheap"] if options.cheap else []), *(["--offload"] if options.offload else []),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    last = next((line for line in done.stdout.splitlines()[::-1] if line.startswith("RESULT ")), None)
    if done.returncode or last is None:
        return {"failed": f"ended with {done.returncode}"}
    found: dict[str, Any] = json.loads(last.removeprefix("RESULT "))
    return found


def row(kind: str, tokens: int, found: dict[str, Any], *, plain: bool, once: float, size: float) -> str:
    """One line of the table; ``once`` are the seconds of reading the weights of ``size`` GB."""
    name = f"{kind}, {'in memory' if plain else 'from the disk'}"
    if "failed" in found:
        return f"| {name} | {tokens:,} | {found['failed']} |" + " |" * 8
    cells = [
        f"{found['peak'] / 1e9:.2f}", f"{found['peak_of_load'] / 1e9:.2f}", f"{found['load']:.1f}",
        f"{found['seconds']:.2f}", f"{tokens / found['seconds']:.1f}", f"{size:.2f}", f"{once:.1f}",
        "" if plain else f"{2 * once / found['seconds']:.2f}", "" if plain else f"{found['waited']:.2f}",
    ]  # fmt: skip
    return f"| {name} | {tokens:,} | {' | '.join(cells)} |"


def main() -> None:
    """Write the model if it is not there, print the table, and write it to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="tiny", choices=[*SHAPES, *MORE])
    parser.add_argument("--folder", type=Path, help="where the model and the quantised weights go; default: temporary")
    parser.add_argument("--kinds", default="bf16,nf4")
    parser.add_argument("--tokens", default="512,2048", help="tokens of a step")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step, each of tokens / this")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--beside", action="store_true", help="the same without offload too, where it fits")
    parser.add_argument("--keep", action="store_true", help="do not delete what was written")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cheap", action="store_true", help="recompute cheap operations alone")
    parser.add_argument("--offload", action="store_true", help="what is kept for the way back goes to the disk")
    options = parser.parse_args()
    if options.train:
        options.tokens = int(options.tokens)
        train(options)
        return
    with placed(options, room=1.4) as size:
        report(options, size)


@contextlib.contextmanager
def placed(options: argparse.Namespace, room: float) -> Iterator[int]:
    """The bytes of the model of ``options``, which is there inside; the disk must have ``room`` times as many free."""
    above = options.folder or Path(tempfile.mkdtemp())
    shape = {**SHAPES, **MORE}[options.shape]
    options.folder = above / f"llama-{options.shape}"
    size = sum(2 * int(np.prod(sizes)) for _, sizes in tensors_of(shape))
    above.mkdir(parents=True, exist_ok=True)
    if not options.folder.is_dir() and shutil.disk_usage(above).free < room * size:
        raise SystemExit(f"skipped: {above} has no room for {room * size / 1e9:.0f} GB.")
    os.environ["WEFT_CACHE_DIR"] = str(above / "cache")
    try:
        if not options.folder.is_dir():
            write_model(options.folder, shape)
        yield size
    finally:
        if not options.keep:
            for path in (options.folder, above / "cache"):
                shutil.rmtree(path, ignore_errors=True)


def report(options: argparse.Namespace, size: int) -> None:
    """Run all cells."""
    rows = [
        f"# A Llama of the {options.shape} shape, trained from the disk", "",
        f"`python {' '.join(sys.argv)}`, {datetime.date.today()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}. {size / 1e9:.2f} GB in bf16. LoRA of rank "
        f"{RANK} on all linears, gradient checkpointing, {options.accumulate} micro-batches a step; means of "
        f"{options.steps} steps after a first one. Peak: VmHWM of the process, in GB. Reading: all weights once from "
        "the disk. Share: 2 x reading / step. Waited: seconds of a step in which it stood still for the disk.", "",
        "| base | tokens | peak | of loading | load, s | step, s | tokens/s | files, GB | reading, s | share | wait |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    print("\n".join(rows), flush=True)
    for kind in options.kinds.split(","):
        for tokens in map(int, options.tokens.split(",")):
            for plain in (False, True) if options.beside else (False,):
                forget(sorted(options.folder.glob("*.safetensors")))
                found = cell(options, kind, tokens, plain=plain)
                # Quantised weights are there once the first cell has made them; the rest is read in bf16.
                files = sorted(options.folder.glob("*.safetensors"))
                kept = sorted((options.folder.parent / "cache" / "weights").glob(f"*-{kind}-*/*.safetensors"))
                weights = files if kind == "bf16" else kept
                once = reading(weights) if weights else 0.0
                total = sum(path.stat().st_size for path in weights) / 1e9
                rows.append(row(kind, tokens, found, plain=plain, once=once, size=total))
                print(rows[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
