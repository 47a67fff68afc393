"""The search for settings by which a run fits into so much memory: of those that fit, the fastest.

Nothing that is searched changes what a run learns but the quantisation of its base: passes are cut with equal maths,
checkpointing computes the same numbers again, and weights that stay on the disk are the same weights. How long reading
them takes is not known, so that is the last resort.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import UserError
from weft.models.hub import folder_of
from weft.models.load import resolve_device, resolve_dtype, resolve_model
from weft.models.offload import check_offload, stored_dtype
from weft.planning.plan import Plan, plan_of
from weft.planning.rehearsal import Material
from weft.training.settings import RunConfig


@dataclass(frozen=True)
class Fit:
    """Settings by which a run fits, as keys of its configuration, and its plan with them."""

    settings: Mapping[str, Any]
    plan: Plan


def fit(made: Material, budget: int, known: Plan) -> Fit | None:
    """The fastest settings by which the run takes at most ``budget`` bytes; None: none of them do.

    ``known`` is the plan of the run as it is.

    Raises:
        UserError: As ``plan_of``.
    """
    found: list[Fit] = []
    layouts = list(_layouts(made))
    if not _can_fit(made, layouts[::-1], known.longest, budget):
        return None
    for settings in layouts:
        if found and "offload_param" in settings:
            break
        try:
            one = _largest_passes(made, settings, budget, known if not settings else None)
        except UserError:
            if not settings:
                raise
            continue  # a method that changes the base's own weights cannot use them quantised
        if one is None:
            continue
        found.append(one)
        if not one.settings.get("pack_tokens"):
            break  # what comes after it is slower
    if len(found) < 2:
        return found[0] if found else None
    timed = [Fit(one.settings, _plan(made, one.settings, timed=True)) for one in found]
    return min(timed, key=lambda one: one.plan.time.step if one.plan.time else 0.0)


def _layouts(made: Material) -> Iterator[dict[str, Any]]:
    """How the base can be kept and its activations treated, as far as it is left open: the fastest first."""
    config = made.config
    kept: list[dict[str, Any]] = [{}] if made.kept else [{}, {"quantization": "nf4"}]
    whole = {"gradient_checkpointing": True}
    trained: list[dict[str, Any]] = [{}]
    if not config.gradient_checkpointing:
        trained += [{"gradient_checkpointing": "cheap"}, whole]
    for base in kept:
        for way in trained:
            yield {**base, **way}
    if config.offload_param is None and _streams(config):
        for base in kept:
            if made.kept or base or _is_stored_so(config):
                yield {**base, **(whole if len(trained) > 1 else {}), "offload_param": "disk"}


def _streams(config: RunConfig) -> bool:
    """Whether the run's weights can stay on the disk."""
    try:
        check_offload(resolve_device(config.device), config.kept)
    except UserError:
        return False
    return True


def _is_stored_so(config: RunConfig) -> bool:
    """Whether the files hold the weights in the dtype of the run: others are not read block by block."""
    folder = folder_of(resolve_model(config.model))
    dtype = resolve_dtype(config.dtype)
    return folder is not None and dtype in ("auto", stored_dtype(folder))


def _can_fit(made: Material, layouts: Sequence[dict[str, Any]], longest: int, budget: int) -> bool:
    """Whether the run fits in the leanest of the layouts that it can have, with the smallest passes."""
    cut = {} if any(job.batch_tokens for job in made.config.jobs) else {"pack_tokens": longest}
    for settings in layouts:
        try:
            return _plan(made, {**settings, **cut}).memory.total <= budget
        except UserError:
            continue
    return False


def _largest_passes(made: Material, settings: dict[str, Any], budget: int, known: Plan | None) -> Fit | None:
    """The settings with passes as large as fit; None: not even passes of the longest sample alone do.

    What a pass takes grows with its tokens: between the largest and the smallest passes it is taken to lie on a line.
    """
    whole = known or _plan(made, settings)
    most, least = whole.worst[1], whole.longest
    if whole.memory.total <= budget:
        return Fit(settings, whole)
    if most <= least or any(job.batch_tokens for job in made.config.jobs):
        return None
    smallest = Fit({**settings, "pack_tokens": least}, _plan(made, {**settings, "pack_tokens": least}))
    spare = budget - smallest.plan.memory.total
    if spare < 0:
        return None
    share = spare / max(1, whole.memory.total - smallest.plan.memory.total)
    for part in (share, share / 2):
        cut = {**settings, "pack_tokens": int(least + part * (most - least))}
        if cut["pack_tokens"] > least and (plan := _plan(made, cut)).memory.total <= budget:
            return Fit(cut, plan)
    return smallest


def _plan(made: Material, settings: Mapping[str, Any], *, timed: bool = False) -> Plan:
    return plan_of(made.with_config(with_settings(made.config, settings)), timed=timed)


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The configuration with these settings; those of a job go to all jobs."""
    values = config.model_dump()
    for key, value in settings.items():
        if key in RunConfig.model_fields:
            values[key] = value
        else:
            for job in values["jobs"]:
                job[key] = value
    return RunConfig.model_validate(values)
