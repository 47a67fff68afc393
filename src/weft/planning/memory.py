"""What a run holds at its fullest, by cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from weft.machine import UNSEEN, held_at_most
from weft.planning.dry_run import Recording
from weft.planning.heap import Heap, HeapAndRooms, heap_of, peak_of

# In the order of a table, with what each of them is.
CAUSES = {
    "weights": "the base",
    "scales": "of a quantised base",
    "adapters": "what is trained",
    "gradients": "",
    "optimizer": "its state",
    "activations": "kept for the backward pass",
    "logits": "a chunk of them",
    "workspace": "what passes within a step, and gaps between pieces",
    "library": "Python, torch, the data",
}
_CAUSE_OF_PHASE = {"forward": "activations", "logits": "logits"}


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes that a run holds at its fullest, by cause, in the order of ``CAUSES``."""

    by_cause: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.by_cause.values())


def of_recording(recording: Recording, device: str) -> dict[str, int]:
    """The bytes of gradients, optimizer, activations, logits and workspace at the fullest moment of a recording.

    Activations are what a forward pass made and the fullest moment still finds. The gaps that the C library leaves
    between pieces count as workspace.
    """
    most, at = peak_of(recording.pieces, heap_of(device))
    if device == "cpu":
        # Of the largest pieces some lie in the heap and some beside it: the plan takes what holds more.
        alone = most
        most, at = max((most, at), peak_of(recording.pieces, HeapAndRooms()))
        used, then = peak_of(recording.pieces, Heap(mmap_threshold=0, page=1))
        # A heap that grows beyond the limit by itself has done so, by some, before anybody looks.
        if (limit := max(held_at_most(used), min(alone, held_at_most(used) + UNSEEN))) < most:
            most, at = limit, then
    found: Counter[str] = Counter()
    for piece in recording.pieces:
        if piece.held_at(at):
            found[piece.cause or _CAUSE_OF_PHASE.get(piece.phase, "workspace")] += piece.bytes
    found["workspace"] += max(0, most - sum(found.values()))
    return dict(found)
