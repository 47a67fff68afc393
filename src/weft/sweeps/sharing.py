"""Which trials share a run: as many as the plan says fit into memory together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from weft.errors import UserError, reason_of
from weft.sweeps.trials import Trials

_log = logging.getLogger(__name__)
# Whether these trials fit into memory together.
Fits = Callable[[Sequence[str]], bool]


def groups_of(trials: Trials, most: int | None) -> list[list[str]]:
    """The names of the trials of each run, in order; ``most`` in one (None: as many as fit).

    Raises:
        UserError: As ``weft.planning.rehearsal.material``, where the run is planned.
    """
    names = [trial.name for trial in trials.trials]
    most = len(names) if most is None else most
    fits = _planned(trials, names)
    found: list[list[str]] = []
    while names:
        count = _largest(names[:most], fits) if fits is not None else min(most, len(names))
        found.append(names[:count])
        names = names[count:]
    return found


def _largest(names: Sequence[str], fits: Fits) -> int:
    """How many of the names, from the first on, fit together; one is taken to fit, for the run itself says if not."""
    if fits(names):
        return len(names)
    low, high = 1, len(names)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(names[:middle]) else (low, middle)
    return low


def _planned(trials: Trials, names: Sequence[str]) -> Fits | None:
    """What plans some of the trials; None: nothing is planned."""
    from weft.planning.plan import plan_of, wants_plan
    from weft.planning.rehearsal import material

    config = trials.run(names, Path(trials.config.output_dir))
    if not config.check_memory or not wants_plan(config, config.sketch()):
        return None
    try:
        whole = material(config)
    except UserError as error:
        if config.check_memory is True:
            raise
        _log.warning("the sweep is not planned, and whether it fits is not known: %s", reason_of(error))
        return None
    data = dict(zip(names, whole.data, strict=True))

    def fits(some: Sequence[str]) -> bool:
        made = whole.with_config(trials.run(some, Path(config.output_dir)))
        return plan_of(replace(made, data=[data[name] for name in some]), timed=False).fits

    return fits
