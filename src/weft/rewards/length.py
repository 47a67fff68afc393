"""The length of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from weft.complaints import Worded


class Length(Worded):
    """1 for an answer of ``min_tokens`` to ``max_tokens`` tokens; outside it falls to 0 over ``slack`` tokens."""

    min_tokens: int = Field(0, ge=0, description="the shortest that is welcome")
    max_tokens: int = Field(gt=0, description="the longest that is welcome")
    slack: int = Field(0, ge=0, description="so many tokens outside the reward falls evenly to 0")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        return self

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] = (),
        **columns: Sequence[Any],
    ) -> list[float]:
        """The reward of each answer."""
        found = []
        for ids in completion_ids:
            outside = max(self.min_tokens - len(ids), len(ids) - self.max_tokens, 0)
            found.append(max(0.0, 1 - outside / (self.slack + 1)) if outside else 1.0)
        return found
