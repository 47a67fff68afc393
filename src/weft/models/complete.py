"""The check that a model's files hold its tensors, all of them and in its shapes. transformers only warns, and fills in
random numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from weft.errors import UserError
from weft.ops.copying import turned

_NAMED = 3  # tensors of each kind that a message names


def check_complete(
    name: str,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    own: Collection[str] | None = None,
) -> None:
    """Refuse a model that was not loaded from its files as a whole.

    Args:
        name: the model, for the message.
        missing, unexpected, mismatched: as transformers tells them (``loading_info``).
        own: the only tensors that matter; default: all.

    Raises:
        UserError: A tensor is missing (the message also tells which ones have no place), or has another shape.
    """
    lost = sorted(key for key in missing if own is None or key in own)
    if lost:
        strange = sorted(unexpected)
        beside = f"; its files hold {named(strange)} that it has no place for" if strange else ""
        raise UserError(f"the model {name!r} lacks {len(lost)} of its tensors: {_listed(lost)}{beside}.")
    for key, found, wanted in sorted(entry for entry in mismatched if own is None or entry[0] in own):
        raise UserError(
            f"the model {name!r} is damaged: {key} is {tuple(found)}, its config.json says {tuple(wanted)}."
            f"{turned(found, wanted)}"
        )


def named(keys: Sequence[str]) -> str:
    """The number of tensors and the first names."""
    return f"{len(keys)} {'tensor' if len(keys) == 1 else 'tensors'} ({_listed(keys)})"


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_NAMED]) + " ..." * (len(keys) > _NAMED)
