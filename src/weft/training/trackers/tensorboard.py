"""TensorBoard: a folder of event files per job; ``tensorboard --logdir RUN/trackers/tensorboard`` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.training.trackers.tracker import End, Facts, Scalar, Tracker


class TensorBoard(Tracker):
    """Writes files alone. A resumed run takes out of them what it will write again."""

    name = "tensorboard"

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        import torch.utils.tensorboard  # noqa: F401  (what is broken shows before the first step)

        self._writers: dict[str, Any] = {}

    def log(self, job: str, step: int, figures: Mapping[str, float]) -> None:
        writer = self._writer(job, step)
        for key, value in figures.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    def _writer(self, job: str, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if job not in self._writers:
            purge = step if self.facts.resumed else None
            made = SummaryWriter(str(self.facts.folder / job), purge_step=purge)
            rows = "".join(f"| {key} | {value} |\n" for key, value in self.facts.jobs[job].items())
            made.add_text("settings", f"| key | value |\n|---|---|\n{rows}", step)
            self._writers[job] = made
        return self._writers[job]

    def end(self, how: End, states: Mapping[str, Mapping[str, Scalar]]) -> None:
        for job, writer in self._writers.items():
            state = dict(states[job])
            step = int(state.get("step", 0))
            writer.add_text("end", ", ".join(f"{key}: {value}" for key, value in state.items()), step)
            figures = {f"hparam/{key}": value for key, value in state.items() if isinstance(value, float)}
            writer.add_hparams(dict(self.facts.jobs[job]), figures, run_name=".", global_step=step)
            writer.close()
