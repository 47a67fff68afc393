"""Which trials share a run: as many as the plan says fit into memory together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from weft.errors import UserError, reason_of
from weft.models.load import resolve_device
from weft.planning.plan import plan_of, room, wants_plan
from weft.planning.rehearsal import material
from weft.sweeps.trials import Trials

_log = logging.getLogger(__name__)
# The bytes that these trials take together.
Needs = Callable[[Sequence[str]], int]


def groups_of(trials: Trials, most: int | None) -> list[list[str]]:
    """The names of the trials of each run, in order; ``most`` in one (None: as many as fit).

    Raises:
        UserError: As ``weft.planning.rehearsal.material``, where the run is planned.
    """
    names = [trial.name for trial in trials.trials]
    most = len(names) if most is None else most
    planned = _planned(trials, names)
    found: list[list[str]] = []
    while names:
        count = min(most, len(names))
        if planned is not None and planned[1] is not None:
            count = _largest(names[:count], planned[0], planned[1])
        found.append(names[:count])
        names = names[count:]
    return found


def _largest(names: Sequence[str], needs: Needs, there: int) -> int:
    """How many of the names, from the first on, fit into ``there`` bytes; at least one, whose run says if it does not.

    A plan takes a while. So the number is guessed, as if all trials took the same, and then proved.
    """
    whole, count = needs(names), len(names)
    if whole <= there or count == 1:
        return count
    one = needs(names[:1])
    each = max(1.0, (whole - one) / (count - 1))
    count = min(count - 1, max(1, 1 + int((there - one) / each)))
    while count > 1 and needs(names[:count]) > there:
        count -= 1
    while 1 < count < len(names) - 1 and needs(names[: count + 1]) <= there:
        count += 1
    return count


def _planned(trials: Trials, names: Sequence[str]) -> tuple[Needs, int | None] | None:
    """What plans some of the trials, and the bytes that there are; None: nothing is planned."""
    folder = Path(trials.config.output_dir)
    config = trials.run(names, folder)
    if not wants_plan(config, config.sketch()):
        return None
    try:
        whole = material(config)
    except UserError as error:
        if config.check_memory is True:
            raise
        _log.warning("the sweep is not planned, and whether it fits is not known: %s", reason_of(error))
        return None
    data = dict(zip(names, whole.data, strict=True))

    def needs(some: Sequence[str]) -> int:
        made = whole.with_config(trials.run(some, folder))
        return plan_of(replace(made, data=[data[name] for name in some]), timed=False).memory.total

    return needs, room(resolve_device(config.device).type)
