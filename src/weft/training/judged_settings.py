"""What the configuration of a job over judged answers brings with it."""

from __future__ import annotations

from collections.abc import Sequence

from weft.objectives.ppo import PPO, Value
from weft.training.job_settings import JobConfig


def value_job(job: JobConfig, beside: Sequence[JobConfig]) -> JobConfig | None:
    """The job that learns what to expect of a PPO job's answers; None: it is no such job, or has one already.

    It is of the same method with the same data and steps, and has its own adapter, optimizer and seed.
    """
    judged = job.judged
    if not isinstance(judged, PPO):
        return None
    if any(isinstance(one.judged, Value) and one.judged.of == job.name for one in beside):
        return None
    given = {key: getattr(job, key) for key in job.model_fields_set - {"start_from", "reference", "max_forgetting"}}
    settings = {
        "of": job.name, "cliprange_value": judged.cliprange_value, "num_iterations": judged.num_iterations
    }
    rate = judged.value_learning_rate or job.learning_rate
    return JobConfig(**given | {
        "name": f"{job.name}-value", "objective": "value", "objective_settings": settings, "seed": job.seed + 1,
        "learning_rate": rate,
    })  # fmt: skip
