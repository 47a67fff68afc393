"""Generation: requests for different adapters decode in one batch. Can be called: ``weft.generate(...)``."""

import sys
from types import ModuleType
from typing import Any

from weft.generate.engine import Completion, Request, generate

__all__ = ["Completion", "Request", "generate"]


class _Package(ModuleType):
    """As in weft.train: ``weft.generate`` has to be the same thing whatever has been imported before."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[Completion]:
        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
