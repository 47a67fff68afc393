"""What `weft verify` says of two sides, whatever they are."""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass

from weft.export.sides import ModelHere


@dataclass(frozen=True)
class ModelFacts:
    """What a side is: the name that the user gave, its kind, and the format of its weights."""

    name: str
    kind: str
    format: str

    @classmethod
    def of(cls, side: ModelHere) -> ModelFacts:
        """The facts of a model on this machine."""
        return cls(side.name, side.kind, side.format)

    def line(self, side: str) -> str:
        """The facts as a line for people."""
        return f"{side}: {self.name} ({self.kind}, {self.format})"


@dataclass(frozen=True)
class Verdict:
    """How two sides compare.

    Attributes:
        differences: what differs by more than rounding explains, the nearest cause first; none: they are equal.
        notes: what the user should know.
    """

    a: ModelFacts
    b: ModelFacts
    _: KW_ONLY
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs by more than rounding explains."""
        return not self.differences

    def lines(self) -> list[str]:
        """The figures as lines for people."""
        return [self.a.line("A"), self.b.line("B")]

    def entries(self) -> dict[str, object]:
        """All of it, as JSON holds it."""
        return {"equal": self.equal, **asdict(self)}
