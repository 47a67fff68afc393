"""Two callbacks: a file of losses, and an end after some minutes.

MINUTES=30 weft train --extension watch.py run.yaml 'callbacks=[losses_csv, time_limit]'
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import weft
from weft.training.loop import Event
from weft.training.run import Setup


@weft.register_callback("losses_csv")
def losses_csv(setup: Setup) -> Callable[[Event], None]:
    """Write the loss of every logged step to ``losses.csv`` in the run's folder."""
    path = Path(setup.config.output_dir) / "losses.csv"

    def hear(event: Event) -> None:
        if event["event"] == "step":
            with path.open("a", encoding="utf-8") as file:
                print(event["job"], event["step"], event["loss"], sep=",", file=file)

    return hear


@weft.register_callback("time_limit")
class TimeLimit:
    """Ask the run to stop when the minutes are over. It is saved, and ``--resume`` goes on."""

    def __init__(self, setup: Setup) -> None:
        self.end = time.monotonic() + 60 * float(os.environ.get("MINUTES", "60"))

    def __call__(self, event: Event) -> bool:
        return time.monotonic() > self.end
