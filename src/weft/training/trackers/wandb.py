"""Weights & Biases: a run per job, in a group of the run's name. Offline, unless ``WANDB_MODE`` says otherwise."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping

from weft.files.whole import make_folder
from weft.training.trackers.tracker import End, Facts, Scalar, Tracker


class WeightsAndBiases(Tracker):
    """Writes into ``trackers/wandb`` (or ``WANDB_DIR``); ``wandb sync`` sends it later."""

    name = "wandb"

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would send errors of its own
        import wandb

        own = None if os.environ.get("WANDB_DIR") else str(facts.folder)
        make_folder(facts.folder)
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True,
            x_disable_machine_info=True,
        )  # fmt: skip
        self._runs = {}
        for job, values in facts.jobs.items():
            facts.ids.setdefault(job, uuid.uuid4().hex[:12])
            self._runs[job] = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "weft"), group=facts.name, name=f"{facts.name}/{job}",
                id=facts.ids[job], resume="allow" if facts.resumed else None, config=dict(values), dir=own,
                mode=os.environ.get("WANDB_MODE", "offline"), reinit="create_new", settings=settings,
            )  # fmt: skip

    def log(self, job: str, step: int, figures: Mapping[str, float]) -> None:
        self._runs[job].log(dict(figures), step=step)

    def end(self, how: End, states: Mapping[str, Mapping[str, Scalar]]) -> None:
        for job, run in self._runs.items():
            run.summary.update(dict(states[job]))
            failed = how == "crashed" or states[job].get("ended") == "failed"
            run.finish(exit_code=int(failed))
