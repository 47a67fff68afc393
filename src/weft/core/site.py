"""Sites: base modules whose class was swapped in place, so that adapters can change what they compute.

The module object stays where it is, with its parameters, buffers and state-dict keys; only ``__class__`` changes, to a
subclass of what it was. ``isinstance`` therefore stays true, quantised layers need no code of their own, and putting
the old class back removes every trace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from weft.base.mixin import Mixin, mixed
from weft.core.adapter import InputFunction, ParameterFunction, SiteFunction
from weft.core.route import Route, Router
from weft.core.rows import Call, split_call
from weft.errors import UserError

_SITE = "_weft_site"


class _OwnMemory(torch.autograd.Function):
    """The identity, whose results, forward and backward, are fresh contiguous tensors."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.clone(memory_format=torch.contiguous_format)


class Site:
    """One swapped module: the shared router, and the functions of each adapter here.

    ``inputs`` change the rows that go in, ``functions`` those that come out (in order), ``inserted`` are blocks that
    run after this one. ``parameters`` change the module's own parameters for the adapter's rows, where the module is no
    linear (experts held as one tensor, routers) and what it computes with them is its own affair.
    """

    def __init__(
        self,
        path: str,
        router: Router,
        base_class: type[nn.Module],
        *,
        rows_name: str | None = None,
        apart: bool = False,
        alone_if_exact: bool = False,
    ) -> None:
        self.path = path
        # A pooler sees one row per sequence: a job's head calls it under a route of such rows (full fine-tuning).
        self.pools = "pooler" in path.split(".")
        # The argument that holds the module's rows, if it is not the first (``Architecture.rows_named``).
        self.rows_name = rows_name
        self.router = router
        self.base_class = base_class
        self.inputs: dict[str, InputFunction] = {}
        self.functions: dict[str, list[SiteFunction]] = {}
        self.inserted: dict[str, list[nn.Module]] = {}
        self.parameters: dict[str, Mapping[str, ParameterFunction]] = {}
        # A module that mixes rows by its parameters (experts) sees each segment by itself in exact mode.
        self.alone_if_exact = alone_if_exact
        # A module that mixes rows in any case (``mixes_rows``) sees each segment by itself under every route.
        self.apart = apart

    @property
    def empty(self) -> bool:
        """Whether no adapter does anything here."""
        return not (self.inputs or self.functions or self.inserted or self.parameters)

    def remove(self, adapter: str) -> None:
        """Forget what the adapter does here."""
        for found in (self.inputs, self.functions, self.inserted, self.parameters):
            found.pop(adapter, None)

    def run(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """The module's forward under the current route.

        Raises:
            UserError: The module is called without rows of the text.
        """
        route = self.router.current
        if route is None or (self.pools and route.whole):
            return self.base_class.forward(module, *args, **kwargs)
        route = route.elsewhere.get(self.path, route)
        if self.parameters or (self.alone_if_exact and route.exact):
            return self._run_changed(module, args, kwargs, route)
        x, call = split_call(args, kwargs)
        if self.inserted:
            return self._run_block(module, x, call, route)
        named = self.rows_name in kwargs
        rows = kwargs[str(self.rows_name)] if named else x
        if not torch.is_tensor(rows):
            raise UserError(f"module '{self.path}' is not called with rows of the text; no adapter can sit on it.")
        if named:
            return self._change_all(rows, self.base_class.forward(module, *args, **kwargs), Call(), route)
        return self.apply(module, rows, call, route)

    def apply(self, module: nn.Module, x: Tensor, call: Call, route: Route) -> Tensor:
        """Run the base module on x, [1, N, in] or padded [B, T, in], then each segment's functions on its rows.

        Returns:
            [1, N, out] or [B, T, out].
        """
        if (route.exact or self.apart) and x.is_floating_point():
            return self._apply_exactly(module, x, call, route)
        if route.together is not None and not call and (all_at_once := route.together.at(self, x)) is not None:
            return all_at_once.change(x := all_at_once.prepare(x), self.base_class.forward(module, x))
        if any(segment.adapter in self.inputs for segment in route.segments):
            rows = route.rows(x, self.path)
            pieces = [self._prepare(i, piece, route) for i, piece in enumerate(rows.cut(x))]
            x = rows.join(pieces)
        return self._change_all(x, call.run(self.base_class.forward, module, x), call, route)

    def _change_all(self, x: Tensor, y: Tensor, call: Call, route: Route) -> Tensor:
        if not any(segment.adapter in self.functions for segment in route.segments):
            return y
        # split's backward is one concatenation, where slicing would write one zero-padded tensor per segment.
        rows = route.rows(x, self.path)
        xs, ys = rows.cut(x), rows.cut(y)
        calls = [call.part(rows, x, i) for i in range(len(xs))] if call else [call] * len(xs)
        return rows.join([self._change(i, xs[i], ys[i], calls[i], route) for i in range(len(xs))])

    def _apply_exactly(self, module: nn.Module, x: Tensor, call: Call, route: Route) -> Tensor:
        """One matrix product per segment, each on memory of its own: kernels choose their blocking by row count and by
        alignment, forward and backward, and so would round differently beside a neighbour."""
        pieces, rows = [], route.rows(x, self.path)
        for index, piece in enumerate(rows.cut(x)):
            own = self._prepare(index, _OwnMemory.apply(piece), route)
            part = call.part(rows, x, index)
            y = self._change(index, own, part.run(self.base_class.forward, module, own), part, route)
            pieces.append(_OwnMemory.apply(y))
        return rows.join(pieces)

    def _prepare(self, index: int, x: Tensor, route: Route) -> Tensor:
        segment = route.segments[index]
        if segment.adapter is None or segment.adapter not in self.inputs:
            return x
        return self.inputs[segment.adapter](x, segment)

    def _change(self, index: int, x: Tensor, y: Tensor, call: Call, route: Route) -> Tensor:
        segment = route.segments[index]
        if segment.adapter is None:
            return y
        if call:
            segment = replace(segment, call=call)
        for function in self.functions.get(segment.adapter or "", ()):
            y = function(x, y, segment)
        return y

    def _run_block(self, module: nn.Module, x: object, call: Call, route: Route) -> object:
        """Run the block, then each segment's inserted blocks on its rows alone, with its part of the arguments."""
        out = call.run(self.base_class.forward, module, x)
        if not any(segment.adapter in self.inserted for segment in route.segments):
            return out
        y = out[0] if isinstance(out, (tuple, list)) else out
        lie, pieces = route.rows(y, self.path), []
        for index, rows in enumerate(lie.cut(y)):
            blocks = self.inserted.get(route.segments[index].adapter or "", [])
            if blocks:
                rows = _OwnMemory.apply(rows)
                own = [route.part(value, index, y) for value in call.args]
                named = {key: route.part(value, index, y) for key, value in call.kwargs.items()}
            for block in blocks:
                with self.router.use(route.alone(index)):
                    rows = block(rows, *own, **named)
                rows = rows[0] if isinstance(rows, (tuple, list)) else rows
            pieces.append(rows)
        y = lie.join(pieces)
        return type(out)([y, *out[1:]]) if isinstance(out, (tuple, list)) else y

    def _run_changed(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], route: Route
    ) -> object:
        """Run the module once per segment whose adapter changes its parameters, and once for all others in between."""
        alone = [route.exact or segment.adapter in self.parameters for segment in route.segments]
        groups: list[range] = []
        for index, by_itself in enumerate(alone):
            joins = groups and not by_itself and not alone[index - 1]
            groups[-1:] = [range(groups[-1].start, index + 1)] if joins else [*groups[-1:], range(index, index + 1)]
        if len(groups) == 1 and not alone[0]:
            return self.base_class.forward(module, *args, **kwargs)
        first = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
        rows = route.groups(first, groups, self.path)
        pieces = [rows.split(value) for value in (*args, *kwargs.values())]
        parts = []
        for index, group in enumerate(groups):
            own = [piece[index] for piece in pieces]
            if route.exact:
                own = [_OwnMemory.apply(v) if torch.is_tensor(v) and v.is_floating_point() else v for v in own]
            named = dict(zip(kwargs, own[len(args) :], strict=True))
            changed = self.parameters.get(route.segments[group.start].adapter or "", {})
            # Modules inside see rows sorted by expert. No route tells whose they are, and they are one group's now.
            with _shadowed(module, changed), self.router.use(None):
                parts.append(self.base_class.forward(module, *own[: len(args)], **named))
        return parts[0] if len(parts) == 1 else rows.join(parts, self.path)


@contextlib.contextmanager
def _shadowed(module: nn.Module, functions: Mapping[str, ParameterFunction]) -> Iterator[None]:
    """Let the module see the results of ``functions`` as its parameters; the parameters themselves do not change."""
    try:
        for name, function in functions.items():
            # An entry of the instance is found before nn.Module looks among its parameters.
            module.__dict__[name] = function(module.get_parameter(name))
        yield
    finally:
        for name in functions:
            module.__dict__.pop(name, None)


class _RoutedForward(Mixin):
    """The part that a swapped class adds to its base class."""

    def forward(self, *args: object, **kwargs: object) -> object:
        site: Site = self.__dict__[_SITE]
        return site.run(self, args, kwargs)


def mixes_rows(module: nn.Module) -> bool:
    """Whether the module's result for one row depends on the others: LLM.int8 takes a feature out of the int8 product
    if any row of the batch has an outlier there."""
    return type(module).__name__.removeprefix("Routed") == "Linear8bitLt"


def site_of(module: nn.Module) -> Site | None:
    """The module's site, or None if its class is the original one."""
    return module.__dict__.get(_SITE)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without its site."""
    site = site_of(module)
    return type(module) if site is None else site.base_class


def attach(
    module: nn.Module,
    path: str,
    router: Router,
    *,
    rows_name: str | None = None,
    apart: bool = False,
    alone_if_exact: bool = False,
) -> Site:
    """Turn ``module`` into a site (or return the one it already is).

    Raises:
        UserError: The module's ``forward`` was replaced on the instance, which would hide the site.
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
    site = Site(path, router, base_class, rows_name=rows_name, apart=apart, alone_if_exact=alone_if_exact)
    module.__dict__[_SITE] = site
    module.__class__ = mixed("Routed", _RoutedForward, base_class)
    return site


def detach(module: nn.Module) -> None:
    """Put the module's own class back."""
    site = site_of(module)
    if site is not None:
        module.__class__ = site.base_class
        del module.__dict__[_SITE]


def replace_class(module: nn.Module, base_class: type[nn.Module]) -> None:
    """Give the module another class of its own; a site stays a site."""
    site = site_of(module)
    if site is None:
        module.__class__ = base_class
        return
    site.base_class, site.apart = base_class, False
    module.__class__ = mixed("Routed", _RoutedForward, base_class)


@contextlib.contextmanager
def without_sites(model: nn.Module) -> Iterator[None]:
    """Inside, every site is the module that it was: neither an adapter nor the swap has an effect."""
    swapped: list[tuple[nn.Module, type[nn.Module]]] = [(module, type(module)) for module, _ in sites_in(model)]
    for module, _ in swapped:
        module.__class__ = plain_class(module)
    try:
        yield
    finally:
        for module, routed in swapped:
            module.__class__ = routed


def sites_in(model: nn.Module) -> Iterator[tuple[nn.Module, Site]]:
    """Every module that is a site."""
    for module in model.modules():
        site = site_of(module)
        if site is not None:
            yield module, site
