"""``weft train``: one base, one or many jobs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, early, options
from weft.cli.session import Session
from weft.errors import UserError
from weft.extensions import loaded_files

if TYPE_CHECKING:
    from weft.models.reach import Omission
    from weft.training.loop import TrainResult
    from weft.training.run import Setup
    from weft.training.settings import RunConfig


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
    session = Session(quiet=quiet)
    with session.open():
        early.refuse(lambda: _check(config or [], given))
        settings = _settings(config or [], given)
        return _run(settings, session, as_json=as_json, quiet=quiet)


def _check(words: list[str], flags: Mapping[str, Any]) -> None:
    from weft.training.run import check_names, check_places

    settings = _settings(words, flags)
    check_places(settings)
    check_names(settings)


def _settings(words: list[str], flags: Mapping[str, Any]) -> RunConfig:
    from weft.training.config import build_config, load_config, load_run_config

    file = words[0] if words and "=" not in words[0] else None
    overrides = words[1:] if file else words
    stray = next((word for word in overrides if "=" not in word), None)
    if stray is not None:
        raise UserError(f"{stray!r} is not of the form key=value. Only the first word may be a file.")
    if file is None:
        if not flags and not overrides:
            raise UserError("nothing to train: give a CONFIG.yaml, or --model, --data and --method.")
        return build_config({}, overrides, flags=flags, source="command line")
    if Path(file).is_dir():
        return load_run_config(file, overrides, flags=flags)
    return load_config(file, overrides, flags=flags)


def _run(settings: RunConfig, session: Session, *, as_json: bool, quiet: bool) -> int:
    from weft.models.reach import left_out
    from weft.training.run import train as run_training

    if settings.shape == "full":
        common.tell_hub(settings.model)
    jobs: list[dict[str, Any]] = []

    def ready(setup: Setup) -> None:
        missed = {job.name: left_out(job.adapter, setup.base.model, setup.base.architecture) for job in setup.jobs}
        jobs.extend(_facts(setup, missed))
        if busy := _busy(setup):
            common.say(busy)
        if not quiet:
            for line in _opening(setup, jobs, missed):
                (common.say if as_json else print)(line)
        session.begin(setup.jobs)

    result = run_training(settings, on_event=session.event, should_stop=session.should_stop, on_ready=ready)
    session.close()
    summary = _summary(settings, result, jobs)
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
        left_out = missed[job.name]
        yield {
            "name": job.name,
            "method": job.config.method,
            "trainable_parameters": job.adapter.num_trainable(),
            "not_reached": left_out.json() if left_out else None,
            "folder": str(Path(setup.config.output_dir) / "adapters" / job.name),
        }


def _opening(setup: Setup, jobs: list[dict[str, Any]], missed: Mapping[str, Omission | None]) -> Iterator[str]:
    """PEFT's sentence for each job, with its folder, and the parts of the base that it does not reach."""
    from weft.models.reach import unquantized

    if told := unquantized(setup.base.model, setup.base.architecture):
        yield told
    base = sum(p.numel() for p in setup.base.model.parameters())
    for job in jobs:
        own = job["trainable_parameters"]
        yield (
            f"{job['name']}: trainable params: {own:,} || all params: {base + own:,} || "
            f"trainable%: {100 * own / (base + own):.4f} -> {job['folder']}"
        )
        if missed[job["name"]]:
            yield f"{job['name']}: {missed[job['name']]}"


def _summary(settings: RunConfig, result: TrainResult, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The machine-readable result."""
    from weft.files.whole import weights_bytes
    from weft.foreign import json_lines

    metrics = Path(settings.output_dir) / "metrics.jsonl"  # it also holds the events before a resumption
    logged: list[Mapping[str, Any]] = [*json_lines(metrics)] if metrics.is_file() else []
    rows = []
    for job in jobs:
        state, name = result.jobs[job["name"]], job["name"]
        losses = [e["loss"] for e in logged if e["event"] == "step" and e["job"] == name]
        told = [e for e in logged if e["event"] == "eval" and e["job"] == name]
        evals = [e["eval_loss"] for e in told]
        right = [e["eval_accuracy"] for e in told if "eval_accuracy" in e]
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
                "eval_loss_first": evals[0] if evals else None,
                "eval_loss_best": state["best_eval_loss"],
                "eval_loss_last": evals[-1] if evals else None,
                "eval_accuracy_first": right[0] if right else None,
                "eval_accuracy_best": max(right, default=None),
                "eval_accuracy_last": right[-1] if right else None,
                "eval_majority": told[-1].get("eval_majority") if told else None,
                "tokens": state["tokens"],
                "tokens_per_second": round(state["tokens"] / state["seconds"], 1) if state["seconds"] else None,
                "bytes": size,
                "folder": job["folder"] if kept else None,
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


_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
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
    "ended": lambda job: job["ended"],
}


def _show(summary: Mapping[str, Any]) -> None:
    from rich.measure import Measurement
    from rich.table import Table

    out = common.console()
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    classifies = any(job["eval_accuracy_last"] is not None for job in summary["jobs"])
    columns = {h: cell for h, cell in _COLUMNS.items() if classifies or h not in ("accuracy", "majority")}
    for heading in columns:
        table.add_column(heading, justify="left" if heading in ("job", "method", "ended") else "right", no_wrap=True)
    for job in summary["jobs"]:
        table.add_row(*(cell(job) for cell in columns.values()))
    print()
    if Measurement.get(out, out.options.update(max_width=1000), table).maximum <= out.width:
        out.print(table)
    else:
        # A table that is cut says nothing. On a narrow screen every job gets a few lines instead.
        for job in summary["jobs"]:
            cells = {heading: cell(job) for heading, cell in columns.items()}
            print("{job} ({method}): {ended}, {steps} steps, {params} params {file}".format(**cells).rstrip())
            figures = ("loss", "eval first", "best", "last", "accuracy", "majority", "tok/s")
            losses = [f"{heading} {cells[heading]}" for heading in figures if heading in cells]
            print("  " + "  ".join(text for text in losses if not text.endswith(" ")))
    print()
    # Paths stand under the table, because one that is cut cannot be copied.
    if summary["completed"]:
        for job in summary["jobs"]:
            print(f"{job['name']} -> {job['folder'] or 'failed, and is not kept: ' + str(job['reason'])}")
        where = _with_extensions(shlex.quote(summary["output_dir"]))
        if all(job["folder"] is None for job in summary["jobs"]):
            return
        print(f"classify:  weft generate {where} --prompt TEXT" if classifies else f"talk to it:  weft chat {where}")
    else:
        again = _with_extensions(f"weft train {shlex.quote(summary['output_dir'])} --resume")
        print(f"saved at step {summary['steps']}. Go on with:  {again}")


def _with_extensions(words: str) -> str:
    return " ".join([words, *(f"--extension {shlex.quote(str(file))}" for file in loaded_files())])


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
