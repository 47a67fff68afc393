"""The findings of a base's proof, as plain data, and the ``Architecture`` that follows from them."""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

from torch import nn

from weft.core.architecture import Architecture, Installer
from weft.models.facts import sketch
from weft.models.fused import MIXINS, Kinds, install_fused
from weft.models.interface import install_interface
from weft.models.tables import install_tables, tables_move
from weft.ops.loss import HeadForm

# The way of attention along the stream: with fused blocks, by transformers' attention interface, by an installer of
# this type of model alone; or none (padded batches).
Way = Literal["fused", "interface", "own", "padded"]


@dataclass(frozen=True)
class Finding:
    """All that the proof adds to tables and names (``sketch``); fields of the same name are the architecture's."""

    blocks: tuple[str, ...]
    way: Way
    # Module path -> the name of the class that fuses it.
    fused: dict[str, str]
    _: KW_ONLY
    # Modules whose tables depend on the whole pass.
    tables: tuple[str, ...]
    by_ids: bool
    body: str
    head_form: HeadForm | None
    unreachable: dict[str, str]
    padded_because: str


def with_tables(shape: Architecture, paths: tuple[str, ...]) -> Architecture:
    """The architecture whose modules at ``paths`` give their tables sequence by sequence."""
    if not paths:
        return shape
    install, moves = functools.partial(install_tables, paths=paths), functools.partial(tables_move, paths=paths)
    return replace(shape, install_tables=install, tables_move=moves)


def with_way(shape: Architecture, way: Way, kinds: Kinds | None = None) -> Architecture:
    """The architecture that runs this way; ``own`` is its own installer."""
    if way == "own":
        return shape
    fused = functools.partial(install_fused, kinds=kinds or {})
    installers: dict[str, Installer | None] = {"fused": fused, "interface": install_interface, "padded": None}
    return replace(shape, install_attention=installers[way])


def fused_kinds(shape: Architecture) -> Kinds:
    """The modules that are fused when it runs, and the classes that fuse them."""
    return getattr(shape.install_attention, "keywords", {}).get("kinds", {})


def finding_of(proved: Architecture) -> Finding:
    """The finding about the base whose proved architecture this is."""
    install: Any = proved.install_attention
    fused = fused_kinds(proved)
    tables = getattr(proved.install_tables, "keywords", {}).get("paths", ())
    way: Way = "own"
    if install is None:
        way = "padded"
    elif install is install_interface:
        way = "interface"
    elif fused:
        way = "fused"
    return Finding(
        proved.blocks, way, {path: mixin.__name__ for path, mixin in fused.items()}, tables=tuple(tables),
        by_ids=proved.by_ids, body=proved.body, head_form=proved.head_form, unreachable=dict(proved.unreachable),
        padded_because=proved.padded_because,
    )  # fmt: skip


def architecture_of(model: nn.Module, finding: Finding) -> Architecture:
    """The proved architecture of a model from an earlier finding.

    Raises:
        KeyError: It names modules that this model does not have.
    """
    shape = sketch(model)
    if shape.blocks != finding.blocks:
        shape = sketch(model, set(finding.blocks))
    kinds = {path: MIXINS[name] for path, name in finding.fused.items()}
    if gone := {*kinds, *finding.tables, *finding.blocks} - {path for path, _ in model.named_modules()}:
        raise KeyError(*sorted(gone))
    shape = with_way(with_tables(shape, finding.tables), finding.way, kinds)
    return settled(replace(shape, by_ids=finding.by_ids, body=finding.body, head_form=finding.head_form), finding)


def settled(shape: Architecture, finding: Finding) -> Architecture:
    """The architecture without modules on which no adapter can sit, and with the reason for padded batches, if any."""
    gone = finding.unreachable
    return replace(
        shape,
        linears=tuple(path for path in shape.linears if path not in gone),
        norms=tuple(path for path in shape.norms if path not in gone),
        unreachable=gone,
        padded_because=finding.padded_because,
    )
