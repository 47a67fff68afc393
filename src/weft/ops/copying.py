"""The copy of a file's values into an adapter's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from weft.errors import UserError, nearest

_NAMED = 3  # tensors that a message names


def checked(tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor ``key``, which must have the shape ``shape``.

    Raises:
        UserError: It is missing or has another shape.
    """
    if key not in tensors:
        raise UserError(_missing([key], tensors))
    if tuple(tensors[key].shape) != shape:
        raise UserError(_misshapen(key, tensors[key], shape))
    return tensors[key]


def copy_into(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors into ``own``, which must have the same names and shapes; else nothing is copied.

    Raises:
        UserError: Some tensors are missing, have another shape, or are not of ``own``; the message names all three.
    """
    # A tensor that is left over would silently be ignored.
    missing, foreign = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    found = [_missing(missing, foreign)] if missing else []
    if foreign:
        found.append(f"the adapter's file holds tensors that nothing here uses: {_listed(foreign)}")
    for key, parameter in own.items():
        if key in tensors and tensors[key].shape != parameter.shape:
            found.append(_misshapen(key, tensors[key], tuple(parameter.shape)))
            break
    if found:
        raise UserError(" And ".join(found))
    for key, parameter in own.items():
        parameter.data.copy_(tensors[key])


def turned(found: Sequence[int], wanted: Sequence[int]) -> str:
    """A sentence if a tensor's shape is the wanted one the other way round; else nothing."""
    if len(wanted) == 2 and tuple(found) == tuple(wanted)[::-1] and found[0] != found[1]:
        return " It is transposed: the other way round it would fit."
    return ""


def _missing(keys: Sequence[str], there: Mapping[str, Tensor] | Sequence[str]) -> str:
    return f"the adapter's file has no tensor {_listed(keys)}.{nearest(keys[0], there)}"


def _misshapen(key: str, value: Tensor, shape: tuple[int, ...]) -> str:
    why = turned(value.shape, shape) or " Was the adapter made for another base?"
    if not value.numel():
        why = " A tensor of no elements was saved of a model in shards (ZeRO-3, FSDP) that were not gathered before."
    return f"tensor '{key}' has shape {tuple(value.shape)}; this base and configuration need {shape}.{why}"


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" * (len(keys) > _NAMED)
    return ", ".join(f"'{key}'" for key in keys[:_NAMED]) + more
