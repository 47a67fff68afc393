"""What a format of export is asked, and what it answers. Each format is one file in ``weft.export.formats``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from weft.export.loaders import Loader

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Material:
    """What is exported: an adapter's folder, or a model's.

    Attributes:
        folder: the adapter's; of a format that is made of a model, the model's, into which an adapter was merged.
        name: what the result is called.
        base: the folder or hub id of the adapter's base; None for a plain model.
        adapter: the adapter's own folder, also where it was merged; None for a plain model.
    """

    folder: Path
    name: str
    _: KW_ONLY
    base: str | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class Written:
    """What a format has written into the new folder.

    Attributes:
        lines: figures for people, such as those of a proof.
        commands: how it is loaded.
        figures: the same figures for programs.
        notes: what the user should know.
    """

    lines: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    _: KW_ONLY
    figures: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    loaders: list[Loader] = field(default_factory=list)


class Format:
    """A format of export.

    Attributes:
        kinds: what the tensors can be kept in, the usual one first; empty: as they are.
        of_model: whether it is made of a model, so that an adapter is merged first.
    """

    name: ClassVar[str]
    sentence: ClassVar[str]
    kinds: ClassVar[Mapping[str, str]] = {}
    of_model: ClassVar[bool] = False

    def check(self, material: Material, entries: Mapping[str, Any]) -> None:
        """Refuse early what cannot be written; ``entries`` are those of the model's ``config.json``, if it is here.

        Raises:
            UserError: It cannot.
        """

    def check_model(self, config: PreTrainedConfig) -> None:
        """Refuse a model that cannot be written, before an adapter is merged into it.

        Raises:
            UserError: It cannot.
        """

    def write(self, material: Material, part: Path, kind: str) -> Written:
        """Write the material into the new folder ``part``.

        Raises:
            UserError: The format has no place for something, or what was written is not what it should be.
        """
        raise NotImplementedError
