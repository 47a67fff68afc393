"""What a resumed run does with a job that was planned with another number of steps."""

from __future__ import annotations

from weft.errors import UserError
from weft.training.job import Job


def go_on(job: Job, planned: int) -> str:
    """Go on with a job that was planned with other steps, also where it had finished; returns what that means.

    Raises:
        UserError: Early stopping had put back its best weights, so its last ones are gone.
    """
    progress, total = job.progress, job.total_steps
    if progress.ended == "finished" and progress.step < total and job.parameters:
        if job.best is not None and job.keeps_best:
            raise UserError(
                f"job '{job.name}' has finished with its best weights (early_stopping_patience), so it cannot go "
                f"on to step {total}. Begin a new run in another output_dir."
            )
        progress.ended = None
    elif not job.active:
        job.total_steps = planned  # it has ended by these
        return ""
    elif progress.step >= total:
        progress.ended = "finished"
        return f"job '{job.name}' has done {progress.step} steps, and {total} are wanted now: it ends here."
    if total == planned:
        return ""
    kind = job.config.lr_scheduler_type
    return (
        f"job '{job.name}' has {total} steps now, and {planned} before. The learning rate ({kind}) is that "
        f"of {total} steps from step {progress.step + 1} on, so the run is not what {total} steps from the start "
        "would be."
    )
