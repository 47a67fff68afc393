"""What a tracker is told of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

Scalar = str | int | float | bool
# How the run's process ended: all jobs have, it was asked to stop, or an error ended it.
End = Literal["finished", "stopped", "crashed"]


@dataclass(kw_only=True)
class Facts:
    """What is known of a run before its first step.

    Attributes:
        name: of the run; what a tracker groups its jobs by.
        folder: where the tracker may write. It is in the run's folder, and may not be there yet.
        jobs: the settings of each job by its name.
        ids: what the tracker calls its runs, by job; filled by the tracker, and kept in the run's folder.
        resumed: the run goes on; then ``ids`` are those of before.
    """

    name: str
    folder: Path
    jobs: Mapping[str, Mapping[str, Scalar]]
    ids: dict[str, str] = field(default_factory=dict)
    resumed: bool = False


class Tracker(ABC):
    """One tracker, which has begun. Whatever it raises turns it off, and the run goes on."""

    name: ClassVar[str]

    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    @abstractmethod
    def log(self, job: str, step: int, figures: Mapping[str, float]) -> None:
        """Take finite figures of a job at a step of its."""

    @abstractmethod
    def end(self, how: End, states: Mapping[str, Mapping[str, Scalar]]) -> None:
        """Take the final state of each job (``ended``, ``reason``, figures), and close."""


class SharedRun(Tracker):
    """A tracker that has one run in a process. It holds all jobs; of several, figures are called ``job/loss``."""

    def prefixed(self, job: str, values: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """The values of a job under names that no other job has."""
        return {f"{job}/{key}": value for key, value in values.items()} if len(self.facts.jobs) > 1 else dict(values)

    def settings(self) -> dict[str, Scalar]:
        """The settings of all jobs in one mapping."""
        return {key: one for job, own in self.facts.jobs.items() for key, one in self.prefixed(job, own).items()}
