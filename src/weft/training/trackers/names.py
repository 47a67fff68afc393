"""The trackers that there are, by name; nothing of theirs is imported here."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from weft.errors import UserError, nearest, shown

# The name is that of the package, and of Weft's extra.
TRACKERS = ("tensorboard", "wandb", "mlflow", "swanlab", "trackio")
FOLDER = "trackers"  # in the run's folder


def tracker_names(value: Any) -> list[str]:
    """The trackers that ``report_to`` names: a list, one word, or none.

    Raises:
        ValueError: It names another one.
    """
    if value is None or value is False:
        return []
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not all(isinstance(one, str) for one in given):
        raise ValueError(f"expected the names of trackers ({', '.join(TRACKERS)}) or none, not {shown(value)}")
    names = list(dict.fromkeys(one.strip().lower() for one in given))
    if names in (["none"], [""]):
        return []
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"no tracker is named {name!r}; there is {', '.join(TRACKERS)}.{nearest(name, TRACKERS)}")
    return names


def check_installed(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not there.

    Raises:
        UserError: One is not; gives the line that installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to: {name} needs the package {name}: pip install 'weft[{name}]'.")
