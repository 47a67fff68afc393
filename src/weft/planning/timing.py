"""How long a step takes: every operator of a rehearsal is run for real, on tensors of its shapes.

The operators of one block come again in all the others, so some hundred calls stand for ten thousand. What each of
them took is kept for the next plan on this machine.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft import measured
from weft.machine import freed_memory_kept
from weft.planning.dry_run import Call, Shaped
from weft.planning.flops import flops_of

_UNKNOWN = -1.0
_ENOUGH, _MOST = 0.02, 5  # a call is timed until so many seconds have passed, at most so often


@dataclass(frozen=True)
class StepTime:
    """Seconds of a mean step and of all steps; the operations of matrix products in a mean step.

    ``unknown`` are the operators that could not be run by themselves, whose time is missing.
    """

    step: float
    run: float
    flops: float
    unknown: tuple[str, ...] = ()


def times_of(recorded: Sequence[tuple[int, list[Call]]], sizes: Sequence[int], steps: int, device: str) -> StepTime:
    """The times of a run of so many ``steps``, of which the first epoch's have these ``sizes`` in tokens.

    ``recorded`` are one or two of them, with what they call. What a step costs grows with its tokens: between the two
    it is taken to lie on a line.
    """
    known: dict[str, float] = measured.recall("calls")
    before = len(known)
    points = [(size, seconds_of(calls, known, device), flops_of(calls)) for size, calls in recorded]
    if len(known) > before:
        measured.keep("calls", known)
    mean = sum(sizes) / len(sizes)
    step, flops = (_on_line(mean, [(point[0], point[i]) for point in points]) for i in (1, 2))
    unknown = sorted({str(call.operator) for _, calls in recorded for call in calls if known[repr(call)] < 0})
    return StepTime(step, step * steps, flops, tuple(unknown))


def _on_line(at: float, points: list[tuple[float, float]]) -> float:
    (x, y), *rest = points
    if not rest or rest[0][0] == x:
        return y * at / x
    return y + (at - x) * (rest[0][1] - y) / (rest[0][0] - x)


def seconds_of(calls: Iterable[Call], known: MutableMapping[str, float], device: str) -> float:
    """The seconds that calls take here; what is not ``known`` is measured and put there, ``_UNKNOWN`` if it fails."""
    pool, total = _Pool(), 0.0
    with torch.no_grad(), freed_memory_kept(device):
        for call, count in Counter(calls).items():
            name = repr(call)
            if name not in known:
                known[name] = _measured(call, pool)
            total += max(0.0, known[name]) * count
    return total


def _measured(call: Call, pool: _Pool) -> float:
    args = tuple(pool.real(value) for value in call.arguments)
    options = {key: pool.real(value) for key, value in call.options}
    try:
        call.operator(*args, **options)
        spent: list[float] = []
        while sum(spent) < _ENOUGH and len(spent) < _MOST:
            begun = time.perf_counter()
            call.operator(*args, **options)
            if pool.cuda:
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - begun)
    except RuntimeError:
        return _UNKNOWN  # it asks for what only the real run has
    return min(spent)


class _Pool:
    """Real tensors like those of calls."""

    def __init__(self) -> None:
        self._made: dict[Shaped, Tensor] = {}
        self.cuda = False

    def real(self, value: Any) -> Any:
        """``value`` with real tensors in place of shapes."""
        if isinstance(value, Shaped):
            self.cuda |= value.device == "cuda"
            if value not in self._made:
                self._made[value] = _tensor(value)
            return self._made[value]
        return [self.real(one) for one in value] if isinstance(value, tuple) else value


def _tensor(like: Shaped) -> Tensor:
    span = 0
    if 0 not in like.shape:
        span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.strides, strict=True))
    made = torch.zeros(span, dtype=like.dtype, device=like.device)  # zeros are valid rows and positions
    if like.dtype.is_floating_point:
        made.normal_(0, 0.02)
    return made.as_strided(like.shape, like.strides)
