"""The rewards that a job can name, and how several are asked: with weights, a time limit, and nothing made up.

A reward is called as in TRL: ``reward(prompts, completions, completion_ids=..., **columns)`` gives a number for each
completion, or None where it has no say. ``columns`` are the fields of the records, repeated for each completion.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ConfigDict, Field

from weft.complaints import Worded
from weft.errors import UserError, shown
from weft.extensions import Registry
from weft.rewards.answer import ExactAnswer
from weft.rewards.json_schema import JsonSchema
from weft.rewards.length import Length
from weft.rewards.regex import Regex

Reward = Callable[..., Sequence[float | None]]
_Function = TypeVar("_Function", bound=Reward)
REWARDS: Registry[Reward | type[Worded]] = Registry(
    "reward", {"exact_answer": ExactAnswer, "json_schema": JsonSchema, "length": Length, "regex": Regex}
)


def register_reward(name: str) -> Callable[[_Function], _Function]:
    """A decorator of a ``Reward``: a function, or a class that is made with the settings and then called.

    Raises:
        UserError: The name is taken.
    """
    return REWARDS.register(name, lambda function: function)


class RewardSettings(Worded):
    """One reward of a job; other keys are the reward's own settings."""

    model_config = ConfigDict(frozen=True, extra="allow")

    reward: str | None = Field(None, description="a name: exact_answer, json_schema, length, regex, or an extension's")
    adapter: str | None = Field(None, description="the folder of a trained reward adapter of the same base")
    weight: float = Field(1.0, description="what it counts in the sum")
    time_limit: float = Field(60.0, gt=0, description="seconds for all answers of a step")

    @classmethod
    def of(cls, given: object) -> RewardSettings:
        """The settings that a name or a mapping gives.

        Raises:
            UserError: It is neither, or names no reward.
        """
        if isinstance(given, str):
            given = {"reward": given}
        if not isinstance(given, Mapping):
            raise UserError(f"rewards: expected names, or mappings with reward or adapter; found {shown(given)}.")
        made = cls(**given)
        if (made.reward is None) == (made.adapter is None):
            raise UserError(f"rewards: each names either a reward or an adapter; found {shown(dict(given))}.")
        own = {*(made.model_extra or {}), *({"time_limit"} & made.model_fields_set)}
        if made.adapter is not None and own:
            raise UserError(f"rewards: an adapter has a weight and no other setting ({', '.join(sorted(own))}).")
        return made

    @property
    def name(self) -> str:
        """What it is called in logs."""
        return self.reward or f"adapter {self.adapter}"

    def function(self) -> Reward:
        """The reward that it names.

        Raises:
            UserError: There is none, or it has no such setting.
        """
        assert self.reward is not None
        entry, own = REWARDS.find(self.reward), dict(self.model_extra or {})
        if isinstance(entry, type):
            made: Reward = entry(**own)
            return made
        if own:
            raise UserError(f"the reward {self.reward!r} is a function and has no settings ({', '.join(own)}).")
        return entry


@dataclass(frozen=True)
class Rewarded:
    """What rewards say of answers: the sum [answers], None where none had a say; each one's own; and what failed."""

    totals: list[float | None]
    parts: dict[str, list[float | None]]
    failures: dict[str, str] = field(default_factory=dict)


class Rewarder:
    """Asks all rewards of a job."""

    def __init__(self, settings: Sequence[RewardSettings], scorers: Mapping[str, Reward]) -> None:
        """``scorers``: for each adapter's folder what gives its scores."""
        self.settings = list(settings)
        self._functions = [s.function() if s.adapter is None else scorers[s.adapter] for s in self.settings]

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], /, **columns: Sequence[Any]) -> Rewarded:
        """The rewards of the answers. One that fails is named, and has no say for any of them."""
        parts: dict[str, list[float | None]] = {}
        failures: dict[str, str] = {}
        for own, function in zip(self.settings, self._functions, strict=True):
            name = own.name if own.name not in parts else f"{own.name} ({len(parts) + 1})"
            # The base computes an adapter's scores, and nothing else may use it meanwhile: no thread of its own.
            limit = None if own.adapter is not None else own.time_limit
            found = _within(lambda f=function: f(prompts, completions, **columns), limit)  # type: ignore[misc]
            wrong = found if isinstance(found, str) else _wrong(found, len(completions))
            parts[name] = [None] * len(completions) if wrong else [_number(value) for value in found]
            if wrong:
                failures[name] = wrong
        totals: list[float | None] = []
        for index in range(len(completions)):
            said = [(own.weight, values[index]) for own, values in zip(self.settings, parts.values(), strict=True)]
            known = [weight * value for weight, value in said if weight and value is not None]
            totals.append(sum(known) if known else None)
        return Rewarded(totals, parts, failures)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _wrong(found: Any, count: int) -> str:
    """What is wrong with the values that a reward gives; "": nothing."""
    if isinstance(found, (str, bytes)) or not hasattr(found, "__len__") or not hasattr(found, "__iter__"):
        return f"it gave {shown(found)} instead of {count} numbers"
    if len(found) != count:
        return f"it gave {len(found)} values for {count} answers"
    for place, value in enumerate(found):
        if value is None:
            continue
        try:
            finite = math.isfinite(float(value))
        except (TypeError, ValueError):
            finite = False
        if finite and not isinstance(value, str):
            continue
        return f"its value for answer {place + 1} is {shown(value)}, and no finite number"
    return ""


def _within(call: Callable[[], Any], seconds: float | None) -> Any:
    """What the call gives; a sentence, if it fails or takes longer. None: in this thread, as long as it takes."""
    if seconds is None:
        return call()
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:
            found.append(f"it raised {type(error).__name__}: {str(error)[:300]}")

    # A thread that hangs cannot be ended; as a daemon it does not keep the process from ending.
    thread = threading.Thread(target=run, daemon=True, name="weft-reward")
    thread.start()
    thread.join(seconds)
    return found[0] if found else f"it took longer than {seconds:g} s (time_limit)"
