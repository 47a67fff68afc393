"""The plan of a run, made before a weight is loaded: memory by cause, disk, time, operations."""

from __future__ import annotations

import shutil
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from weft.machine import memory, resident
from weft.models import Base
from weft.models.quantize import num_parameters
from weft.planning.library import growth
from weft.planning.memory import CAUSES, MemoryPlan, of_recording
from weft.planning.rehearsal import Material, Rehearsal, rehearsed
from weft.planning.timing import StepTime, times_of
from weft.training.fullest import fullest_step, pass_tokens
from weft.training.room import room_of
from weft.training.settings import RunConfig

# With check_memory: auto, smaller bases are not planned: their plan takes longer than what it could save.
_PLANNED_FROM = 100_000_000


@dataclass(frozen=True)
class JobPlan:
    """What is known of a job before it trains. ``tokens_per_step``: without virtual ones, as training counts them."""

    name: str
    method: str
    trainable: int
    _: KW_ONLY
    samples: int
    steps: int
    tokens_per_step: float


@dataclass(frozen=True)
class Plan:
    """What a run will take. Bytes, seconds, floating-point operations.

    Attributes:
        worst: the step that takes the most memory, and the tokens of its largest pass.
        longest: the tokens of the longest sample, below which no pass can be cut.
        room: the memory that there is for the run; None: the system does not say.
        disk: what two checkpoints and the adapters take; ``disk_free``: what the disk of the output has.
        time: seconds of a mean step, of the whole run, and operations per step; None: they were not asked for.
    """

    parameters: int
    device: str
    jobs: tuple[JobPlan, ...]
    _: KW_ONLY
    memory: MemoryPlan
    room: int | None
    worst: tuple[int, int]
    longest: int
    steps: int
    disk: int
    disk_free: int
    time: StepTime | None

    @property
    def fits(self) -> bool:
        """Whether the memory is there."""
        return self.room is None or self.memory.total <= self.room

    def json(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        found = asdict(self) | {"fits": self.fits}
        found["memory"] = {"total": self.memory.total, **self.memory.by_cause}
        found["worst"] = {"step": self.worst[0], "tokens": self.worst[1]}
        return found


def wants_plan(config: RunConfig, sketch: Base) -> bool:
    """Whether a run is planned before weights are loaded: as ``check_memory`` says; ``auto``: if its base is large."""
    asked = config.check_memory
    return asked is True or (asked == "auto" and num_parameters(sketch.model) >= _PLANNED_FROM)


def plan_of(made: Material, *, timed: bool = True) -> Plan:
    """The plan of a run; the sketch of its base is used up.

    Raises:
        UserError: As ``weft.training.run.prepare``.
    """
    parameters = num_parameters(made.sketch.model)
    return rehearsed(made, lambda rehearsal: _plan(rehearsal, parameters, timed=timed), record=timed)


def _plan(rehearsal: Rehearsal, parameters: int, *, timed: bool) -> Plan:
    config, device = rehearsal.made.config, rehearsal.device.type
    worst, largest = fullest_step(rehearsal.jobs)
    rehearsal.evaluation()
    sizes = rehearsal.sizes()
    middle = sorted(range(len(sizes)), key=sizes.__getitem__)[len(sizes) // 3]
    # The middling one first: it makes the optimizer's state, as a step before the fullest one does.
    numbers = dict.fromkeys((middle, worst))
    steps = [(sum(pass_tokens(rehearsal.jobs, one)), rehearsal.calls_of(one)) for one in numbers]
    found = of_recording(rehearsal.dry.recording, device)
    kept = rehearsal.made.kept
    library = rehearsal.made.resident + growth(None if kept is None else kept.kind) if device == "cpu" else 0
    own = {"weights": rehearsal.weight_bytes, "scales": rehearsal.scale_bytes, "adapters": rehearsal.adapter_bytes}
    own |= {"library": library}
    by_cause = {cause: (own | found).get(cause, 0) for cause in CAUSES}
    needed = room_of(rehearsal.jobs)
    return Plan(
        parameters,
        device,
        tuple(_job(rehearsal, number) for number in range(len(rehearsal.jobs))),
        memory=MemoryPlan(by_cause),
        room=room(device),
        worst=(worst, largest),
        longest=max(length for job in rehearsal.jobs for length in job.batches.lengths),
        steps=rehearsal.total_steps,
        disk=2 * needed.checkpoint + needed.adapters,
        disk_free=shutil.disk_usage(_there(config)).free,
        time=times_of(steps, sizes, rehearsal.total_steps, device) if timed else None,
    )


def room(device: str) -> int | None:
    """The bytes that a run could have: what is free, and what this process holds already."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    there = memory()
    return None if there is None else there[0] + resident()


def _there(config: RunConfig) -> Path:
    folder = Path(config.output_dir).absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _job(rehearsal: Rehearsal, number: int) -> JobPlan:
    job = rehearsal.jobs[number]
    sizes = rehearsal.step_sizes(job, virtual=False)
    return JobPlan(
        job.name, job.config.method, job.adapter.num_trainable(), samples=len(job.samples),
        steps=job.total_steps, tokens_per_step=sum(sizes) / max(1, len(sizes)),
    )  # fmt: skip
