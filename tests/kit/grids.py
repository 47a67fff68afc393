"""Products of parameters of which the usual run takes a part."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def in_turn(*axes: Iterable[Any], take: int = 1) -> list[Any]:
    """The product of the axes, for ``pytest.mark.parametrize``; all but a part of it is slow.

    With each combination of the first axes go ``take`` values of the last, in turn. So every two values of two axes
    meet, if the last axis is the shortest and there are three. ``pytest.param`` among the values keeps id and marks.
    """
    lists = [[v if hasattr(v, "marks") else pytest.param(v, id=str(v)) for v in axis] for axis in axes]
    last, found = len(lists[-1]), []
    for places in itertools.product(*map(range, map(len, lists))):
        chosen = [axis[place] for axis, place in zip(lists, places, strict=True)]
        marks = [mark for value in chosen for mark in value.marks]
        if (places[-1] - sum(places[:-1])) % last >= take:
            marks.append(pytest.mark.slow)
        values = [value for one in chosen for value in one.values]
        found.append(pytest.param(*values, marks=marks, id="-".join(str(one.id) for one in chosen)))
    return found
