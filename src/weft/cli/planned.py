"""The plan that ``weft train`` makes before weights are loaded, and what the run took beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weft.cli import common
from weft.errors import UserError, reason_of

if TYPE_CHECKING:
    from weft.models import Base
    from weft.planning.fit import Fit
    from weft.planning.plan import Plan
    from weft.planning.rehearsal import Material
    from weft.training.reader import JobData
    from weft.training.settings import RunConfig

# If a run takes a larger share of the memory, its fullest pass is made first; causes below that share are not told.
_TIGHT, _TOLD = 0.7, 0.05


class CannotFitError(Exception):
    """The run does not fit into memory. ``lines`` say by which settings it would."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def refused(error: CannotFitError, as_json: bool) -> int:
    """Tell that a run does not fit and what would make it fit; gives the exit code."""
    for line in error.lines:
        common.say(line)
    if as_json:
        common.print_json({"error": str(error)})
    return common.CANNOT_FIT


@dataclass
class Outlook:
    """Plans a run whose data has been read (``weft.training.run.OnRead``). ``plan`` is None until it has, or cannot."""

    tell: Callable[[str], None]
    plan: Plan | None = None

    def __call__(self, config: RunConfig, sketch: Base, data: Sequence[JobData]) -> bool:
        """Tell the plan; whether memory may run out.

        Raises:
            CannotFitError: The run does not fit.
            UserError: There is no plan for this run, and ``check_memory: true`` asks for one.
        """
        from weft.planning.plan import plan_of, wants_plan
        from weft.planning.rehearsal import material_of

        asked = config.check_memory
        if not wants_plan(config, sketch):
            return False
        try:
            made = material_of(config, sketch, data)
            self.plan = plan = plan_of(made)
        except Exception as error:
            # A run that works is worth more than its plan. What is wrong with the run itself, it says next.
            if asked is True:
                raise
            why = str(error) if isinstance(error, UserError) else reason_of(error)
            common.say(f"warning: this run is not planned, and whether it fits is not known: {why}")
            return False
        if not plan.fits:
            raise CannotFitError(list(_refusal(made, plan)))
        self.tell(told(plan))
        return plan.room is not None and plan.memory.total > _TIGHT * plan.room


def told(plan: Plan) -> str:
    """A plan in a line."""
    size, total = common.human_size, plan.memory.total
    causes = [f"{name} {size(count)}" for name, count in plan.memory.by_cause.items() if count > _TOLD * total]
    room = "" if plan.room is None else f" of {size(plan.room)}"
    time = plan.time and f"; about {common.duration(plan.time.step)} a step, {common.duration(plan.time.run)} in all"
    unknown = f"; not timed: {', '.join(plan.time.unknown)}" if plan.time and plan.time.unknown else ""
    return f"planned: {size(total)} of memory{room} at the fullest ({', '.join(causes)}){time or ''}{unknown}"


def _refusal(made: Material, plan: Plan) -> Iterator[str]:
    from weft.planning.fit import fit

    assert plan.room is not None
    yield told(plan)
    yield from verdict(plan, plan.room, there=False, better=fit(made, plan.room, plan), asked=False)
    yield "To train it all the same, where it may end when memory runs out: check_memory=false"


def verdict(plan: Plan, most: int | None, *, there: bool, better: Fit | None, asked: bool) -> Iterator[str]:
    """Whether it fits, and what would make it fit."""
    yield ""
    if there:
        yield "It fits."
        return
    assert most is not None
    words = f"It does not fit into {common.human_size(most)}"
    if better is None:
        yield f"{words}, with none of the settings that save memory. Take a smaller base or shorter texts (max_length)."
        return
    yield f"{words}. With these settings it takes {common.human_size(better.plan.memory.total)}:"
    pairs = {key: json.dumps(value).strip('"') for key, value in better.settings.items()}
    yield from (f"{key}: {value}" for key, value in pairs.items())
    yield "on the command line:  " + " ".join(shlex.quote(f"{key}={value}") for key, value in pairs.items())


def compared(plan: Plan | None, memory: int, step: float | None) -> dict[str, Any]:
    """What was planned beside what was measured: bytes at the fullest, and seconds of a step."""
    planned = {"memory": plan.memory.total, "step_seconds": plan.time and plan.time.step} if plan else None
    return {"planned": planned, "measured": {"memory": memory, "step_seconds": step}}


def comparison(figures: Mapping[str, Any]) -> str | None:
    """``compared`` in a line; None: nothing was planned."""
    planned, measured = figures["planned"], figures["measured"]
    if planned is None:
        return None
    size, line = common.human_size, f"memory: {common.human_size(planned['memory'])} planned"
    line += f", {size(measured['memory'])} measured"
    if planned["step_seconds"] and measured["step_seconds"]:
        times = common.duration(planned["step_seconds"]), common.duration(measured["step_seconds"])
        line += f"; a step: {times[0]} planned, {times[1]} measured"
    return line
