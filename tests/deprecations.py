"""A deprecated call by Weft (or by a test itself) fails the test that makes it.

Filters of ``warnings`` look at one frame, which is often torch's ``Module.__call__``; and transformers announces some
deprecations by its logger, once per process. So both are asked who called: the first frame that is neither machinery
nor the function that complains.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
OURS = (str(ROOT / "src" / "weft") + "/", str(ROOT / "tests") + "/")
# Decorators and output classes that complain in the name of what they wrap.
WRAPPERS = ("/transformers/utils/", "/typing_extensions.py", "/torch/utils/_contextlib.py", "/warnings.py")
DISPATCH = (
    "/torch/nn/modules/module.py", "/torch/utils/", "/functools.py", "/contextlib.py", "/logging/__init__.py",
    "/tests/deprecations.py",
)  # fmt: skip


def caller(frame: FrameType | None) -> str:
    """The file of whoever made the deprecated call; ``frame``: the innermost one, which complains."""
    wrapped = False
    while frame is not None and _of(frame, (*WRAPPERS, *DISPATCH)):
        wrapped = wrapped or _of(frame, WRAPPERS)
        frame = frame.f_back
    if frame is not None and not wrapped:
        frame = frame.f_back
    while frame is not None and _of(frame, DISPATCH):
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_filename


def _of(frame: FrameType, parts: tuple[str, ...]) -> bool:
    return any(part in frame.f_code.co_filename for part in parts)


def check(message: object, frame: FrameType | None) -> None:
    """Fail if the caller is ours."""
    found = caller(frame)
    if found.startswith(OURS) and "/site-packages/" not in found:
        pytest.fail(f"{Path(found).relative_to(ROOT)} makes a deprecated call: {message}")


def install() -> None:
    """Watch ``warnings.warn`` and every logger of a library, for as long as the process lives."""
    warn, warning = warnings.warn, logging.Logger.warning

    def watched_warn(message: Any, category: Any = None, *args: Any, **kwargs: Any) -> None:
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        if issubclass(kind, (DeprecationWarning, FutureWarning)):
            check(message, sys._getframe(1))
        kwargs["stacklevel"] = kwargs.get("stacklevel", args[0] if args else 1) + 1
        warn(message, category, **{"source": args[1] if len(args) > 1 else None, **kwargs})

    def watched_warning(self: logging.Logger, msg: Any, *args: Any, **kwargs: Any) -> None:
        if "deprecated" in str(msg) and self.name.partition(".")[0] != "weft":
            check(msg, sys._getframe(1))
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        warning(self, msg, *args, **kwargs)

    warnings.warn = watched_warn
    logging.Logger.warning = watched_warning  # type: ignore[method-assign]
    import transformers.utils.logging

    once = transformers.utils.logging.warning_once

    def watched_once(self: logging.Logger, msg: Any, *args: Any, **kwargs: Any) -> None:
        # The original remembers what it has said; the second who asks would get by.
        if "deprecated" in str(msg):
            check(msg, sys._getframe(1))
        once(self, msg, *args, **kwargs)

    logging.Logger.warning_once = watched_once  # type: ignore[attr-defined]
