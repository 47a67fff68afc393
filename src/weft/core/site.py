"""Sites: base modules whose class was swapped in place, so that adapters can change their output.

The module object stays where it is, with its parameters, buffers and state-dict keys; only ``__class__`` changes, to a
subclass of what it was. ``isinstance`` therefore stays true, quantised layers need no code of their own, and putting
the old class back removes every trace.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.core.adapter import SiteFunction
from weft.core.route import Route, Router
from weft.errors import UserError

_SITE = "_weft_site"


class _OwnMemory(torch.autograd.Function):
    """The identity, but what comes out, forward and backward, is a fresh contiguous tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone(memory_format=torch.contiguous_format)


class Site:
    """What hangs on one swapped module: the shared router and, per adapter, the functions to apply in order."""

    def __init__(self, path: str, router: Router, base_class: type[nn.Module]) -> None:
        self.path = path
        self.router = router
        self.base_class = base_class
        self.functions: dict[str, list[SiteFunction]] = {}

    def apply(self, module: nn.Module, x: Tensor, route: Route) -> Tensor:
        """Run the base module, then each segment's own functions on that segment's rows."""
        if route.exact:
            return self._apply_exactly(module, x, route)
        if route.padded and x.dim() == 2:
            # OPT flattens its batch before the MLP; the segments lie along the batch.
            batch = sum(route.sizes)
            return self.apply(module, x.view(batch, -1, x.shape[-1]), route).flatten(0, 1)
        y = self.base_class.forward(module, x)
        if not any(segment.adapter in self.functions for segment in route.segments):
            return y
        if len(route.segments) == 1:
            return self._change(0, x, y, route)
        # split's backward is one concatenation, where slicing would write one zero-padded tensor per segment.
        dim = route.dim(x)
        xs, ys = x.split(route.sizes, dim), y.split(route.sizes, dim)
        return torch.cat([self._change(i, xs[i], ys[i], route) for i in range(len(xs))], dim)

    def _apply_exactly(self, module: nn.Module, x: Tensor, route: Route) -> Tensor:
        """One matrix product per segment, each on memory of its own: kernels choose their blocking by row count and by
        alignment, forward and backward, and so would round differently beside a neighbour."""
        pieces, dim = [], route.dim(x)
        for index, rows in enumerate(x.split(route.sizes, dim)):
            own = _OwnMemory.apply(rows)
            y = self._change(index, own, self.base_class.forward(module, own), route)
            pieces.append(_OwnMemory.apply(y))
        return torch.cat(pieces, dim)

    def _change(self, index: int, x: Tensor, y: Tensor, route: Route) -> Tensor:
        segment = route.segments[index]
        if segment.adapter is None:
            return y
        for function in self.functions.get(segment.adapter, ()):
            y = function(x, y, segment)
        return y


class _RoutedForward:
    """The part that a swapped class adds to its base class."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        site: Site = self.__dict__[_SITE]
        route = site.router.current
        if route is None:
            return site.base_class.forward(self, x, *args, **kwargs)
        return site.apply(self, x, route)  # type: ignore[arg-type]


@functools.cache
def _routed_class(base_class: Any) -> Any:
    return type(f"Routed{base_class.__name__}", (_RoutedForward, base_class), {"__module__": __name__})


def site_of(module: nn.Module) -> Site | None:
    """The module's site, or None if its class is the original one."""
    return module.__dict__.get(_SITE)


def attach(module: nn.Module, path: str, router: Router) -> Site:
    """Turn ``module`` into a site (or return the one it already is).

    Raises:
        UserError: the module's ``forward`` was replaced on the instance, which would shadow the site.
    """
    site = site_of(module)
    if site is not None:
        return site
    if "forward" in module.__dict__:
        raise UserError(
            f"module '{path}' has a forward of its own set on the instance (accelerate's hooks do this); it would hide "
            "the adapters. Load the model without device_map hooks, or call accelerate.hooks.remove_hook_from_module."
        )
    base_class = type(module)
    site = Site(path, router, base_class)
    module.__dict__[_SITE] = site
    module.__class__ = _routed_class(cast(Any, base_class))
    return site


def detach(module: nn.Module) -> None:
    """Put the module's own class back."""
    site = site_of(module)
    if site is not None:
        module.__class__ = site.base_class
        del module.__dict__[_SITE]
