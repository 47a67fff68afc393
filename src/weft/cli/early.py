"""Mistakes that show without torch, told before it is imported, which takes seconds.

A copy of the process imports Weft with stand-ins in the place of the large libraries, and runs the same checks that
stand on the full way. So nothing is said twice, and the message is the full check's own. A stand-in can be named,
inherited from and used as a decorator. A check that wants more of it ends the copy without a message; then, and when
the copy finds nothing, the full way decides.
"""

from __future__ import annotations

import abc
import importlib.abc
import importlib.machinery
import logging
import os
import signal
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from weft.errors import UserError

_LARGE = frozenset({
    "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "modelscope", "datasets", "bitsandbytes",
    "numpy", "pyarrow", "jinja2",
})  # fmt: skip
# Of the copy's work and of its life, whatever it meets.
_WORK, _LIFE = 5, 30
_LONGEST = 60_000  # bytes of a message: a pipe takes as many at once


class NotHereError(BaseException):
    """A check wants what only the real library has. It is no Exception, so that no handler makes a message of it."""


class _StandIn:
    """A function, a dtype or another object of a large library. While modules are imported, they may name it."""

    importing = True

    def __getattr__(self, name: str) -> object:
        return _stand_in(name)

    def _name(self, *given: Any, **named: Any) -> Any:
        """Stand for a call or a subscript of a module's top level; as a decorator leave what is decorated."""
        if not _StandIn.importing:
            raise NotHereError
        return given[0] if len(given) == 1 and callable(given[0]) and not named else self

    def _use(self, *given: object) -> NoReturn:
        raise NotHereError

    __call__ = __getitem__ = __setitem__ = __or__ = __ror__ = _name
    __iter__ = __len__ = __bool__ = __contains__ = __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = _use
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _use
    __int__ = __float__ = __index__ = __str__ = __enter__ = __exit__ = __fspath__ = _use
    __hash__ = object.__hash__


class _StandInType(abc.ABCMeta):
    """A class of a large library, from which others may inherit."""

    def __getattr__(cls, name: str) -> object:
        return _stand_in(name)

    def __call__(cls, *given: object, **named: object) -> object:
        if not _StandIn.importing:
            raise NotHereError
        return _StandIn()

    def __instancecheck__(cls, instance: object) -> bool:
        return _unknown()

    def __subclasscheck__(cls, subclass: type) -> bool:
        return _unknown()

    def register(cls, *given: Any) -> Any:  # which ABCMeta has, for something else
        return _StandIn()


class _StandInModule(types.ModuleType):
    def __dir__(self) -> list[str]:
        raise NotHereError

    def __getattr__(self, name: str) -> object:
        found = _stand_in(name)
        setattr(self, name, found)  # a name must mean one class
        return found


def _unknown() -> bool:
    """The answer to what only the real library knows; while modules are imported, no."""
    if not _StandIn.importing:
        raise NotHereError
    return False


def _stand_in(name: str) -> object:
    """A class for the name of a class, else an object."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _StandInType(name, (), {}) if name[0].isupper() and not name.isupper() else _StandIn()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for the large libraries."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The stand-in for a module of a large library."""
        large = fullname.partition(".")[0] in _LARGE
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if large else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Make the stand-in."""
        return _StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Leave it empty."""


class _Doubt(logging.Handler):
    """Ends the copy where an extension could not be loaded: what it registers is then not known here."""

    def emit(self, record: logging.LogRecord) -> None:
        """End the copy."""
        raise NotHereError


def refuse(check: Callable[[], object]) -> None:
    """Run ``check`` in a copy of the process, without the large libraries. It must only read.

    Raises:
        UserError: ``check`` raises it.
    """
    if "torch" in sys.modules or not hasattr(os, "fork"):
        return  # the full way takes no longer
    import pydantic  # noqa: F401  (these three both processes need)
    import regex  # noqa: F401
    import yaml  # noqa: F401

    reading, writing = os.pipe()
    copy = os.fork()
    if copy == 0:
        _in_copy(check, writing)
    os.close(writing)
    with open(reading, encoding="utf-8", errors="surrogateescape") as pipe:
        message = pipe.read()
    os.waitpid(copy, 0)
    if message:
        raise UserError(message)


def set_up() -> None:
    """Import Weft with the stand-ins. This process can then check, and nothing else."""
    sys.meta_path.insert(0, _Finder())
    # What the checks import must be there before stand-ins refuse to be used.
    import weft.combine.rules
    import weft.evaluate.tasks
    import weft.export.exporting
    import weft.export.folder
    import weft.export.targets
    import weft.preview.data_sets
    import weft.sweeps.sweep
    import weft.training.run  # noqa: F401

    _StandIn.importing = False


def _in_copy(check: Callable[[], object], writing: int) -> NoReturn:
    """Write the message of ``check``, if it has one, and end the copy."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, _WORK)
        signal.alarm(_LIFE)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        logging.getLogger("weft.extensions").addHandler(_Doubt())
        set_up()
        check()
    except UserError as error:
        os.write(writing, str(error).encode(errors="surrogateescape")[:_LONGEST])
    finally:
        os._exit(0)
