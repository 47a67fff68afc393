"""Training: many jobs over one base."""

from weft.training.config import JobConfig, RunConfig, load_config, make_config
from weft.training.job import Job
from weft.training.loop import Trainer, TrainResult

__all__ = ["Job", "JobConfig", "RunConfig", "TrainResult", "Trainer", "load_config", "make_config"]
