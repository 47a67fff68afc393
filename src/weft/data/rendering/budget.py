"""The budget of one rendering of a chat template: each operation tells its cost before it runs.

The limits grow with the input, so that a long conversation is never too long. They stop what grows by itself. Time is
that of the thread, so that a busy machine refuses nothing.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import update_wrapper
from typing import Any, TypeVar

SECONDS = 1.0  # and a second more for each million characters given
STRING = 4 << 20  # characters of one string, and 16 times those given
CREATED = 32 << 20  # characters and entries made in all, and 128 times those given
VALUES = 500_000  # in a nested list or object that is written or compared, and 16 times those given
NUMBER = 100_000  # largest width, count or precision
_BITS = 4096
_LOOK = 32  # ticks between two looks at the clock
_INDENT = 32
_WIDTH = re.compile(r"\d+")
_PERCENT = re.compile(r"%(?:\(([^()]*)\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")
_ENTRIES = 100_000  # of a list that an operator makes

Value = TypeVar("Value")
BUDGET: ContextVar[Budget] = ContextVar("weft_template_budget")


class LimitError(Exception):
    """A template reached a limit; the message says which."""


class Budget:
    """Counts what one rendering does. Methods that take a value return it, or its text."""

    def __init__(self, given: object) -> None:
        self._most_values = 1 << 62
        nodes, characters = self._weigh(given)
        size = nodes + characters
        self._most_string = STRING + 16 * size
        self._most_created = CREATED + 128 * size
        self._most_values = VALUES + 16 * nodes
        self._deadline = time.thread_time() + SECONDS + size / 1e6
        self._ticks = self._look = self._created = self._output = 0

    # -- steps

    def tick(self, written: int = 0) -> bool:
        """Count a turn of a loop, a call, a filter or a test, in which the template writes that many characters."""
        self._ticks += 1
        if written:
            self._charge(written)
        if self._ticks > self._look:
            self._look = self._ticks + _LOOK
            if time.thread_time() > self._deadline:
                raise LimitError(f"it takes more than {SECONDS:g} s; it seems to loop without end")
        return True

    def steps(self, value: object) -> None:
        """Count the turns that a walk through all of ``value`` may take."""
        if isinstance(value, (list, tuple, dict, str, range)):
            self._ticks += len(value) >> 8
        self.tick()

    def written(self, piece: str) -> None:
        """Count a piece of the result."""
        self._output += len(piece)
        if self._output > self._most_string:
            raise LimitError(f"it writes more than {self._most_string} characters")

    def _charge(self, size: int) -> None:
        self._created += size
        if self._created > self._most_created:
            raise LimitError(f"it makes more than {self._most_created} characters and entries")

    # -- values

    def made(self, value: Any) -> Any:
        """Count the size of a new value."""
        kind = type(value)
        if kind is str:
            self._fits(len(value))
            self._charge(len(value))
        elif kind in (list, tuple, dict, bytes):
            self._charge(len(value))
        return value

    def out(self, value: object) -> str:
        """The text of a value that the template writes."""
        text = self._text(value)
        self._charge(len(text))
        return text

    def concatenated(self, values: list[object]) -> str:
        """The text of ``a ~ b ~ c``."""
        pieces = [self._text(value) for value in values]
        self._fits(sum(map(len, pieces)))
        self.tick()
        return self.made("".join(pieces))

    def new(self, value: Value) -> Value:
        """Weigh a literal list, tuple or object with all that it nests, because it may hold one value many times."""
        self.tick()
        self._charge(self._weigh(value)[0] // 8)
        return value

    def compared(self, value: Value) -> Value:
        """Count an operand of a comparison, which may look at all of it."""
        kind = type(value)
        if kind is str or kind is bool or kind is int or value is None:
            return value
        if isinstance(value, (list, tuple, dict)):
            self.steps(value)
            if len(value) > _LOOK or any(isinstance(item, (list, tuple, dict)) for item in _items(value)):
                self._charge(self._weigh(value)[0] // 64)
        return value

    def _text(self, value: object) -> str:
        if type(value) is str:
            return value
        self.check_text(value)
        return str(value)

    def check_text(self, value: object) -> None:
        """Refuse a value whose text would be too long. Containers may hold one value many times."""
        if isinstance(value, (list, tuple, dict)):
            self._fits(sum(self._weigh(value)))

    def _fits(self, size: int) -> None:
        if size > self._most_string:
            raise LimitError(f"it makes a string of more than {self._most_string} characters")

    def _weigh(self, value: object) -> tuple[int, int]:
        """(values, characters) of a nested value; each counts as often as its text would hold it."""
        nodes = characters = 0
        todo = [value]
        while todo:
            one = todo.pop()
            nodes += 1
            if isinstance(one, (str, bytes)):
                characters += len(one)
            elif isinstance(one, (list, tuple, dict)):
                if nodes + len(todo) + len(one) > self._most_values:
                    raise LimitError(f"it nests more than {self._most_values} values")
                todo += _items(one)
                if isinstance(one, dict):
                    todo += one.keys()
        return nodes, characters

    # -- operators

    def check_sum(self, left: object, right: object) -> None:
        """Refuse ``left + right`` if it would be too large."""
        if isinstance(left, str) and isinstance(right, str):
            self._fits(len(left) + len(right))
        elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
            self._entries(len(left) + len(right))
        self.tick()

    def check_product(self, left: object, right: object) -> None:
        """Refuse ``left * right`` if it would be too large."""
        if isinstance(left, int) and not isinstance(right, int):
            left, right = right, left
        if isinstance(left, str) and isinstance(right, int):
            self._fits(len(left) * max(right, 0))
        elif isinstance(left, (list, tuple, bytes)) and isinstance(right, int):
            self._entries(len(left) * max(right, 0))
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _BITS:
            raise LimitError(f"it makes a number of more than {_BITS} bits")
        self.tick()

    def check_power(self, left: object, right: object) -> None:
        """Refuse ``left ** right`` if it would be too large."""
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _BITS:
            raise LimitError(f"it makes a number of more than {_BITS} bits")
        self.tick()

    def _entries(self, count: int) -> None:
        if count > _ENTRIES + self._most_values - VALUES:
            raise LimitError(f"it makes a list of {count} entries")

    # -- arguments

    def check_numbers(self, name: str, values: Iterable[object]) -> None:
        """Refuse widths, counts and precisions that no text has."""
        for value in values:
            if isinstance(value, int) and abs(value) > NUMBER:
                raise LimitError(f"{name} is given a number of more than {NUMBER}")

    def check_width(self, spec: str) -> None:
        """Refuse a format of a field with such a width."""
        self._fits(len(spec))
        if any(len(digits) > 9 or int(digits) > NUMBER for digits in _WIDTH.findall(spec)):
            raise LimitError(f"a format is wider than {NUMBER}")

    def check_replaced(self, text: str, old: object, new: object) -> None:
        """Refuse ``text.replace(old, new)`` if it would be too large."""
        if isinstance(old, str) and isinstance(new, str):
            self._fits(len(text) + text.count(old) * len(new))

    def check_joined(self, items: list[object], between: object) -> None:
        """Refuse ``between.join(items)`` if it would be too large."""
        self._fits(sum(self._weigh(items)) + len(items) * len(str(between)))


def _items(value: Sequence[object] | dict[object, object]) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value


def guard_percent(budget: Budget, text: str, values: object) -> None:
    """Refuse ``text % values`` that would be too large."""
    budget._fits(len(text))
    places = 0
    for found in _PERCENT.finditer(text):
        places += 1
        for width in (found[2], found[3]):
            if width == "*":
                raise LimitError("a format takes its width from a value")
            if width is not None:
                budget.check_width(width)
    one_by_one = isinstance(values, tuple) and "%(" not in text
    total = sum(budget._weigh(values))
    budget._fits(len(text) + (total if one_by_one else places * total))


def guard_method(budget: Budget, owner: object, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a method of a string or a number whose result would be too large."""
    budget.check_numbers(name, (*args, *kwargs.values()))
    if not isinstance(owner, str):
        if isinstance(owner, bytes) and name != "decode":
            raise LimitError(f"it calls bytes.{name}")
        return
    if name == "replace" and len(args) > 1:
        budget.check_replaced(owner, args[0], args[1])
    elif name == "join" and args and isinstance(args[0], (list, tuple, dict)):
        budget.check_joined(list(args[0]), owner)
    elif name == "join":
        raise LimitError("str.join is given something else than a list")
    elif name == "expandtabs":
        budget._fits(len(owner) + owner.count("\t") * max([8, *(a for a in (*args, *kwargs.values()) if a)]))
    elif name == "translate" and args:
        table = args[0] if isinstance(args[0], dict) else {}
        budget._fits(len(owner) * max([1, *(len(v) for v in table.values() if isinstance(v, str))]))


_TEXTS = frozenset(
    ("string", "e", "escape", "forceescape", "safe", "upper", "lower", "title", "capitalize", "trim", "replace",
     "center", "indent", "truncate", "tojson", "format", "urlencode", "join", "int", "float")
)  # fmt: skip


def guard_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja's with its arguments checked and its result counted."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0
    signature, guard = inspect.signature(function), _MULTIPLY.get(name)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        value, rest = args[first] if len(args) > first else "", args[first + 1 :]
        budget.steps(value)
        if rest or kwargs:
            budget.check_numbers(name, (*rest, *kwargs.values()))
        if name in _TEXTS:
            budget.check_text(value)
        if name == "join":  # an iterator gives its items only once
            args = (*args[:first], list(value), *rest)
        if guard is not None:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            guard(budget, given.arguments)
        return budget.made(function(*args, **kwargs))

    return update_wrapper(guarded, function)


def _join(budget: Budget, given: Mapping[str, Any]) -> None:
    budget.check_joined(given["value"], given["d"])


def _replace(budget: Budget, given: Mapping[str, Any]) -> None:
    texts = [given[name] for name in ("s", "old", "new")]
    for text in texts:
        budget.check_text(text)
    budget.check_replaced(*map(str, texts))


def _indent(budget: Budget, given: Mapping[str, Any]) -> None:
    text, width = str(given["s"]), given["width"]
    blanks = width if isinstance(width, int) else len(str(width))
    budget._fits(len(text) + (text.count("\n") + 1) * blanks)


def _tojson(budget: Budget, given: Mapping[str, Any]) -> None:
    for option in list(given.values())[1:]:
        if (isinstance(option, int) and option > _INDENT) or (isinstance(option, str) and len(option) > _INDENT):
            raise LimitError(f"tojson is given more than {_INDENT} blanks")
        if isinstance(option, (list, tuple)) and any(len(str(one)) > _INDENT for one in option):
            raise LimitError("tojson is given long separators")


def _format(budget: Budget, given: Mapping[str, Any]) -> None:
    guard_percent(budget, str(given["value"]), given["kwargs"] or given["args"])


def _sum(budget: Budget, given: Mapping[str, Any]) -> None:
    if not isinstance(given["start"], (int, float)):
        raise LimitError("sum begins with something else than a number")


# The check of a filter gets its arguments by the names of the parameters of the filter's function.
_MULTIPLY: dict[str, Callable[[Budget, Mapping[str, Any]], None]] = {
    "join": _join,
    "replace": _replace,
    "indent": _indent,
    "tojson": _tojson,
    "format": _format,
    "sum": _sum,
}


def guard_test(function: Callable[..., Any]) -> Callable[..., Any]:
    """A test of jinja's that counts as a step, with what it compares."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        budget.tick()
        if len(args) > first + 1:
            for value in args[first:]:
                budget.compared(value)
        return function(*args, **kwargs)

    return update_wrapper(guarded, function)
