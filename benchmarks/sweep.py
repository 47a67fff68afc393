"""A sweep of 16 trials in shared passes beside 16 runs apart: the same figures, the same winner, less time.

    python -m benchmarks.sweep --steps 60 --out benchmarks/results/sweep_2-core_DATE.md

Both run in this process, one after the other, over the same embedded base and the same records. The 16 runs load the
base and read the data 16 times, as 16 calls of ``weft train`` do, but without the start of Python and its libraries,
which is told apart: it would make the ratio larger. With ``--halving`` a third line tells what leaving saves.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from weft.files.run_folder import read_metrics
from weft.sweeps.halving import rungs_of
from weft.sweeps.record import Record, new_record
from weft.sweeps.sharing import groups_of
from weft.sweeps.space import dimension, grid
from weft.sweeps.sweep import begin, run_sweep
from weft.sweeps.trials import Trials, trials_of
from weft.training.run import train

DATA = Path(__file__).parents[1] / "src" / "weft" / "assets" / "instructions" / "train.jsonl"
GRID = ("r=2,4,8,16", "learning_rate=1e-2,3e-3,1e-3,1e-4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--eval-size", type=int, default=100)
    parser.add_argument("--halving", type=int, default=3, help="factor of successive halving; 0: leave it out")
    parser.add_argument("--exact", action="store_true", help="the same to the bit, and slower")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    words = [f"model={given.model}", f"data={DATA}", "method=lora", f"steps={given.steps}"]
    words += [f"batch_size={given.batch_size}", f"eval_size={given.eval_size}", f"exact={str(given.exact).lower()}"]
    with tempfile.TemporaryDirectory() as folder:
        lines = list(report(words, Path(folder), given.halving))
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out is not None:
        given.out.write_text(f"`python -m benchmarks.sweep {' '.join(sys.argv[1:])}`\n\n{text}", encoding="utf-8")


def report(words: list[str], folder: Path, halving: int):  # type: ignore[no-untyped-def]
    """The lines of the report."""
    warm(words, folder / "warm")
    shared, record = swept(words, folder / "sweep", 0)
    apart, losses, best = alone(words, folder)
    yield "| 16 trials | seconds | times | winner | eval_loss |"
    yield "|---|---|---|---|---|"
    name = str(record.winner)
    yield f"| 16 runs apart | {apart:.1f} | 1 | {best} | {losses[best]:.6f} |"
    yield f"| one sweep | {shared:.1f} | {apart / shared:.2f} | {name} | {record.results[name].figure:.6f} |"
    if halving:
        seconds, left = swept(words, folder / "halving", halving)
        own = str(left.winner)
        yield (
            f"| one sweep, --halving {halving} | {seconds:.1f} | {apart / seconds:.2f} | {own} | "
            f"{left.results[own].figure:.6f} |"
        )
    far = max(abs(float(record.results[one].figure or 0) - loss) for one, loss in losses.items())
    order = sorted(losses, key=losses.__getitem__)
    yield ""
    yield f"Largest difference of a trial's eval_loss, together and apart: {far:.2e}."
    yield f"The same order of all 16: {'yes' if order == record.table() else 'no'}; the same winner: " + (
        "yes." if name == best else "no."
    )
    yield f"A start of Python with Weft, which each call of `weft train` also pays: {start():.1f} s."


def trials(words: list[str], folder: Path) -> Trials:
    """The 16 trials of one kind."""
    return trials_of(None, words, grid([dimension(word) for word in GRID]), {"output_dir": str(folder)})


def warm(words: list[str], folder: Path) -> None:
    """Load everything once, so that neither side pays for what the other finds ready."""
    made = trials([*words, "steps=2"], folder)
    train(made.run([made.trials[0].name], folder))


def swept(words: list[str], folder: Path, halving: int) -> tuple[float, Record]:
    """The seconds of a sweep, and its record."""
    begun = time.perf_counter()
    made = trials(words, folder)
    rungs = rungs_of([trial.job for trial in made.trials], halving) if halving else ()
    record = new_record(folder, made, {"metric": "eval_loss"}, rungs)
    begin(folder, overwrite=False)
    record.groups = groups_of(made, None)
    assert run_sweep(record, made, lambda config, rungs: train(config, rungs=rungs))
    return time.perf_counter() - begun, record


def alone(words: list[str], folder: Path) -> tuple[float, dict[str, float], str]:
    """The seconds of 16 runs apart, the last loss of each, and the name of the best."""
    made = trials(words, folder)
    begun = time.perf_counter()
    for trial in made.trials:
        train(made.run([trial.name], folder / trial.name))
    seconds = time.perf_counter() - begun
    losses = {one.name: read_metrics(folder / one.name, event="eval")[-1]["eval_loss"] for one in made.trials}
    return seconds, losses, min(losses, key=losses.__getitem__)


def start() -> float:
    """The seconds of a process that imports what training needs, and leaves."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import weft.training.run"], check=True)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
