"""Training: many jobs over one base. The package can be called: ``weft.train(config)``."""

import sys
from types import ModuleType
from typing import Any

from weft.train.config import JobConfig, RunConfig, load_config, make_config
from weft.train.job import Job
from weft.train.loop import Trainer, TrainResult

__all__ = ["Job", "JobConfig", "RunConfig", "TrainResult", "Trainer", "load_config", "make_config"]


class _Package(ModuleType):
    """Without it, what ``weft.train`` is would depend on whether a module of the package has been imported before."""

    def __call__(self, *args: Any, **kwargs: Any) -> TrainResult:
        from weft.train.run import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
