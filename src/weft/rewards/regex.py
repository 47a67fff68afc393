"""A regular expression that an answer fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from weft.complaints import Worded
from weft.patterns import Pattern


class Regex(Worded):
    """1 for an answer that the whole expression fits, 0 for any other."""

    pattern: str = Field(description="the expression; write .* around it to look for it anywhere")

    def model_post_init(self, _: Any) -> None:
        Pattern(self.pattern, "the reward regex: pattern")

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """The reward of each answer."""
        wanted = Pattern(self.pattern, "the reward regex: pattern")  # with its whole time for these answers
        return [float(wanted.full(text.strip()) is not None) for text in completions]
