"""A way in which rows go on. The engine has those that the base's layout allows, and asks each in every step."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from weft.core.layout import Counts
from weft.generation.row import Row


class Way(ABC):
    """Rows that go on together."""

    @abstractmethod
    def add(self, row: Row) -> bool:
        """Take a row in; False: there is no room now."""

    @abstractmethod
    def step(self) -> list[tuple[list[Row], Tensor]]:
        """One pass of the base. Groups of rows whose next token is to be chosen, with their hidden states [n, d]; in
        each, the rows of one adapter lie side by side."""

    @abstractmethod
    def drop(self, row: Row) -> None:
        """Let a row go, whether it has ended or not."""

    def pushed_out(self) -> list[Row]:
        """The rows that had to leave since the last call, for want of room; they begin again later."""
        return []


def counts_of(rows: Sequence[Row]) -> Counts:
    """(adapter, how many rows of it), in the order of the rows."""
    return [(name, len(list(own))) for name, own in itertools.groupby(rows, key=lambda row: row.adapter)]
