"""``weft plan``: will it fit, and how long will it take? Loads no weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, early, options
from weft.cli.planned import verdict

if TYPE_CHECKING:
    from weft.planning.plan import Plan
    from weft.training.settings import RunConfig


def plan(
    config: options.Config = None,
    model: Annotated[str | None, typer.Option(help=options.meaning("model"))] = None,
    data: Annotated[str | None, typer.Option(help=options.meaning("data"))] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method; repeat it to plan several at once.")] = None,
    fit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Search the fastest settings that take at most this, as 8GB.")
    ] = None,
    no_time: Annotated[
        bool, typer.Option("--no-time", help="Plan memory alone; nothing is timed on this machine.")
    ] = False,
    as_json: options.Json = False,
) -> int:
    """Show what a run will take: memory by cause, disk, time. Loads no weights.

    weft plan run.yaml

    weft plan --model DIR --data FILE --method lora --fit 8GB

    Leaves with code 3 if the run does not fit, and says by which settings it would.
    """
    early.refuse(lambda: _check(list(config or []), model, data, method, fit))
    settings, budget = _check(list(config or []), model, data, method, fit)
    from weft.planning.fit import fit as search
    from weft.planning.plan import plan_of
    from weft.planning.rehearsal import material

    if settings.shape == "full":
        common.tell_hub(settings.model)
    made = material(settings)
    found = plan_of(made, timed=not no_time)
    most = budget if budget is not None else found.room
    there = most is None or found.memory.total <= most
    better = None if there or most is None else search(made, most, found)
    if as_json:
        told = {"settings": dict(better.settings), "plan": better.plan.json()} if better else None
        common.print_json({"model": settings.model, **found.json(), "budget": most, "fits": there, "fit": told})
    else:
        for line in lines_of(found, settings, most):
            print(line)
        for line in verdict(found, most, there=there, better=better, asked=budget is not None):
            print(line)
    return common.DONE if there or (better is not None and budget is not None) else common.CANNOT_FIT


def _check(
    words: list[str], model: str | None, data: str | None, method: list[str] | None, fit: str | None
) -> tuple[RunConfig, int | None]:
    """The settings, if what they name is there, and the budget."""
    from weft.cli.train import settings_of
    from weft.models.load import resolve_model
    from weft.planning.sizes import size_of
    from weft.training.checks import check_names

    flags: dict[str, Any] = {"model": model, "data": data}
    flags |= {"method": None if not method else method[0] if len(method) == 1 else method}
    budget = None if fit is None else size_of(fit)
    settings = settings_of(words, {key: value for key, value in flags.items() if value is not None})
    resolve_model(settings.model)
    check_names(settings)
    return settings, budget


def lines_of(plan: Plan, settings: RunConfig, room: int | None) -> Iterator[str]:
    """The plan as people read it."""
    from weft.planning.memory import CAUSES

    yield f"{settings.model}: {plan.parameters:,} parameters, on {plan.device}"
    for job in plan.jobs:
        share = 100 * job.trainable / (plan.parameters + job.trainable)
        yield (
            f"{job.name} ({job.method}): {job.trainable:,} trainable ({share:.4f} %), {job.samples:,} samples, "
            f"{job.steps:,} steps of {job.tokens_per_step:,.0f} tokens"
        )
    yield ""
    yield f"memory at the fullest (step {plan.worst[0] + 1:,}, a pass of {plan.worst[1]:,} tokens)"
    for cause, count in plan.memory.by_cause.items():
        if count:
            yield f"  {cause:<12}{common.human_size(count):>10}   {CAUSES[cause]}".rstrip()
    yield f"  {'in all':<12}{common.human_size(plan.memory.total):>10}" + (
        f"   of {common.human_size(room)}" if room is not None else ""
    )
    disk, free = common.human_size(plan.disk), common.human_size(plan.disk_free)
    yield f"disk: {disk} for two checkpoints and the adapters, {free} free"
    if plan.time is not None:
        yield (
            f"time: about {common.duration(plan.time.step)} a step, {common.duration(plan.time.run)} for all steps; "
            f"{plan.time.flops / 1e9:,.0f} GFLOP a step"
        )
        if plan.time.unknown:
            yield f"not timed: {', '.join(plan.time.unknown)}"
