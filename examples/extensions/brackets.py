"""A reward: how well the brackets of an answer match, from 0 to 1.

    weft train --extension brackets.py run.yaml objective=grpo objective_settings.rewards=[brackets]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import weft

_PAIRS = {")": "(", "]": "[", "}": "{"}


@weft.register_reward("brackets")
def brackets(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
    """The share of brackets that have their partner; None for an answer without any: the reward has no say."""
    return [_share(text) for text in completions]


def _share(text: str) -> float | None:
    open_, matched, count = [], 0, 0
    for sign in text:
        if sign in _PAIRS.values():
            open_.append(sign)
            count += 1
        elif sign in _PAIRS:
            count += 1
            if open_ and open_[-1] == _PAIRS[sign]:
                open_.pop()
                matched += 2
    return matched / count if count else None
