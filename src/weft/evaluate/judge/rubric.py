"""A rubric: a scale, and criteria with a name and a sentence each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from weft.errors import UserError, nearest
from weft.foreign import expect, read_yaml

_KEYS = ("scale", "criteria")
_LARGEST = 100  # steps of a scale


@dataclass(frozen=True)
class Rubric:
    """By what an answer is judged.

    Args:
        criteria: name -> sentence.
        scale: the lowest and the highest score, whole numbers.

    Raises:
        UserError: There is no criterion, one has no sentence or is called ``reason``, or the scale is none.
    """

    criteria: Mapping[str, str]
    scale: tuple[int, int] = field(default=(1, 5))

    def __post_init__(self) -> None:
        low, high = self.scale
        if not low < high <= low + _LARGEST:
            raise UserError(f"the scale is {low} to {high}; expected two whole numbers, the lower one first.")
        if not self.criteria:
            raise UserError("a rubric needs at least one criterion.")
        for name, text in self.criteria.items():
            if not name.strip() or not text.strip() or name == "reason":
                raise UserError(f"the criterion {name!r} needs a name other than 'reason', and a sentence.")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The rubric in a YAML (or JSON) file with ``criteria`` and perhaps a ``scale``.

        Raises:
            UserError: It is none; the message names the key.
        """
        found = expect(read_yaml(path), dict, str(path))
        for key in found:
            if key not in _KEYS:
                raise UserError(
                    f"{path}: '{key}' is no key of a rubric.{nearest(str(key), _KEYS)} There are: scale, criteria."
                )
        criteria = expect(found.get("criteria"), dict, f"{path}: criteria")
        sentences = {str(name): expect(text, str, f"{path}: criteria: {name}") for name, text in criteria.items()}
        scale = expect(found.get("scale", [1, 5]), list, f"{path}: scale")
        if len(scale) != 2:
            raise UserError(f"{path}: scale: expected two whole numbers, such as [1, 5].")
        low, high = (expect(one, int, f"{path}: scale") for one in scale)
        try:
            return cls(sentences, (low, high))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def listed(self) -> list[dict[str, str]]:
        """The criteria as a template sees them."""
        return [{"name": name, "text": text} for name, text in self.criteria.items()]
