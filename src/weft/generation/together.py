"""While text is written, the adapters on one linear act together: a few products for all rows, not some for each.

Routing by segments costs a few operations per adapter and site, which is nothing in training and much where every
adapter has a row or two. Here each site of a route gets one object that changes all its rows (``ops.grouped``).
Functions that have no such form act on their own rows, in place. Exact mode and training do not come here.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.core.adapters import Adapters
from weft.core.route import Segment
from weft.core.site import Site, site_of
from weft.generation.identity import Identities
from weft.ops.grouped import (
    Choices,
    Factors,
    HasRowForm,
    RowForm,
    choose_factors,
    grouped_change,
    row_table,
    stack_factors,
)
from weft.ops.products import add_product_, linear, multiply

# What one more operation costs beside the arithmetic, in floating-point operations.
_OPERATION = 100_000


class Together:
    """The changes at all sites, for the rows of one route after the other."""

    def __init__(self, adapters: Adapters, identities: Identities) -> None:
        self.device = adapters.device
        self._identities = identities
        self._factors: weakref.WeakKeyDictionary[Site, tuple[Hashable, _Stacked]] = weakref.WeakKeyDictionary()
        self._last: tuple[Hashable, RouteChanges] | None = None  # the same rows come many times, then never again

    def of(self, segments: Sequence[Segment]) -> RouteChanges | None:
        """The changes for rows that lie so; None where no adapter is among them."""
        names = tuple(segment.adapter for segment in segments)
        if all(name is None for name in names):
            return None
        # Looked at in every pass: a step of training between two of them gives the rows other values.
        state = tuple(map(self._identities.of, names))
        key = (tuple((s.adapter, s.tokens) for s in segments), state)
        if self._last is None or self._last[0] != key:
            self._last = (key, RouteChanges(self, segments, state))
        return self._last[1]

    def stacked(self, site: Site, names: Sequence[str | None], state: Hashable, *, x: Tensor) -> _Stacked:
        """The forms of these adapters at a site with rows x [..., in], and their factors one below the other."""
        key = (tuple(names), state, x.dtype)
        known = self._factors.get(site)
        if known is None or known[0] != key:
            forms = [_form(site, name) for name in names]
            known = self._factors[site] = (key, _Stacked(forms, stack_factors(forms, x.shape[-1], x.dtype)))
        return known[1]


@dataclass(frozen=True)
class _Stacked:
    """The form of each adapter at a site, None where it has none; and the factors of all."""

    forms: Sequence[RowForm | None]
    factors: Factors | None


class RouteChanges:
    """The changes at all sites for the rows of one route."""

    def __init__(self, together: Together, segments: Sequence[Segment], state: Hashable) -> None:
        self._together, self.segments, self.state = together, segments, state
        self.rows = sum(segment.tokens for segment in segments)
        sizes = torch.tensor([segment.tokens for segment in segments], device=together.device)
        self.owners = torch.arange(len(segments), device=sizes.device).repeat_interleave(sizes)
        self._sites: dict[str, SiteChange | None] = {}
        self._projections: dict[str, Projection | None] = {}

    def at(self, site: Site, x: object) -> SiteChange | None:
        """The change of rows x [..., N, in] at a site; None where the site has to see each segment by itself."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[-2:-1] != (self.rows,):
            return None
        if site.path not in self._sites:
            special = site.apart or site.inserted or site.parameters or site.rows_name
            own = x.numel() == self.rows * x.shape[-1] and not special
            self._sites[site.path] = SiteChange(site, self, x) if own else None
        return self._sites[site.path]

    def project(self, modules: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor] | None:
        """The outputs [1, N, out] of plain linears for the same rows x [1, N, in]; None: ask each by itself."""
        sites = [site_of(module) for module in modules]
        key = next((site.path for site in sites if site is not None), "")
        if not key:
            return None
        if key not in self._projections:
            changes = [None if site is None else self.at(site, x) for site in sites]
            known = all(change is not None or site is None for site, change in zip(sites, changes, strict=True))
            linears = [module for module in modules if isinstance(module, nn.Linear)]
            fits = known and len(linears) == len(modules) and all(c is None or c.joins for c in changes)
            self._projections[key] = Projection(linears, changes) if fits else None
        projection = self._projections[key]
        return None if projection is None else projection.run(x)

    def stacked(self, site: Site, x: Tensor) -> _Stacked:
        """``Together.stacked`` for the adapters of this route, and rows x [..., in]."""
        return self._together.stacked(site, [segment.adapter for segment in self.segments], self.state, x=x)


class SiteChange:
    """The change of all rows at one site."""

    def __init__(self, site: Site, route: RouteChanges, x: Tensor) -> None:
        """``x``: [..., in], the rows that come first."""
        stacked = route.stacked(site, x)
        forms, self._factors = list(stacked.forms), stacked.factors
        starts = list(itertools.accumulate((segment.tokens for segment in route.segments), initial=0))
        self._segments = [
            (slice(start, start + segment.tokens), segment)
            for start, segment in zip(starts, route.segments, strict=False)
        ]
        self._pieces: list[tuple[slice, RowForm]] = []
        if self._factors is not None and not _worth(self._factors, forms, route.segments):
            places = zip((rows for rows, _ in self._segments), forms, strict=True)
            self._pieces = [(rows, form.cast(x.dtype)) for rows, form in places if form is not None and form.adds]
            self._factors = None
        self._pieces += [
            (rows, RowForm(on_output=form.on_output))
            for (rows, _), form in zip(self._segments, forms, strict=True)
            if form is not None and form.on_output is not None
        ]
        self._site = site
        self._alone = [
            index
            for index, (form, segment) in enumerate(zip(forms, route.segments, strict=True))
            if form is None and (segment.adapter in site.functions or segment.adapter in site.inputs)
        ]
        self._choices = None if self._factors is None else choose_factors(self._factors, route.owners)
        self._fresh = issubclass(site.base_class, torch.nn.Linear)

        def table(name: str) -> Tensor | None:
            vectors = [None if form is None else getattr(form, name) for form in forms]
            return row_table(vectors, route.owners, 1.0, x.dtype)

        self._scale, self._input = table("scale"), table("input_scale")

    @property
    def joins(self) -> bool:
        """Whether the change is of what comes out alone, and of all rows alike."""
        return self._fresh and self._input is None and not self._alone

    def prepare(self, x: Tensor) -> Tensor:
        """The rows [..., N, in] that go into the module."""
        if self._input is not None:
            x = x * self._input
        for index in self._alone:
            rows, segment = self._segments[index]
            if (prepare := self._site.inputs.get(segment.adapter or "")) is not None:
                x = x.clone()
                x[..., rows, :] = prepare(x[..., rows, :], segment)
        return x

    @property
    def factors(self) -> tuple[Factors, Choices | None] | None:
        """The factors of all adapters and whose they are, if they act on all rows at once."""
        return None if self._factors is None else (self._factors, self._choices)

    def finish(self, x: Tensor, y: Tensor, z: Tensor | None) -> None:
        """``change`` in place of rows x [N, in] and y [N, out], where z [N, R] is computed."""
        if self._scale is not None:
            y.mul_(self._scale)
        if z is not None and self._factors is not None:
            add_product_(y, z, self._factors.b)
        for rows, form in self._pieces:
            form.add_to(y[rows], x[rows])

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        """The rows [..., N, out] that come out, for rows x that went in."""
        if not self._fresh and y.data_ptr() == x.data_ptr():
            y = y.clone()  # a module that does nothing gives what it was given
        y = y.contiguous()
        flat, given = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        grouped_change(given, flat, self._factors, self._choices, self._scale)
        for rows, form in self._pieces:
            form.add_to(flat[rows], given[rows])
        for index in self._alone:
            rows, segment = self._segments[index]
            own = flat[rows]
            for function in self._site.functions.get(segment.adapter or "", ()):
                own = function(given[None, rows], own[None], segment)[0]
            flat[rows] = own
        return y


class Projection:
    """Several linears that see the same rows: A x of all adapters and all linears is one product."""

    def __init__(self, linears: Sequence[nn.Linear], changes: Sequence[SiteChange | None]) -> None:
        self._linears, self._changes = linears, changes
        found = [change.factors for change in changes if change is not None and change.factors is not None]
        self._a = torch.cat([factors.a for factors, _ in found], 1) if found else None
        self._ranks = [len(factors.b) for factors, _ in found]
        self._choices: Choices | None = None
        chosen = [choices for _, choices in found]
        if any(choices is not None for choices in chosen):
            size = [0 if choices is None else len(choices.values) for choices in chosen]
            plain = torch.zeros(max(size), 1, dtype=torch.bool, device=found[0][0].a.device)
            replaced = [
                plain.expand(-1, ranks) if choices is None else choices.replaced
                for choices, ranks in zip(chosen, self._ranks, strict=True)
            ]
            values = [
                plain.expand(-1, ranks).to(found[0][0].a) if choices is None else choices.values
                for choices, ranks in zip(chosen, self._ranks, strict=True)
            ]
            self._choices = Choices(torch.cat(replaced, 1), torch.cat(values, 1))

    def run(self, x: Tensor) -> list[Tensor]:
        """The outputs [1, N, out] of rows x [1, N, in]."""
        rows = x[0]
        shared = iter(())
        if self._a is not None:
            z = multiply(rows, self._a)
            if self._choices is not None:
                z = torch.where(self._choices.replaced, self._choices.values, z)
            shared = iter(z.split(self._ranks, 1))
        ys = []
        for module, change in zip(self._linears, self._changes, strict=True):
            y = linear(rows, module.weight, module.bias)
            if change is not None:
                change.finish(rows, y, None if change.factors is None else next(shared))
            ys.append(y[None])
        return ys


def _form(site: Site, name: str | None) -> RowForm | None:
    """What the adapter does at the site, if it is of the form."""
    functions, prepare = site.functions.get(name or "", []), site.inputs.get(name or "")
    found: Sequence[object] = [*functions, *([] if prepare is None else [prepare])]
    if len(found) != 1 or not isinstance(found[0], HasRowForm) or not _own(found[0]):
        return None
    return found[0].row_form()


def _own(function: object) -> bool:
    """Whether the form is that of its computation: a class that computes something else may inherit the form."""
    mro = type(function).__mro__
    call = "forward" if isinstance(function, torch.nn.Module) else "__call__"
    owners = [next(kind for kind in mro if name in vars(kind)) for name in (call, "row_form")]
    return owners[0] is owners[1]


def _worth(factors: Factors, forms: Sequence[RowForm | None], segments: Sequence[Segment]) -> bool:
    """Whether all factors on all rows cost less than each adapter's on its own rows, one after the other."""
    width = factors.a.shape[0] + factors.b.shape[1]
    rows = sum(segment.tokens for segment in segments)
    own = [
        (0 if form.a is None else len(form.a), segment.tokens)
        for form, segment in zip(forms, segments, strict=True)
        if form is not None and form.adds
    ]
    apart = sum(2 * ranks * tokens * width + 2 * _OPERATION for ranks, tokens in own)
    return 2 * len(factors.b) * rows * width + 2 * _OPERATION <= apart or len(own) == 1 == len(segments)
