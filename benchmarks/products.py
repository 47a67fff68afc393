"""Linears in 16, 4 and 8 bits on this CPU: torch's or bitsandbytes' own product, and ours piece by piece in fp32.

bitsandbytes' for 8 bits is that of its training, which dequantises the weight, as ours does.

Both take turns in one run, over so many weights that none stays in the cache. Forward alone, and forward with the
gradient of the input, which is what training with adapters computes.

    python benchmarks/products.py --output benchmarks/results/products_<hardware>_<date>.md
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.ops import four_bit, packed, products

SHAPES = ((768, 2048), (2048, 2048), (2048, 5632))
_BYTES = 200_000_000  # of the weights of one shape
_SECONDS = 0.3  # of one round


def fastest(run: Callable[[int], object], count: int, rounds: int) -> float:
    """Milliseconds of one call: the fastest of some rounds over all weights, or over those that fit into the time."""
    best = float("inf")
    for _ in range(rounds + 1):
        begun, calls = time.perf_counter(), 0
        while calls < count and time.perf_counter() - begun < _SECONDS:
            run(calls)
            calls += 1
        best = min(best, (time.perf_counter() - begun) / calls)
    return best * 1e3


def trained(function: Callable[[Tensor, int], Tensor], x: Tensor) -> Callable[[int], object]:
    """Forward, and the gradient of x."""

    def run(number: int) -> None:
        given = x.detach().requires_grad_()
        y = function(given, number)
        y.backward(y.detach())

    return run


def main() -> None:
    """Print the table, and write it to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="1,8,16,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = [
        "# Linears in 16, 4 and 8 bits on a CPU", "",
        f"`python {' '.join(sys.argv)}`, {datetime.date.today()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}. Milliseconds, the fastest of "
        f"{options.rounds}; ratio: theirs / ours. Below eight rows ours is theirs.", "",
        "| weight | kept in | rows | forward, theirs | ours | ratio | and backward, theirs | ours | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for inner, outer in SHAPES:
        for kind, count, theirs, ours in contestants(inner, outer):
            for rows in map(int, options.rows.split(",")):
                x = torch.randn(rows, inner).bfloat16()
                cells = []
                for how in (plain, trained):
                    found = [fastest(how(function, x), count, options.rounds) for function in (theirs, ours)]
                    cells += [f"{found[0]:.2f}", f"{found[1]:.2f}", f"{found[0] / found[1]:.2f}"]
                lines.append(f"| {inner} x {outer} | {kind} | {rows} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plain(function: Callable[[Tensor, int], Tensor], x: Tensor) -> Callable[[int], object]:
    """Forward alone."""

    def run(number: int) -> Tensor:
        with torch.no_grad():
            return function(x, number)

    return run


Contestant = tuple[str, int, Callable[[Tensor, int], Tensor], Callable[[Tensor, int], Tensor]]


def contestants(inner: int, outer: int) -> Sequence[Contestant]:
    """(how it is kept, how many weights, theirs, ours)."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    count = max(2, _BYTES // (inner * outer * 2))
    dense = [torch.randn(outer, inner).bfloat16() for _ in range(count)]
    some: list[Any] = []
    for weight in dense[: max(2, count // 4)]:
        layer = Linear4bit(inner, outer, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.support_avx512bf16_for_cpu = False
        layer.load_state_dict({"weight": weight})
        some.append(layer.to("cpu"))

    eight: list[Any] = []
    for weight in dense[: max(2, count // 2)]:
        layer = Linear8bitLt(inner, outer, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight.data = weight
        eight.append(layer.to("cpu").train())
        eight[-1].init_8bit_state()

    def ours_of_eight(x: Tensor, number: int) -> Tensor:
        layer = eight[number]
        return packed.packed_linear(x, packed.EightBitRows(layer.weight.data, layer.state.SCB, x.dtype))

    def four(x: Tensor, number: int) -> Tensor:
        weight = some[number].weight
        if not packed.in_pieces(x, x.dtype):
            found: Tensor = some[number](x)
            return found
        return packed.packed_linear(x, four_bit.FourBitRows(weight.data, weight.quant_state, x.dtype))

    return [
        ("bfloat16", count, lambda x, i: nn.functional.linear(x, dense[i]), lambda x, i: products.linear(x, dense[i])),
        ("nf4", len(some), lambda x, i: some[i](x), four),
        ("int8", len(eight), lambda x, i: eight[i](x), ours_of_eight),
    ]


if __name__ == "__main__":
    main()
