"""Generation: requests for different adapters are written in one batch."""

from weft.generation.engine import Engine, generate
from weft.generation.limits import Limits
from weft.generation.request import Completion, Request

__all__ = ["Completion", "Engine", "Limits", "Request", "generate"]
