"""A judge as a reward: the mean of a rubric's scores, as ``weft.rewards`` asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weft.evaluate.judge.judging import Judge, Pair


class JudgeReward:
    """Calls a judge as TRL calls a reward. The result lies between 0 (the lowest score) and 1 (the highest)."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        """The reward of each answer; None where the judge gives no score. ``answer`` among the columns is a right one.

        Raises:
            UserError: The judge has no rubric.
            GeneratorError: The judge cannot be asked now.
        """
        known = columns.get("answer") or [None] * len(completions)
        pairs = [
            Pair(str(place), prompt, text, reference=str(right or ""))
            for place, (prompt, text, right) in enumerate(zip(prompts, completions, known, strict=True))
        ]
        rubric = self.judge.rubric
        scored = self.judge.score(pairs)
        assert rubric is not None
        low, high = rubric.scale
        return [None if one.mean is None else (one.mean - low) / (high - low) for one in scored]
