"""From how many tokens on a product in 16 bits is faster in fp32, the widening of its weight included.

Where a CPU has no instructions for 16 bits it always is. Where it has some, only measuring tells: a Xeon with AVX-512's
for bfloat16, without AMX, multiplies half as fast in them as in fp32 (``benchmarks/results/products_*``), and with AMX
several times as fast. What was measured is kept for all processes, so that a run that goes on multiplies as before (if
``WEFT_CACHE_DIR`` keeps nothing, each process measures for itself).
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from weft import measured
from weft.libraries import multiplies_sixteen_bits

_LOCK = threading.Lock()
_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# Rows that are tried, with a weight of so many rows and columns: not so small that calls take as long as products, nor
# so large that each is disturbed by what else runs on the machine.
_TRIED, _WIDTH = (128, 32), 1024
# A product may be a fifth slower in fp32: for each number of rows oneDNN makes a kernel, which takes 7 ms and 0.7 MB.
# Of several tries the best one counts, because what else runs hides gains; where instructions are fast, fp32 takes
# several times as long, and no disturbance feigns one.
_GAIN, _ROUNDS, _TRIES = 0.8, 9, 4


def faster_wide_from(device: torch.device, dtype: torch.dtype) -> float:
    """The tokens of a product in ``dtype`` from which on it goes in fp32; 1: always; ``math.inf``: never."""
    if device.type != "cpu" or dtype not in _KINDS:
        return math.inf
    return _faster_wide_from(dtype)


@functools.cache
def _faster_wide_from(dtype: torch.dtype) -> float:
    if not multiplies_sixteen_bits(torch.device("cpu"), dtype):
        return 1
    kind = _KINDS[dtype]
    with _LOCK:
        known = measured.recall("products")
        if kind in known:
            return known[kind] or math.inf
        # A thread of its own: what is asked within a pass that is recorded shall not be a part of it.
        with ThreadPoolExecutor(1) as own:
            found = float(own.submit(first_of_gain, functools.partial(_gain, dtype)).result())
        # What another process wrote meanwhile counts, so that both multiply alike.
        known = {kind: found} | measured.recall("products")
        measured.keep("products", known)
        return known[kind] or math.inf


def first_of_gain(gain: Callable[[int], float]) -> int:
    """The least number of rows, of those tried, from which on ``gain`` of them is large enough; 0: none is."""
    found = 0
    for rows in _TRIED:
        if gain(rows) < _GAIN:
            break
        found = rows
    return found


def _gain(dtype: torch.dtype, rows: int) -> float:
    """How many times as fast the product of so many rows is in fp32."""
    with torch.inference_mode():
        x, weight = torch.ones(rows, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype).t()
        wide = torch.empty(_WIDTH, _WIDTH, dtype=torch.float32)
        out = torch.empty(rows, _WIDTH, dtype=dtype)

        def widened() -> Tensor:
            return out.copy_(x.float() @ wide.copy_(weight.t()).t())

        def tried() -> float:
            pairs = [(_seconds(lambda: torch.mm(x, weight, out=out)), _seconds(widened)) for _ in range(_ROUNDS)]
            return min(plain for plain, _ in pairs) / min(wider for _, wider in pairs)

        return max(tried() for _ in range(_TRIES))


def _seconds(act: Callable[[], Tensor]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun
