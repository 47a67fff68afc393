"""``Adapters``: many adapters, of any methods, over one base model that stays what it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.base.body import head_logits, head_modules
from weft.base.embeddings import input_embeddings, output_head
from weft.base.frozen import freeze
from weft.core.adapter import Adapter, BuildContext, HeadTask, MethodConfig
from weft.core.architecture import Architecture, Installer, body_of
from weft.core.head import Head, TokenHead
from weft.core.layout import Counts, Layout
from weft.core.route import Route, Router, Segment, StreamRoute
from weft.core.site import Site, attach, detach, mixes_rows, site_of, sites_in
from weft.core.stream import Part, Stream
from weft.errors import UserError
from weft.ops.loss import linear_cross_entropy, losses_of_logits
from weft.patterns import check_name

# The mark of a model whose attention and sites already obey a router: no site would ask a second one.
_OPEN = "_weft_open"


class _Named(dict[str, Adapter]):
    """The adapters by name; whoever looks one up is told which there are."""

    def __missing__(self, name: str) -> Adapter:
        raise UserError(f"no adapter named {name!r}; there are: {', '.join(self) or 'none'}. None is the base.")


class Adapters:
    """Adds and removes adapters, and runs batches in which every sequence has its own.

    ``layout`` is how batches lie (``weft.layouts``). ``installers`` are what else is done to the model while it is open
    (``weft.base.checkpointing``). ``weft.adapters`` chooses both, and says what the other arguments mean.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        layout: type[Layout],
        *,
        exact: bool = False,
        installers: Sequence[Installer] = (),
        original_weight: Callable[[str], Tensor] | None = None,
    ) -> None:
        if is_open(model):
            raise UserError("this model already carries an Adapters; add to that one, or close() it first.")
        self.model = model
        self.architecture = architecture
        self.router = Router()
        self.exact = exact
        self._adapters = _Named()
        self._body = body_of(model, architecture)
        self._layout = layout(model, architecture, self.router, self._adapters, exact)
        self.original_weight = original_weight
        model.__dict__[_OPEN] = True
        self._undo: list[Callable[[], None]] = [lambda: model.__dict__.pop(_OPEN), freeze(model)]
        shape = architecture
        # In exact mode sites are needed also where no adapter sits now: the shape of the graph, and with it the order
        # in which gradients are summed, must not depend on which methods the neighbours use.
        always = (*shape.linears, *shape.norms, *shape.activations, *shape.experts, *shape.routers) if exact else ()
        self._always = frozenset(always)
        try:
            for install in (self.layout.attention, shape.install_tables, *installers):
                if install is not None:
                    self._undo.append(install(model, self.router))
            for path in (*always, *(p for p in shape.linears if mixes_rows(model.get_submodule(p)))):
                self._site(path)
        except BaseException:
            self.close()
            raise

    @property
    def layout(self) -> Layout:
        """How batches lie. All use of the adapters comes by here.

        Raises:
            UserError: They are closed.
        """
        if not self._undo:
            raise UserError("these adapters are closed: the model is again the one without them. Open them once more.")
        return self._layout

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the base computes."""
        return input_embeddings(self.model).weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the base."""
        return input_embeddings(self.model).weight.device

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order they came."""
        return list(self._adapters)

    def __getitem__(self, name: str) -> Adapter:
        return self.layout.adapters[name]

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def add(
        self,
        name: str,
        config: MethodConfig,
        *,
        seed: int = 0,
        tokenizer: Any = None,
        head: HeadTask | None = None,
        blank: bool = False,
    ) -> Adapter:
        """Make a new adapter; its initial values come from a generator seeded with ``seed`` alone.

        ``head`` gives it a head of its own. ``blank`` says that values will be loaded, so none are computed.

        Raises:
            UserError: The name is taken or no valid folder name, or the method finds nothing to tune.
        """
        self._check_new(name, config)
        context = BuildContext(
            self.model,
            self.architecture,
            torch.Generator().manual_seed(seed),
            # Adapters are kept in float32 whatever the base computes in, except beside a float64 base.
            dtype=torch.float64 if self.dtype == torch.float64 else torch.float32,
            device=self.device,
            tokenizer=tokenizer,
            keys_values=self._keys_values,
            blank=blank,
            router=self.router,
            original_weight=self.original_weight,
        )
        adapter = config.build(name, context)
        if reason := self.layout.refusal(adapter):
            raise UserError(reason)
        adapter.set_up(self.architecture.hidden_size, head.build(context) if head else TokenHead())
        self._attach(name, adapter)
        try:
            self._check(adapter, fresh=not blank)
        except BaseException:
            self.remove(name)
            raise
        return adapter

    def _check(self, adapter: Adapter, *, fresh: bool) -> None:
        """Refuse an adapter that was just attached; here all may stay. ``fresh``: it has the values it begins with."""

    def _check_new(self, name: str, config: MethodConfig | None = None) -> None:
        check_name(name)
        if name in self.layout.adapters:
            raise UserError(f"there is already an adapter named '{name}'; give this one another name.")

    def _site(self, path: str) -> Site:
        """The module at ``path``, as the site that it is from now on."""
        module, shape = self.model.get_submodule(path), self.architecture
        return attach(
            module,
            path,
            self.router,
            rows_name=shape.rows_named.get(path),
            apart=mixes_rows(module) and path in shape.linears,
            alone_if_exact=path in (*shape.experts, *shape.routers),
        )

    def _attach(self, name: str, adapter: Adapter) -> Adapter:
        sites, inputs, blocks = adapter.sites(), adapter.input_sites(), adapter.inserted_blocks()
        parameters = adapter.parameter_sites()
        # All become sites before one gets its function: a module that cannot leaves no adapter half attached.
        at = {path: self._site(path) for path in (*sites, *inputs, *blocks, *parameters)}
        for path, function in sites.items():
            at[path].functions[name] = [function]
        for path, prepare in inputs.items():
            at[path].inputs[name] = prepare
        for path, inserted in blocks.items():
            at[path].inserted[name] = list(inserted)
        for path, changed in parameters.items():
            at[path].parameters[name] = changed
        self._adapters[name] = adapter
        return adapter

    def remove(self, name: str) -> None:
        """Take the adapter away; modules that no adapter uses any more get their own class back.

        Raises:
            UserError: There is no such adapter, or a stack still uses it.
        """
        adapter = self[name]
        for other, stack in self._adapters.items():
            if stack is not adapter and adapter in stack.parts:
                raise UserError(f"'{name}' is part of the stack '{other}'; remove that first.")
        for module, site in list(sites_in(self.model)):
            site.remove(name)
            if site.empty and not site.apart and site.path not in self._always:
                detach(module)
        del self._adapters[name]

    def close(self) -> None:
        """Remove every adapter and every trace of it: the model is again the one that was loaded."""
        if not self._undo:
            return  # the model may carry others by now
        for name in reversed(self.names):  # a stack came after its parts
            self.remove(name)
        for module, _ in list(sites_in(self.model)):
            detach(module)
        while self._undo:
            self._undo.pop()()

    def stream(self, parts: Sequence[Part], *, cache: Any = None) -> Stream:
        """Lay out a batch; rows of ``parts`` keep their order."""
        return self.layout.stream(parts, cache=cache)

    def forward(self, stream: Stream) -> Tensor:
        """Last hidden states [N, d] of the stream, before the head."""
        return self.layout.forward(stream)

    def run(self, parts: Sequence[Part]) -> tuple[Stream, Tensor]:
        """One pass: the batch of what answers, whose ``rows`` are those of each sequence, and its last hidden states
        [N, d]."""
        return self.layout.run(parts)

    def head(self, name: str | None) -> Head:
        """What adapter ``name`` answers with (None: the base)."""
        return TokenHead() if name is None else self[name].head

    def logits(self, hidden: Tensor, rows: Counts = ()) -> Tensor:
        """The head's logits [n, vocabulary] for hidden states [n, d].

        ``rows`` names (adapter, number of rows) in order, where adapters may have changed the head; by default the
        logits are the base's own.
        """
        route = self.rows_route(rows)
        touched = any(site_of(module) is not None for module in self._head_modules())
        with self.router.use(route if rows and touched else None):
            return head_logits(self.model, self._body, self.architecture.head_form, hidden)

    def losses(self, hidden: Tensor, targets: Tensor, rows: Counts) -> Tensor:
        """``-log p(target)`` [n] of the base's head after hidden states [n, d]; ``rows`` as in ``logits``.

        Logits are never held where the head is one matrix that no adapter changes.
        """
        form = self.layout.shape.head_form
        if form is None or any(self.changes_head(name) for name, _ in rows):
            return losses_of_logits(self.logits(hidden, rows), targets)
        layer = output_head(self.model)
        assert layer is not None
        bias = getattr(layer, "bias", None)
        return linear_cross_entropy(
            hidden, layer.weight, targets, bias=bias, softcap=form.softcap, logit_scale=form.scale
        )

    def rows_route(self, rows: Counts) -> Route:
        """The route of single rows, each a hidden state that a head is asked about."""
        for name, _ in rows:
            self.head(name)  # refuses a name that is not there
        segments = (Segment(name, count, count, lengths=(1,) * count) for name, count in rows if count)
        return StreamRoute(tuple(segments), exact=self.exact)

    def shares_head(self, name: str | None) -> bool:
        """Whether the adapter answers with the base's own head, as it is."""
        return self.head(name) == TokenHead() and not self.changes_head(name)

    def changes_head(self, name: str | None) -> bool:
        """Whether the adapter's logits differ from the base's for the same hidden state."""
        self.head(name)  # refuses a name that is not there
        sites = map(site_of, self._head_modules())
        return any(site is not None and (name in site.functions or name in site.inputs) for site in sites)

    def _head_modules(self) -> list[nn.Module]:
        return head_modules(self.model, self._body, self.layout.shape.head_form)

    @torch.no_grad()
    def _keys_values(self, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [kv_heads, n, head_dim] that the plain base gives for one text, per layer."""
        return self.layout.keys_values(input_ids.to(self.device))


def is_open(model: nn.Module) -> bool:
    """Whether the model carries an ``Adapters`` now."""
    return _OPEN in model.__dict__
