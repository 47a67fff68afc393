"""The copy of a file's values into an adapter's tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from weft.errors import UserError, nearest


def checked(tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor ``key``, which must have the shape ``shape``.

    Raises:
        UserError: It is missing or has another shape.
    """
    if key not in tensors:
        raise UserError(f"the adapter's file has no tensor '{key}'.{nearest(key, tensors)}")
    value = tensors[key]
    if tuple(value.shape) != shape:
        why = "Was the adapter made for another base?"
        if not value.numel():
            why = "A tensor of no elements was saved of a model in shards (ZeRO-3, FSDP) that were not gathered before."
        raise UserError(
            f"tensor '{key}' has shape {tuple(value.shape)}; this base and configuration need {shape}. {why}"
        )
    return value


def copy_into(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors into ``own``, which must have the same names and shapes.

    Raises:
        UserError: A tensor is missing, has another shape, or is not one of ``own``.
    """
    for key, parameter in own.items():
        parameter.data.copy_(checked(tensors, key, tuple(parameter.shape)))
    # A tensor that is left over would silently be ignored.
    foreign = sorted(set(tensors) - set(own))
    if foreign:
        raise UserError(f"the adapter's file holds tensors that nothing here uses: {', '.join(foreign[:5])} ...")
