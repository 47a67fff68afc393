"""Registries, and the files and packages with which users add to them. Only this module runs code of an extension.

An extension is a Python file that the user names, or an installed package with an entry point ``weft.extensions``. It
adds methods, objectives, formats and callbacks to a ``Registry``. No file that Weft reads can name an extension.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, TypeVar

from weft.errors import UserError, nearest
from weft.paths import local_path

GROUP = "weft.extensions"
# For a name that is in no registry.
HOW_TO_LOAD = (
    "A name of an extension is known when the extension is loaded: give --extension FILE.py on the command line, "
    "weft.load_extension('FILE.py') in Python, or install its package (docs/extending.md)."
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_Added = TypeVar("_Added")
_loaded: list[Path] = []
_installed_searched = False


class Registry(MutableMapping[str, _T]):
    """Things of one kind by name: those of Weft and those of extensions.

    The first look into any registry loads the extensions of installed packages.
    """

    def __init__(self, kind: str, own: Mapping[str, _T] | None = None) -> None:
        self.kind = kind
        self._entries = dict(own or {})
        self._added_by: dict[str, str] = {}  # for entries of extensions: the qualified name of what was decorated

    def __getitem__(self, name: str) -> _T:
        _load_installed()
        return self._entries[name]

    def __setitem__(self, name: str, value: _T) -> None:
        self._entries[name] = value

    def __delitem__(self, name: str) -> None:
        del self._entries[name]
        self._added_by.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        _load_installed()
        return iter(self._entries)

    def __len__(self) -> int:
        _load_installed()
        return len(self._entries)

    def find(self, name: str) -> _T:
        """The entry of this name.

        Raises:
            UserError: there is none; lists the names and says how an extension is loaded.
        """
        if name not in self:
            known = ", ".join(sorted(self)) or "none"
            raise UserError(
                f"no {self.kind} named {name!r}.{nearest(name, self)} {self.kind.capitalize()}s: {known}. {HOW_TO_LOAD}"
            )
        return self[name]

    def register(self, name: str, entry: Callable[[Any], _T]) -> Callable[[_Added], _Added]:
        """A decorator that adds ``entry(decorated)`` under ``name``.

        Raises:
            UserError: it is no name, or is taken. (The same function or class again, as in a notebook, takes its own
                place.) Or what is decorated is no function and no class.
        """
        usage = f'write @weft.register_{self.kind}("name") above it'
        if not isinstance(name, str):
            raise UserError(f"{getattr(name, '__qualname__', name)} is registered without a name: {usage}.")

        def add(decorated: _Added) -> _Added:
            if not callable(decorated):
                raise UserError(f"{decorated!r} cannot be the {self.kind} {name!r}: it is no function; {usage}.")
            place = f"{getattr(decorated, '__module__', '')}.{getattr(decorated, '__qualname__', '')}"
            if name in self._entries and self._added_by.get(name) != place:
                owner = self._added_by.get(name, "Weft itself")
                raise UserError(f"{place}: the {self.kind} {name!r} is there already, from {owner}; take another name.")
            self._entries[name] = entry(decorated)
            self._added_by[name] = place
            return decorated

        return add


def load_extension(file: str | os.PathLike[str]) -> None:
    """Run a Python file, which registers what it adds. A file never runs twice.

    The path must come from the user: from the command line or a program. Never call this with the contents of a file.

    Raises:
        UserError: There is no such file, or it fails; the message gives the line.
    """
    path = local_path(file).resolve()
    if path in _loaded:
        return
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"there is no extension at {file}; an extension is a Python file (NAME.py).")
    name = f"weft_extension_{len(_loaded)}_{path.stem}"  # the same in a worker, which loads the same files
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f"{file}:{lines[-1]}" if lines else str(file)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{place}: the extension cannot be loaded: {kind}{error}") from error
    _loaded.append(path)


def loaded_files() -> tuple[Path, ...]:
    """The files that were loaded, in order."""
    return tuple(_loaded)


def _load_installed() -> None:
    """Import once what installed packages offer under ``weft.extensions``. Warn of a broken package."""
    global _installed_searched
    if _installed_searched:
        return
    _installed_searched = True
    from importlib import metadata  # slow, and not needed for --help

    # Where installers write. Not the whole of sys.path: the folder of a model may be the working directory.
    places = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
    points: dict[str, Any] = {}
    for package in metadata.distributions(path=places):
        for point in package.entry_points.select(group=GROUP):
            points.setdefault(point.value, point)
    for value, point in sorted(points.items()):
        try:
            point.load()
        except Exception as error:
            _log.warning("the installed extension %s cannot be loaded: %s: %s", value, type(error).__name__, error)
