"""Sequences laid end to end, row by row, before they are tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from weft.core.adapter import Run
from weft.ops.sequence_layout import Sharing


@dataclass(kw_only=True)
class EndToEnd:
    """The rows of a batch. Every sequence has rows of its own; before them it may see the first rows of another.

    Attributes:
        ids: of each row the token, 0 of a virtual one.
        positions: of each row its position.
        rows: of each sequence the rows of its own tokens.
        shown: of each sequence the rows of another that stand before its own.
        own: of each sequence all rows of its own, virtual ones included.
        joints: a row that follows shared ones -> the last of these.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: list[Sequence[int]] = field(default_factory=list)
    shown: list[range] = field(default_factory=list)
    own: list[range] = field(default_factory=list)
    joints: dict[int, int] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """Of each sequence the rows of its own."""
        return list(map(len, self.own))

    def add(self, sequence: Sequence[int], runs: Sequence[Run], position: int) -> list[int]:
        """A sequence whose rows are all its own, from this position on; returns the rows of its virtual tokens."""
        start, length = len(self.ids), len(sequence) + sum(count for _, count in runs)
        taken: list[int] = []
        rows: Sequence[int] = range(start, start + length)
        if runs:
            rows, taken = interleave(len(sequence), runs, start)
        self.ids.extend([0] * length)
        for row, token in zip(rows, sequence, strict=True):
            self.ids[row] = token
        self.positions.extend(range(position, position + length))
        self._note(rows, range(start, start), range(start, start + length))
        return taken

    def follow(self, sequence: Sequence[int], shared: int, leader: int) -> None:
        """A sequence whose first ``shared`` tokens, with the virtual ones before them, are those of the ``leader``."""
        start, count = len(self.ids), len(sequence) - shared
        theirs = self.rows[leader]
        # What stands right before the leader's next token, a virtual token perhaps, stands before ours too.
        seen = range(self.own[leader].start, theirs[shared])
        self.ids.extend(sequence[shared:])
        position = self.positions[theirs[shared]]
        self.positions.extend(range(position, position + count))
        self.joints[start] = seen.stop - 1
        self._note([*theirs[:shared], *range(start, start + count)], seen, range(start, start + count))

    def _note(self, rows: Sequence[int], shown: range, own: range) -> None:
        self.rows.append(rows)
        self.shown.append(shown)
        self.own.append(own)

    def sharing(self, groups: list[int]) -> tuple[Sharing, ...]:
        """Which sequences see the rows of others; ``groups``, of each sequence its own, become those of the layout.

        Sequences that see the same rows get a group of their own, behind all others.
        """
        found: dict[tuple[int, int], Sharing] = {}
        fresh = max(groups, default=-1) + 1
        for number, before in enumerate(self.shown):
            if not before:
                continue
            key = before.start, before.stop
            if key not in found:
                found[key] = Sharing(fresh + len(found), before.start, before.stop, groups[number])
            groups[number] = found[key].group
        return tuple(found.values())


def interleave(length: int, runs: Sequence[Run], start: int) -> tuple[list[int], list[int]]:
    """Rows, from ``start``, of a sequence's own tokens, and those of its virtual tokens in the order of ``runs``."""
    own: list[int] = []
    taken: dict[int, range] = {}
    row = start
    for index in sorted(range(len(runs)), key=lambda i: runs[i][0]):
        place, count = runs[index]
        ahead = place - len(own)
        own.extend(range(row, row + ahead))
        taken[index] = range(row + ahead, row + ahead + count)
        row += ahead + count
    own.extend(range(row, row + length - len(own)))
    return own, [virtual for index in range(len(runs)) for virtual in taken[index]]
