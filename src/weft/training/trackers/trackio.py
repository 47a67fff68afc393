"""Trackio: one run for all jobs, in its own folder (``TRACKIO_DIR``). A space or a server only by its own variables."""

from __future__ import annotations

import os
from collections.abc import Mapping

from weft.training.trackers.tracker import End, Facts, Scalar, SharedRun


class Trackio(SharedRun):
    """``trackio show`` shows it. ``TRACKIO_SPACE_ID`` or ``TRACKIO_SERVER_URL`` send it elsewhere."""

    name = "trackio"

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "weft"), name=facts.name, config=self.settings(),
            resume="allow" if facts.resumed else "never", embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, job: str, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(self.prefixed(job, figures), step=step)

    def end(self, how: End, states: Mapping[str, Mapping[str, Scalar]]) -> None:
        import trackio

        told = {f"end/{key}": one for job, own in states.items() for key, one in self.prefixed(job, own).items()}
        self._run.log(
            {"end/run": how, **told}, step=max((int(own.get("step", 0)) for own in states.values()), default=0)
        )
        trackio.finish()  # the run's own would be repeated, and told, when Python ends
