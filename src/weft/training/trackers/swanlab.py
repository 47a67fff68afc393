"""SwanLab: one run for all jobs. Offline, unless ``SWANLAB_MODE`` says otherwise."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping

from weft.files.whole import make_folder
from weft.training.trackers.tracker import End, Facts, Scalar, SharedRun

_ONE = ""  # the key of its only run
_PROBES = ("hardware", "runtime", "requirements", "git", "monitor")


class SwanLab(SharedRun):
    """Writes into ``trackers/swanlab`` (or ``SWANLAB_LOG_DIR``); ``swanlab sync`` sends it later."""

    name = "swanlab"

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        import swanlab

        make_folder(facts.folder)
        facts.ids.setdefault(_ONE, uuid.uuid4().hex[:20])
        mode = os.environ.get("SWANLAB_MODE", "offline")
        own = None if os.environ.get("SWANLAB_LOG_DIR") else str(facts.folder)
        # It would also keep what the terminal shows, and facts of the machine.
        probe = dict.fromkeys(_PROBES, False)
        quiet = swanlab.Settings(interactive=False, terminal={"proxy_type": "none"}, probe=probe)
        self._run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJECT", "weft"), name=facts.name, mode=mode, log_dir=own,
            id=facts.ids[_ONE], resume="allow" if facts.resumed else None, config=self.settings(), reinit=True,
            settings=quiet,
        )  # fmt: skip

    def log(self, job: str, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(self.prefixed(job, figures), step=step)

    def end(self, how: End, states: Mapping[str, Mapping[str, Scalar]]) -> None:
        told = {f"end/{key}": one for job, own in states.items() for key, one in self.prefixed(job, own).items()}
        self._run.config.update(told)
        self._run.finish(state={"finished": "success", "stopped": "aborted", "crashed": "crashed"}[how])
