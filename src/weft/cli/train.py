"""``weft train``: one base, one or many jobs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, early, options
from weft.cli.planned import CannotFitError, Outlook, compared, comparison, refused
from weft.cli.progress import not_reached, opening
from weft.cli.session import Session
from weft.errors import UserError
from weft.extensions import loaded_files

if TYPE_CHECKING:
    from weft.models.reach import Omission
    from weft.training.loop import TrainResult
    from weft.training.run import Setup
    from weft.training.settings import RunConfig

# What is known of a job, of an event or of a run, as JSON holds it.
Figures = Mapping[str, Any]


def train(
    config: options.Config = None,
    model: Annotated[str | None, typer.Option(help=options.meaning("model"))] = None,
    data: Annotated[str | None, typer.Option(help=options.meaning("data"))] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method; repeat it to train several at once.")] = None,
    output_dir: Annotated[str | None, typer.Option(help=options.meaning("output_dir"))] = None,
    shape: Annotated[str | None, typer.Option(help=options.meaning("shape"))] = None,
    resume: Annotated[bool, typer.Option("--resume", help=options.meaning("resume"))] = False,
    overwrite_output_dir: Annotated[
        bool, typer.Option("--overwrite-output-dir", help=options.meaning("overwrite_output_dir"))
    ] = False,
    as_json: options.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only warnings and the result.")] = False,
) -> int:
    """Train one or many adapters over one base.

    weft train run.yaml learning_rate=1e-3

    weft train --model DIR --data FILE --method lora --method prefix_tuning r=16
    """
    flags: dict[str, Any] = {"model": model, "data": data, "output_dir": output_dir}
    flags |= {"method": None if not method else method[0] if len(method) == 1 else method}
    flags |= {"shape": shape, "resume": resume or None, "overwrite_output_dir": overwrite_output_dir or None}
    given = {key: value for key, value in flags.items() if value is not None}
    if config and _has_stages(config[0]):
        return _run_stages(config or [], given, as_json=as_json, quiet=quiet)
    session = Session(quiet=quiet)
    with session.open():
        early.refuse(lambda: _check(config or [], given))
        settings = settings_of(config or [], given)
        return _run(settings, session, as_json=as_json, quiet=quiet)


def _has_stages(word: str) -> bool:
    """Whether this is a file with stages. What cannot be read is left to whoever reads it next."""
    from weft.foreign import read_yaml
    from weft.paths import local_path

    path = local_path(word)
    if "=" in word or not path.is_file():
        return False
    try:
        values = read_yaml(path)
    except UserError:
        return False
    return isinstance(values, dict) and "stages" in values


def _run_stages(words: list[str], flags: Mapping[str, Any], *, as_json: bool, quiet: bool) -> int:
    """The runs of a file with stages, one after the other; those that are done are left out with --resume."""
    from weft.training.checks import check_places
    from weft.training.reader import data_files
    from weft.training.stages import read_stages

    stages = read_stages(words[0], words[1:], flags=flags)
    for stage in stages:  # hours may lie between the first and the last
        check_places(stage.config)
        data_files(stage.config)
    for stage in stages:
        if stage.config.resume and stage.done:
            common.say(f"stage {stage.name} is done: {stage.config.output_dir}")
            continue
        common.say(f"stage {stage.name}")
        session = Session(quiet=quiet)
        with session.open():
            code = _run(stage.config, session, as_json=as_json, quiet=quiet)
        if code != common.DONE:
            return code
    return common.DONE


def _check(words: list[str], flags: Mapping[str, Any]) -> None:
    from weft.training.checks import check_names, check_places

    settings = settings_of(words, flags)
    check_places(settings)
    check_names(settings)


def settings_of(words: list[str], flags: Mapping[str, Any]) -> RunConfig:
    """The settings that the command line gives.

    Raises:
        UserError: They are none.
    """
    from weft.training.config import config_of

    file = words[0] if words and "=" not in words[0] else None
    overrides = words[1:] if file else words
    stray = next((word for word in overrides if "=" not in word), None)
    if stray is not None:
        raise UserError(f"{stray!r} is not of the form key=value. Only the first word may be a file.")
    if not words and not flags:
        raise UserError("nothing to train: give a CONFIG.yaml, or --model, --data and --method.")
    return config_of(file, overrides, flags=flags, source="command line")


def _run(settings: RunConfig, session: Session, *, as_json: bool, quiet: bool) -> int:
    from weft.generation.rollouts import writer
    from weft.training.memory import peak_memory
    from weft.training.run import train as run_training

    if settings.shape == "full":
        common.tell_hub(settings.model)
    jobs: list[dict[str, Any]] = []
    say: Callable[[str], None] = common.say if as_json else print
    outlook = Outlook(say if not quiet else lambda line: None)
    measured: list[int] = []

    def ready(setup: Setup) -> None:
        missed = not_reached(setup)
        jobs.extend(_facts(setup, missed))
        if busy := _busy(setup):
            common.say(busy)
        if not quiet:
            for line in opening(setup, missed):
                say(line)
        session.begin(setup.jobs)

    def trained(setup: Setup) -> None:
        measured.append(peak_memory(setup.adapters.device))

    try:
        result = run_training(
            settings, on_event=session.event, should_stop=session.should_stop, on_read=outlook, on_ready=ready,
            on_trained=trained, writer=writer,
        )  # fmt: skip
    except CannotFitError as error:
        session.close()
        return refused(error, as_json)
    session.close()
    summary = _summary(settings, result, jobs)
    if measured:
        longest = max(result.jobs.values(), key=lambda state: int(state["step"]))
        step = longest["seconds"] / longest["step"] if longest["step"] else None
        summary |= compared(outlook.plan, measured[0], step)
    if as_json:
        common.print_json(summary)
    else:
        _show(summary)
    if session.received is not None and not result.completed:
        return 128 + session.received
    return common.JOB_FAILED if any(job["ended"] == "failed" for job in summary["jobs"]) else common.DONE


def _busy(setup: Setup) -> str | None:
    """The advice for a machine that is busy: threads that wait for a core make the others wait too."""
    import torch

    threads, cores = torch.get_num_threads(), common.cores()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if setup.adapters.device.type != "cpu" or threads < 2 or load <= cores:
        return None
    return f"this machine is busy (load {load:.1f}, {cores} cores): threads: 1 may be faster than the {threads} in use"


def _facts(setup: Setup, missed: Mapping[str, Omission | None]) -> Iterator[dict[str, Any]]:
    """What is known of each job before it trains."""
    for job in setup.jobs:
        left_out, watches = missed[job.name], job.config.early_stopping_patience is not None
        named = {"eval_sets": list(job.eval_sizes), "early_stopping_on": job.watched if watches else None}
        yield {
            "name": job.name,
            "method": job.config.method,
            "trainable_parameters": job.adapter.num_trainable(),
            "not_reached": left_out.json() if left_out else None,
            "note": job.adapter.note or None,
            "folder": str(Path(setup.config.output_dir) / "adapters" / job.name),
            **(named if job.eval_sizes else {}),
        }


def _summary(settings: RunConfig, result: TrainResult, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The machine-readable result."""
    from weft.files.run_folder import read_metrics
    from weft.files.whole import weights_bytes

    logged = read_metrics(settings.output_dir)  # also the events before a resumption
    rows = []
    for job in jobs:
        state, name = result.jobs[job["name"]], job["name"]
        losses = [e["loss"] for e in logged if e["event"] == "step" and e["job"] == name]
        told = [e for e in logged if e["event"] == "eval" and e["job"] == name]
        kept = result.completed and state["ended"] != "failed"
        size = weights_bytes(Path(job["folder"])) if kept else 0
        rows.append(
            {
                **job,
                "ended": state["ended"] or "interrupted",
                "reason": state["reason"],
                "steps": state["step"],
                "total_steps": state["total_steps"],
                "loss": losses[-1] if losses else None,
                **(
                    _eval_figures([], "", None)
                    if "eval_sets" in job
                    else _eval_figures(told, "", state["best_eval_loss"])
                ),
                **({"forgetting": _forgetting(state, kept=kept)} if settings.forgetting_eval is not None else {}),
                "tokens": state["tokens"],
                "tokens_per_second": round(state["tokens"] / state["seconds"], 1) if state["seconds"] else None,
                "bytes": size,
                "folder": job["folder"] if kept else None,
                **({"eval_sets": _eval_sets(job, told, state, kept=kept)} if "eval_sets" in job else {}),
            }
        )
    return {
        "completed": result.completed,
        "model": settings.model,
        "output_dir": settings.output_dir,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "jobs": rows,
    }


def _forgetting(state: Figures, *, kept: bool) -> dict[str, float | None]:
    """What a job forgot, in nats per token: at the last measurement, and with the weights that are kept."""
    last, best = state["forgetting"], state["forgetting_kept"]
    return {"last": last, "kept": (last if state["best_at"] is None else best) if kept else None}


def _eval_figures(told: Sequence[Figures], name: str, best: float | None) -> dict[str, float | None]:
    """The figures of the evaluations ``told`` on the set ``name``."""
    from weft.training.settings import eval_key

    losses = [event[eval_key(name, "loss")] for event in told]
    right = [event[eval_key(name, "accuracy")] for event in told if eval_key(name, "accuracy") in event]
    return {
        "eval_loss_first": losses[0] if losses else None,
        "eval_loss_best": best,
        "eval_loss_last": losses[-1] if losses else None,
        "eval_accuracy_first": right[0] if right else None,
        "eval_accuracy_best": max(right, default=None),
        "eval_accuracy_last": right[-1] if right else None,
        "eval_majority": told[-1].get(eval_key(name, "majority")) if told else None,
    }


def _eval_sets(
    job: Figures, told: Sequence[Figures], state: Figures, *, kept: bool
) -> dict[str, dict[str, float | None]]:
    """The figures by set, with the loss of the plain base, that of the adapter as it is kept, and the forgetting."""
    from weft.training.settings import eval_key

    best, watched = state["best_eval_loss"] or {}, job["early_stopping_on"]
    # The evaluation of the weights that are kept; runs from before their step was noted know them by their loss.
    step = state.get("best_at")
    of_kept: Sequence[Figures] = [e for e in told if e["step"] == step] if step is not None else told[-1:]
    if step is None and watched:
        of_kept = [e for e in told if e[eval_key(watched, "loss")] == best.get(watched)][:1]
    found = {}
    for name in job["eval_sets"]:
        base = told[0].get(f"base_{name}_loss") if told else None
        loss = of_kept[0][eval_key(name, "loss")] if kept and of_kept else None
        found[name] = {
            "base_loss": base,
            **_eval_figures(told, name, best.get(name)),
            "eval_loss_kept": loss,
            "forgetting": None if base is None or loss is None else loss - base,
        }
    return found


_COLUMNS: dict[str, Callable[[Figures], str]] = {
    "job": lambda job: job["name"],
    "method": lambda job: job["method"],
    "params": lambda job: f"{job['trainable_parameters']:,}",
    "steps": lambda job: f"{job['steps']}/{job['total_steps']}",
    "loss": lambda job: _loss(job["loss"]),
    "eval first": lambda job: _loss(job["eval_loss_first"]),
    "best": lambda job: _loss(job["eval_loss_best"]),
    "last": lambda job: _loss(job["eval_loss_last"]),
    "accuracy": lambda job: _loss(job["eval_accuracy_last"]),
    "majority": lambda job: _loss(job["eval_majority"]),
    "tok/s": lambda job: "" if job["tokens_per_second"] is None else f"{job['tokens_per_second']:.0f}",
    "file": lambda job: common.human_size(job["bytes"]) if job["bytes"] else "",
    "forgot": lambda job: _change((job.get("forgetting") or {}).get("kept")),
    "ended": lambda job: job["ended"],
}
_UNNAMED, _OF_CLASSES = ("eval first", "best", "last"), ("accuracy", "majority")
# Of a job's named sets, a row each.
_SET_COLUMNS: dict[str, Callable[[Figures], str]] = {
    "job": lambda row: row["job"],
    "evaluated on": lambda row: row["set"] + " (early stopping)" * (row["set"] == row["watched"]),
    "base": lambda row: _loss(row["base_loss"]),
    "first": lambda row: _loss(row["eval_loss_first"]),
    "best": lambda row: _loss(row["eval_loss_best"]),
    "last": lambda row: _loss(row["eval_loss_last"]),
    "kept": lambda row: _loss(row["eval_loss_kept"]) if row["watched"] else "",  # else it is the last
    "forgetting": lambda row: _change(row["forgetting"]),
    "accuracy": _COLUMNS["accuracy"],
    "majority": _COLUMNS["majority"],
}
_WORDS = ("job", "method", "ended", "evaluated on")


def _print_table(rows: Sequence[Mapping[str, str]], narrow: str, figures: Sequence[str]) -> None:
    """Print rows of cells by heading.

    A table that is cut says nothing. On a narrow screen every row gets lines instead: ``narrow``, and the ``figures``.
    """
    from rich.measure import Measurement
    from rich.table import Table

    out = common.console()
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading in _WORDS else "right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells.values())
    print()
    if Measurement.get(out, out.options.update(max_width=1000), table).maximum <= out.width:
        out.print(table)
        return
    for cells in rows:
        print(narrow.format(**cells).rstrip())
        print("  " + "  ".join(f"{heading} {cells[heading]}" for heading in figures if cells.get(heading)))


def _show(summary: Figures) -> None:
    jobs = summary["jobs"]
    sets = [
        {**figures, "job": job["name"], "set": name, "watched": job["early_stopping_on"]}
        for job in jobs
        for name, figures in job.get("eval_sets", {}).items()
    ]
    classified = [any(row["eval_accuracy_last"] is not None for row in some) for some in (jobs, sets)]
    left_out = {*(() if classified[0] else _OF_CLASSES), *(_UNNAMED if all("eval_sets" in job for job in jobs) else ())}
    left_out |= set() if any(job.get("forgetting") for job in jobs) else {"forgot"}
    rows = [{heading: cell(job) for heading, cell in _COLUMNS.items() if heading not in left_out} for job in jobs]
    narrow = "{job} ({method}): {ended}, {steps} steps, {params} params {file}"
    _print_table(rows, narrow, ("loss", *_UNNAMED, *_OF_CLASSES, "forgot", "tok/s"))
    if sets:
        cells = [{heading: cell(row) for heading, cell in _SET_COLUMNS.items()} for row in sets]
        filled = [heading for heading in _SET_COLUMNS if any(row[heading] for row in cells)]
        _print_table(
            [{heading: row[heading] for heading in filled} for row in cells], "{job} on {evaluated on}:", filled[2:]
        )
    print()
    if "planned" in summary and (line := comparison(summary)):
        print(line)
    # Paths stand under the table, because one that is cut cannot be copied.
    if summary["completed"]:
        for job in summary["jobs"]:
            if job["ended"] == "max_forgetting":
                print(f"{job['name']}: {job['reason']}")
            print(f"{job['name']} -> {job['folder'] or 'failed, and is not kept: ' + str(job['reason'])}")
        where = _with_extensions(shlex.quote(summary["output_dir"]))
        if all(job["folder"] is None for job in summary["jobs"]):
            return
        print(
            f"classify:  weft generate {where} --prompt TEXT" if any(classified) else f"talk to it:  weft chat {where}"
        )
    else:
        again = _with_extensions(f"weft train {shlex.quote(summary['output_dir'])} --resume")
        print(f"saved at step {summary['steps']}. Go on with:  {again}")


def _with_extensions(words: str) -> str:
    return " ".join([words, *(f"--extension {shlex.quote(str(file))}" for file in loaded_files())])


def _change(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
