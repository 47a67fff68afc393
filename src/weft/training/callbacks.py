"""Callbacks: functions of users that hear the events of a run and may ask it to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from weft.extensions import Registry
from weft.training.loop import Event

# The run's ``Setup`` -> what is called with every event; True asks the run to save and stop.
Callback = Callable[[Any], Callable[[Event], bool | None]]
_Made = TypeVar("_Made", bound=Callback)
CALLBACKS: Registry[Callback] = Registry("callback")


def register_callback(name: str) -> Callable[[_Made], _Made]:
    """A decorator of a function or class that is called with the run's ``Setup`` and gives what hears the events.

    Raises:
        UserError: the name is taken.
    """
    return CALLBACKS.register(name, lambda callback: callback)


def with_callbacks(
    callbacks: Sequence[Callable[[Event], bool | None]],
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> tuple[Callable[[Event], None], Callable[[], bool]]:
    """``on_event`` and ``should_stop`` of a run that the callbacks hear and may stop."""
    asked: list[bool] = []

    def tell(event: Event) -> None:
        on_event(event)
        asked.extend(True for callback in callbacks if callback(event) is True)

    return tell, lambda: should_stop() or bool(asked)
