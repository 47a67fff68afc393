"""Answers side by side on a terminal, while they are written."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from weft.cli import common

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

# Cells that a column has at least, with the line beside it; where not all have room, they stand in bands.
_NARROWEST = 30
# Lines of a band that are no text: the heading, the line below it, the foot, an empty one.
_FRAME = 4


class Columns:
    """One column for each name; the texts grow, and the terminal shows their ends until all are whole.

    Attributes:
        texts: so far, in the order of the names.
        feet: what is said below each when it is whole.
    """

    def __init__(self, names: Sequence[str], console: Console) -> None:
        from rich.live import Live

        self.names, self.console = list(names), console
        self.texts, self.feet = [""] * len(names), [""] * len(names)
        self._live = Live(
            console=console, refresh_per_second=12, transient=True, get_renderable=lambda: self.view(console.height - 1)
        )

    def add(self, column: int, text: str) -> None:
        """Let a text go on."""
        self.texts[column] += common.printable(text)

    def view(self, height: int | None = None) -> Group:
        """All columns, of each the last lines that fit into ``height``; None: all lines."""
        from rich.console import Group

        most = max(1, self.console.width // _NARROWEST)
        bands = -(-len(self.names) // most)
        each = -(-len(self.names) // bands)
        lines = None if height is None else max(1, height // bands - _FRAME)
        starts = range(0, len(self.names), each)
        return Group(*[self._band(range(start, min(start + each, len(self.names))), each, lines) for start in starts])

    def _band(self, columns: Sequence[int], each: int, lines: int | None) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        width = max(1, (self.console.width - 3 * each + 1) // each)
        table = Table(box=box.MINIMAL, pad_edge=False, show_edge=False, show_footer=any(self.feet))
        cells = []
        for column in columns:
            # Words longer than a column (Chinese has no spaces) are broken by the cells that they take.
            parts = Text(self.texts[column].strip()).wrap(self.console, width, overflow="fold")
            shown = parts if lines is None else parts[-lines:]
            cells.append(Text("\n").join(shown))
            table.add_column(
                Text(self.names[column], style="bold"),
                Text(self.feet[column], style="dim"),
                width=width,
                overflow="fold",
            )
        table.add_row(*cells)
        return table

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Put the whole texts in the place of what was shown while they grew."""
        self._live.stop()
        if any(self.texts):
            self.console.print(self.view())
