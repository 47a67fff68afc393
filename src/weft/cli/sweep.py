"""``weft sweep``: many settings of one job, tried together over one base."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, early, options
from weft.cli.planned import CannotFitError, Outlook, refused
from weft.cli.session import Session
from weft.errors import UserError

if TYPE_CHECKING:
    from weft.sweeps.halving import Rung
    from weft.sweeps.record import Record
    from weft.sweeps.sweep import Runner
    from weft.sweeps.trials import Trials
    from weft.training.loop import TrainResult
    from weft.training.rungs import Rungs
    from weft.training.settings import RunConfig


def sweep(
    config: options.Config = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V,V", help="Values to try; the KEY=V,V words behind it are more of them."),
    ] = None,
    random: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Draw N trials; ranges are log:1e-5:1e-2, int:1:64.")
    ] = None,
    halving: Annotated[
        int | None, typer.Option(metavar="FACTOR", help="Keep the best 1/FACTOR of the trials after ever more steps.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="The figure of evaluations that counts (eval_loss); of losses the lowest wins.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws of --random; trials have the seed of the job.")] = 0,
    together: Annotated[
        int | None, typer.Option(min=1, help="At most so many trials share a run (as many as fit into memory).")
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of the sweep (runs/sweep).")] = None,
    as_json: options.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only warnings and the result.")] = False,
) -> int:
    """Try many settings of one job. The trials train together over one base, and their results are compared.

    weft sweep run.yaml --grid r=4,16,64 learning_rate=1e-3,1e-4

    weft sweep run.yaml --random 16 learning_rate=log:1e-5:1e-2 r=4,16 --halving 3 steps=270

    The same call goes on with a sweep that was interrupted.
    """
    asked = {"random": random, "halving": halving, "seed": seed, "metric": metric}
    words, swept = _parted(config or [], grid or [])

    def definition() -> tuple[Record, Trials]:
        return _definition(words, swept, asked, output_dir)

    early.refuse(definition)
    record, trials = definition()
    return _run(record, trials, words, together=together, as_json=as_json, quiet=quiet)


def _parted(words: Sequence[str], grid: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are settings of all trials, after the file if there is one, and those that name values to try."""
    from weft.sweeps.space import swept

    several = [word for word in words if swept(word)]
    return [word for word in words if word not in several], [*grid, *several]


def _definition(
    words: list[str], swept: Sequence[str], asked: Mapping[str, Any], output_dir: str | None
) -> tuple[Record, Trials]:
    """What the sweep is, if all of its trials can be made.

    Raises:
        UserError: They cannot.
    """
    from weft.sweeps.halving import rungs_of
    from weft.sweeps.record import new_record
    from weft.sweeps.space import dimension, drawn, grid
    from weft.sweeps.sweep import check_folder
    from weft.sweeps.trials import metric_of, trials_of
    from weft.training.checks import check_names, check_places

    if not swept:
        raise UserError("nothing to try: name a key with its values, as --grid r=4,16,64 (docs/sweep.md).")
    dimensions = [dimension(word) for word in swept]
    keys = [one.key for one in dimensions]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"--grid names {twice} twice; write its values in one word, {twice}=4,16.")
    settings = grid(dimensions) if asked["random"] is None else drawn(dimensions, asked["random"], asked["seed"])
    file = words[0] if words and "=" not in words[0] else None
    overrides = words[1:] if file else words
    if stray := next((word for word in overrides if "=" not in word), None):
        raise UserError(f"{stray!r} is not of the form key=value. Only the first word may be a file.")
    trials = trials_of(file, overrides, settings, _flags(overrides, output_dir))
    metric = metric_of(trials, asked["metric"])
    rungs = rungs_of([trial.job for trial in trials.trials], asked["halving"]) if asked["halving"] is not None else ()
    folder = Path(trials.config.output_dir)
    check_folder(folder, overwrite=trials.config.overwrite_output_dir)
    everything = trials.run([trial.name for trial in trials.trials], folder / "run-0")
    check_places(everything.model_copy(update={"output_dir": str(folder / "run-0" / "new"), "resume": False}))
    check_names(everything)
    told = {**asked, "metric": metric, "model": trials.config.model, "words": list(swept)}
    return new_record(folder, trials, told, rungs), trials


def _flags(overrides: Sequence[str], output_dir: str | None) -> dict[str, object]:
    given = any(word.startswith("output_dir=") for word in overrides)
    return {} if output_dir is None and given else {"output_dir": output_dir or "runs/sweep"}


def _run(
    record: Record, trials: Trials, words: Sequence[str], *, together: int | None, as_json: bool, quiet: bool
) -> int:
    from weft.sweeps.record import resumed
    from weft.sweeps.sharing import groups_of
    from weft.sweeps.sweep import begin, run_sweep

    begin(record.folder, overwrite=trials.config.overwrite_output_dir)
    tell: Callable[[str], None] = (lambda line: None) if quiet else common.say if as_json else print
    if not resumed(record):
        record.groups = groups_of(trials, together)
        record.save()
    elif record.waiting:
        tell(f"going on with the sweep in {record.folder}: {len(record.results)} of {len(record.trials)} trials ended")
    runs = len(record.groups)
    tell(f"{len(record.trials)} trials in {runs} run{'s' * (runs > 1)} over one base, compared by {record.metric}")
    session = Session(quiet=quiet)

    def decided(rung: Rung, left: Mapping[str, str]) -> None:
        there = len(record.reports[rung.step])
        common.say(f"step {rung.step}: {len(left)} of {there} trials leave, {there - len(left)} stay")

    with session.open():
        try:
            done = run_sweep(record, trials, _runner(session, tell), decided)
        except CannotFitError as error:
            session.close()
            return refused(error, as_json)
    if as_json:
        common.print_json(record.json() | {"completed": done})
    else:
        show(record)
        _last_words(record, words, done=done)
    if not done:
        return 128 + (session.received or 2)
    return common.DONE if record.winner is not None else common.JOB_FAILED


def _runner(session: Session, tell: Callable[[str], None]) -> Runner:
    """Trains runs in this process, one after the other."""

    def run(config: RunConfig, rungs: Rungs | None) -> TrainResult:
        from weft.generation.rollouts import writer
        from weft.training.run import train as run_training

        result = run_training(
            config, on_event=session.event, should_stop=session.should_stop, on_read=Outlook(tell),
            on_ready=lambda setup: session.begin(setup.jobs), writer=writer, rungs=rungs,
        )  # fmt: skip
        session.close()
        return result

    return run


def show(record: Record) -> None:
    """Print the trials, the best first."""
    from rich.table import Table

    keys = list(next(iter(record.trials.values()))["settings"])
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("trial", no_wrap=True)
    for key in (*keys, record.metric, "steps"):
        table.add_column(key, justify="right", overflow="fold")
    table.add_column("ended", no_wrap=True)
    print()
    for name in record.table():
        result, settings = record.results[name], record.trials[name]["settings"]
        figure = "" if result.figure is None else f"{result.figure:.4f}"
        table.add_row(name, *(settings[key] for key in keys), figure, str(result.step), result.ended)
    common.console().print(table)
    print()


def _last_words(record: Record, words: Sequence[str], *, done: bool) -> None:
    from weft.sweeps.record import SWEEP_FILE

    if not done:
        print(
            f"{len(record.results)} of {len(record.trials)} trials have ended. The same call goes on with the others."
        )
        return
    name = record.winner
    if name is None:
        print("no trial was trained to its end; the reasons:")
        for other in record.table():
            print(f"  {other}: {record.results[other].reason}")
        return
    settings = [f"{key}={value}" for key, value in record.trials[name]["settings"].items()]
    print(f"winner: {name} -> {record.results[name].folder}")
    own = [word for word in words if not word.startswith("output_dir=")]
    print(f"the same alone:  weft train {' '.join(map(shlex.quote, [*own, *settings]))}")
    print(f"everything: {record.folder / SWEEP_FILE}")
