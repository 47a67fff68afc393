"""The way through a base of which only the shapes are there, as the proof finds it on a small one of its architecture.

Loading proves a way on the real weights. A plan has none, so it proves a random base of two layers (``shape: tiny``),
and takes what holds for a class of modules there to hold for that class in all the layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from weft.models import Base
from weft.models.finding import Finding, finding_of, fused_kinds, with_tables, with_way
from weft.models.load import load_base
from weft.training.settings import RunConfig


@dataclass(frozen=True)
class ProvedWay:
    """What the proof found on the small base, and the classes of modules that are fused, each with what fuses it."""

    finding: Finding
    fused: Mapping[type, type]

    def on(self, sketch: Base) -> Base:
        """The sketch with this way through it."""
        found = self.finding
        modules = sketch.model.named_modules()
        kinds = {path: self.fused[type(module)] for path, module in modules if type(module) in self.fused}
        shape = with_way(with_tables(sketch.architecture, found.tables), found.way, kinds)
        shape = replace(
            shape, by_ids=found.by_ids, body=found.body, head_form=found.head_form, padded_because=found.padded_because
        )
        return replace(sketch, architecture=shape)


def proved_way(config: RunConfig) -> ProvedWay:
    """The way through the base of a run.

    Raises:
        UserError: As ``load_base``.
    """
    tiny = load_base(config.model, dtype=config.dtype, device="cpu", shape="tiny", hub=config.hub)
    kinds = fused_kinds(tiny.architecture)
    by_class: dict[type, set[type | None]] = defaultdict(set)
    for path, module in tiny.model.named_modules():
        by_class[type(module)].add(kinds.get(path))
    alike = {own: next(iter(mixins)) for own, mixins in by_class.items() if len(mixins) == 1}
    return ProvedWay(finding_of(tiny.architecture), {own: mixin for own, mixin in alike.items() if mixin is not None})
