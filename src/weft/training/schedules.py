"""Learning-rate schedules: what the rate is multiplied with at each step. Names and options are transformers'.

The warm-up rises linearly, and its k-th of w steps has k/w of the rate, so that none is wasted; after it each schedule
has the factor that transformers gives. A schedule has no state: a resumed run asks for the same step again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from weft.errors import UserError

ScheduleName = Literal[
    "constant", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "inverse_sqrt",
    "warmup_stable_decay",
]  # fmt: skip


class Schedule(BaseModel):
    """Constant after the warm-up. Other schedules fall: they say how far at a share of the steps after it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str] = "constant"
    about: ClassVar[str] = "stays"

    def check(self, rate: float) -> None:
        """Refuse to end above the learning rate.

        Raises:
            UserError: It would.
        """
        for option in ("min_lr", "lr_end"):
            if (end := getattr(self, option, None)) is not None and end >= rate:
                raise UserError(
                    f"lr_scheduler_kwargs: {option} {end:g} is no less than the learning_rate, {rate:g}."
                )

    def factor(self, step: int, total: int, warmup: int, rate: float = 1.0) -> float:
        """The factor of the learning rate at ``step`` (from 0) of ``total``; ``rate`` is the job's own."""
        if step < warmup:
            return (step + 1) / warmup
        return self.after(step - warmup, max(1, total - warmup), warmup, rate)

    def after(self, step: int, steps: int, warmup: int, rate: float) -> float:
        """The factor at ``step`` of the ``steps`` after the warm-up."""
        return 1.0


class Linear(Schedule):
    """Falls to 0."""

    name = "linear"
    about = "falls to 0"

    def after(self, step: int, steps: int, warmup: int, rate: float) -> float:
        """1 - progress."""
        return max(0.0, 1.0 - step / steps)


class Cosine(Schedule):
    """Falls to 0 along half a period of a cosine (Loshchilov & Hutter 2017, without restarts)."""

    name = "cosine"
    about = "falls to 0 along half a cosine; `num_cycles` (0.5) periods"
    num_cycles: float = Field(0.5, gt=0)

    def after(self, step: int, steps: int, warmup: int, rate: float) -> float:
        """(1 + cos(2 pi cycles progress)) / 2."""
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * self.num_cycles * 2.0 * step / steps)))


class CosineWithRestarts(Schedule):
    """Falls to 0 along half a cosine and begins again (Loshchilov & Hutter 2017)."""

    name = "cosine_with_restarts"
    about = "falls so `num_cycles` (1) times, and begins again at the whole rate"
    num_cycles: int = Field(1, gt=0)

    def after(self, step: int, steps: int, warmup: int, rate: float) -> float:
        """(1 + cos(pi (cycles progress mod 1))) / 2."""
        progress = step / steps
        return 0.0 if progress >= 1 else 0.5 * (1.0 + math.cos(math.pi * ((self.num_cycles * progress) % 1.0)))


class CosineWithFloor(Cosine):
    """Falls along half a cosine to a floor."""

    name = "cosine_with_min_lr"
    about = "falls along half a cosine to `min_lr`, or to `min_lr_rate` of the rate"
    min_lr: float | None = Field(None, ge=0)
    min_lr_rate: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _one_floor(self) -> CosineWithFloor:
        if (self.min_lr is None) == (self.min_lr_rate is None):
            raise ValueError("cosine_with_min_lr needs one of min_lr and min_lr_rate")
        return self

    def after(self, step: int, steps: int, warmup: int, rate: float) -> float:
        """cosine (1 - floor) + floor."""
        floor = self.min_lr_rate if self.min_lr is None else self.min_lr / rate
        assert floor is not None
        return super().after(step, steps, warmup, rate) * (1.0 - floor) + floor


class Polynomial(Schedule):
    """Falls by a power of what is left."""

    name = "polynomial"
    about = "falls to `lr_end` (1e-7) with the `power` (1) of what is left"
    lr_end: float = Field(1e-7, ge=0)
    power: float = Field(1.0, gt=0)

    def after(self, step: int, steps: int, warmup: int, rate: float) -> float:
        """(1 - end) (1 - progress)^power + end."""
        end = self.lr_end / rate
        return (1.0 - end) * max(0.0, 1.0 - step / steps) ** self.power + end


class InverseSqrt(Schedule):
    """Falls with the root of the steps (Raffel et al. 2020); how many there are does not matter."""

    name = "inverse_sqrt"
    about = "falls with the root of the step, over `timescale` (the warm-up, or 10,000)"
    timescale: int | None = Field(None, gt=0)

    def after(self, step: int, steps: int, warmup: int, rate: float) -> float:
        """1 / sqrt(1 + step / timescale)."""
        return 1.0 / math.sqrt(1.0 + step / (self.timescale or warmup or 10_000))


class WarmupStableDecay(Schedule):
    """Stays, and falls at the end (Hu et al. 2024)."""

    name = "warmup_stable_decay"
    about = "stays, and falls in the last `num_decay_steps` (a tenth) to `min_lr_ratio` (0), `decay_type` (cosine)"
    num_decay_steps: int | None = Field(None, gt=0)
    num_stable_steps: int | None = Field(None, ge=0)
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "cosine"
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    num_cycles: float = Field(0.5, gt=0)

    def after(self, step: int, steps: int, warmup: int, rate: float) -> float:
        """1, then the decay to the floor."""
        decay = self.num_decay_steps or max(1, math.ceil((steps + warmup) / 10))
        stable = max(0, steps - decay) if self.num_stable_steps is None else self.num_stable_steps
        if step < stable:
            return 1.0
        progress = (step - stable) / decay
        if progress >= 1:
            return self.min_lr_ratio
        if self.decay_type == "linear":
            left = 1.0 - progress
        elif self.decay_type == "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * self.num_cycles * 2.0 * progress))
        else:
            left = 1.0 - math.sqrt(progress)
        return max(0.0, left * (1.0 - self.min_lr_ratio) + self.min_lr_ratio)


_ALL = (
    Schedule, Linear, Cosine, CosineWithRestarts, CosineWithFloor, Polynomial, InverseSqrt, WarmupStableDecay,
)  # fmt: skip
SCHEDULES: Mapping[str, type[Schedule]] = {one.name: one for one in _ALL}
