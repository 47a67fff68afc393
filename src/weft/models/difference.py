"""The first module, by its path, at which two passes through one model differ."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from weft.core.adapters import Adapters
from weft.core.architecture import Architecture, body_of
from weft.core.site import plain_class, without_sites
from weft.core.stream import Part
from weft.layouts.choice import layout_for

# Relative to a module's largest output. This is far above rounding, because the first wrong module is wrong by more.
_NEAR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@contextlib.contextmanager
def _recorded(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Inside, every module's output is noted, in the order in which modules end."""
    notes: list[tuple[str, Tensor]] = []

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, out: object) -> None:
            first = out if torch.is_tensor(out) else _first_tensor(out)
            if first is not None and first.is_floating_point():
                notes.append((path, first.detach()))

        return hook

    handles = [module.register_forward_hook(note(path)) for path, module in model.named_modules() if path]
    try:
        yield notes
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(out: object) -> Tensor | None:
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else ()
    return next((value for value in values if torch.is_tensor(value)), None)


def _by_path(notes: Iterable[tuple[str, Tensor]]) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for path, out in notes:
        found.setdefault(path, []).append(out)
    return found


def _differs(out: Tensor, expected: Tensor) -> bool:
    near = _NEAR[expected.dtype] * float(expected.abs().max())
    return not bool(((out - expected).abs() <= near).all())


@torch.no_grad()
def first_difference(
    model: nn.Module,
    shape: Architecture,
    sequences: Sequence[Sequence[int]],
    place: int,
    own: Callable[[Sequence[Sequence[int]]], Tensor],
) -> str:
    """``'path' (Class)`` of the first module whose output for the sequence ``place`` changes in company.

    A module after the body that is not called counts too. If there is none, it is the output layer. ``own`` runs the
    untouched model on a batch of sequences of one length; it gives [B, T, vocabulary] or an encoder's [B, T, d].
    """
    with _recorded(model) as alone:
        own([sequences[place]])
    with contextlib.closing(Adapters(model, shape, layout_for(shape))) as adapters, _recorded(model) as ours:
        stream, padded = adapters.stream([Part(None, sequences)]), adapters.layout.route.padded
        adapters.logits(adapters.forward(stream))
    rows = slice(sum(len(s) for s in sequences[:place]), sum(len(s) for s in sequences[: place + 1]))
    total, length = sum(len(s) for s in sequences), len(sequences[place])
    found = _by_path(ours)
    inside = set(body_of(model, shape).modules())
    for path, expected in alone:
        outs = found.get(path)
        if not outs:
            if path not in found and model.get_submodule(path) not in inside:
                return f"{named(model, path)}, which is not called"
            continue
        out = outs.pop(0)
        part = _part(out, place, rows, total=total, length=length, padded=padded)
        if part is None or part.numel() != expected.numel():
            continue
        if _differs(part.reshape(expected.shape), expected):
            return named(model, path)
    return "" if shape.bidirectional else f"what is made of the output of {named(model, shape.head)}"


def named(model: nn.Module, path: str) -> str:
    """``'path' (Class)``."""
    return f"'{path}' ({plain_class(model.get_submodule(path)).__name__})"


@torch.no_grad()
def first_beside(adapters: Adapters, name: str, sequences: Sequence[Sequence[int]]) -> str:
    """The first module whose output for the plain base's rows changes beside adapter ``name``."""
    with without_sites(adapters.model), _recorded(adapters.model) as alone:
        adapters.forward(adapters.stream([Part(None, sequences)]))
    with _recorded(adapters.model) as both:
        stream = adapters.stream([Part(name, sequences), Part(None, sequences)])
        adapters.forward(stream)
    found = _by_path(both)
    for path, expected in alone:
        # A site may run its module again for some rows only; the whole batch has more rows than the part.
        whole = [(out, dim) for out in found.get(path, []) if (dim := _grown(out, expected)) is not None]
        if not whole:
            continue
        out, dim = whole[0]
        found[path] = [other for other in found[path] if other is not out]
        beside = out.narrow(dim, out.shape[dim] - expected.shape[dim], expected.shape[dim])
        if _differs(beside, expected):
            return named(adapters.model, path)
    return ""


def _grown(out: Tensor, part: Tensor) -> int | None:
    """The only dimension in which ``out`` is longer than ``part``; None if there are none or several."""
    if out.dim() != part.dim():
        return None
    dims = [i for i in range(out.dim()) if out.shape[i] != part.shape[i]]
    return dims[0] if len(dims) == 1 and out.shape[dims[0]] > part.shape[dims[0]] else None


def _part(out: Tensor, place: int, rows: slice, total: int, length: int, padded: bool) -> Tensor | None:
    """The rows of one sequence in a module's output."""
    if padded:
        return out[place, :length] if out.dim() > 1 and out.shape[0] > place and out.shape[1] >= length else None
    dim = next((i for i in range(out.dim()) if out.shape[i] == total), None)
    return None if dim is None else out.narrow(dim, rows.start, length)
