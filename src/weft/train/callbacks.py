"""Callbacks: functions of users that hear the events of a run and may ask it to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from weft.extensions import Registry
from weft.train.loop import Event

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


class Listeners:
    """Everybody who hears the events of a run: the callbacks and ``on_event``."""

    def __init__(
        self,
        callbacks: Sequence[Callable[[Event], bool | None]],
        on_event: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self._callbacks, self._on_event, self._should_stop = callbacks, on_event, should_stop
        self._asked = False

    def tell(self, event: Event) -> None:
        """Pass an event on."""
        self._on_event(event)
        for callback in self._callbacks:
            self._asked = callback(event) is True or self._asked

    def stop(self) -> bool:
        """Whether the run is to save and stop."""
        return self._should_stop() or self._asked
