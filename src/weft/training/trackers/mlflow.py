"""MLflow: a run per job. A database in the run's folder, unless ``MLFLOW_TRACKING_URI`` names another place."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping

from weft.files.whole import make_folder
from weft.training.trackers.tracker import End, Facts, Scalar, Tracker

_LONGEST = 500  # characters of a parameter
_PARAMS = 100  # in one call
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "crashed": "FAILED"}


class MLflow(Tracker):
    """Writes ``trackers/mlflow/mlflow.db``; ``mlflow ui --backend-store-uri sqlite:///…`` shows it."""

    name = "mlflow"

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        for name in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            make_folder(facts.folder)
            uri = f"sqlite:///{facts.folder.absolute() / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "weft"))
        for job, values in facts.jobs.items():
            if job in facts.ids:
                self._client.update_run(facts.ids[job], status="RUNNING")
                continue
            tags = {"weft.run": facts.name, "weft.job": job}
            run = self._client.create_run(experiment, run_name=f"{facts.name}/{job}", tags=tags)
            facts.ids[job] = run.info.run_id
            params = [Param(key, str(value)[:_LONGEST]) for key, value in values.items()]
            for start in range(0, len(params), _PARAMS):
                self._client.log_batch(facts.ids[job], params=params[start : start + _PARAMS])

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def log(self, job: str, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.facts.ids[job], metrics=[Metric(key, v, now, step) for key, v in figures.items()])

    def end(self, how: End, states: Mapping[str, Mapping[str, Scalar]]) -> None:
        for job, run in self.facts.ids.items():
            for key, value in states[job].items():
                if not isinstance(value, float):
                    self._client.set_tag(run, f"weft.{key}", str(value)[:_LONGEST])
            failed = states[job].get("ended") == "failed"
            self._client.set_terminated(run, "FAILED" if failed else _STATUS[how])
