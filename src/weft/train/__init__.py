"""Training: many jobs over one base."""

from weft.train.config import JobConfig, RunConfig, load_config, make_config
from weft.train.job import Job
from weft.train.loop import Trainer, TrainResult

__all__ = ["Job", "JobConfig", "RunConfig", "TrainResult", "Trainer", "load_config", "make_config"]
