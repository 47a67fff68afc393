"""Callbacks: functions of users that hear the events of a run and may ask it to stop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from weft.errors import UserError, shown
from weft.extensions import Registry
from weft.training.loop import Event

# The run's ``Setup`` -> what is called with every event; True asks the run to save and stop.
Callback = Callable[[Any], Callable[[Event], bool | None]]
_Made = TypeVar("_Made", bound=Callback)
CALLBACKS: Registry[Callback] = Registry("callback")
_CALLBACK = (
    "a callback is called once, with the run's Setup, and gives what hears the events (docs/python.md); for events "
    "alone take on_event"
)


def register_callback(name: str) -> Callable[[_Made], _Made]:
    """A decorator of a function or class that is called with the run's ``Setup`` and gives what hears the events.

    Raises:
        UserError: the name is taken.
    """
    return CALLBACKS.register(name, lambda callback: callback)


def check_hearers(callbacks: object, on_event: object, should_stop: object, progress: object) -> None:
    """Refuse what cannot be called as a run calls it (None is never called), and a ``progress`` that is no bool.

    Raises:
        UserError: ``callbacks`` is no list, one of them or another is no function, or takes another number of values.
    """
    if not isinstance(callbacks, (list, tuple)):
        raise UserError(f"callbacks: expected a list of them, not {shown(callbacks)}; {_CALLBACK}.")
    for callback in callbacks:
        if not isinstance(callback, str) and not _takes(callback, 1):
            raise UserError(f"callbacks: {shown(callback)} cannot be called with one value; {_CALLBACK}.")
    if on_event is not None and not _takes(on_event, 1):
        raise UserError(f"on_event: expected a function of one event, not {shown(on_event)}.")
    if should_stop is not None and not _takes(should_stop, 0):
        raise UserError(f"should_stop: expected a function that takes nothing, not {shown(should_stop)}.")
    if not isinstance(progress, bool):
        raise UserError(f"progress: expected True or False, not {shown(progress)}.")


def _takes(function: object, count: int) -> bool:
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # one of C says nothing of itself
        return True
    return True


def begun(callback: Callback, setup: object) -> Callable[[Event], bool | None]:
    """What hears the events for a callback.

    Raises:
        UserError: The callback takes no ``Setup``, or gives nothing that can be called.
    """
    try:
        hears = callback(setup)
    except TypeError as error:
        raise UserError(f"callback {shown(callback)}: {error}; {_CALLBACK}.") from error
    if not callable(hears):
        raise UserError(f"callback {shown(callback)} gave {shown(hears)}; {_CALLBACK}.")
    return hears


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
