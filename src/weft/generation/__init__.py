"""Generation: requests for different adapters decode in one batch."""

from weft.generation.engine import Completion, Request, generate

__all__ = ["Completion", "Request", "generate"]
