"""``Adapters``: many adapters, of any methods, over one base model that stays what it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter, BuildContext, MethodConfig, check_name
from weft.core.added import check_added
from weft.core.architecture import Architecture
from weft.core.body import head_logits, head_modules
from weft.core.checkpointing import disable_checkpointing, enable_checkpointing
from weft.core.combined import Combined, CombinedConfig
from weft.core.embeddings import input_embeddings
from weft.core.head import Head, TokenHead, losses_of_logits
from weft.core.heads import ClassificationHead, ClassificationTask
from weft.core.layout import Counts, Layout, Packed, Padded
from weft.core.route import Route, Router, Segment, StreamRoute
from weft.core.seq2seq import EncoderDecoder
from weft.core.site import attach, detach, mixes_rows, site_of, sites_in, without_sites
from weft.core.stream import Part, Stream
from weft.core.tensors import master_dtype
from weft.errors import UserError
from weft.ops.loss import linear_cross_entropy

# The mark of a model whose attention and sites already obey a router: no site would ask a second one.
_OPEN = "_weft_open"


class Adapters:
    """Adds and removes adapters, and runs batches in which every sequence has its own.

    The model is not wrapped: its modules, keys and parameters stay in place, frozen and in evaluation mode while
    ``Adapters`` is open. ``close()`` gives back exactly the model that came in.

    Args:
        model: A transformers model.
        architecture: The places of its parts (``weft.models.describe``).
        padded: Run padded batches through the model's own attention. Default: only if the model can do nothing else.
        exact: Compute one matrix product per adapter, so that no bit of its numbers depends on its neighbours.
        checkpointing: Recompute blocks in the backward pass instead of keeping their activations.
        original_weight: Of a quantised base, the weight [out, in] before, by the module's path (LoftQ asks for it).
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        *,
        padded: bool | None = None,
        exact: bool = False,
        checkpointing: bool = False,
        original_weight: Callable[[str], Tensor] | None = None,
    ) -> None:
        if is_open(model):
            raise UserError("this model already carries an Adapters; add to that one, or close() it first.")
        self.model = model
        self.architecture = architecture
        self.router = Router()
        self.exact = exact
        self._adapters: dict[str, Adapter] = {}
        kind = _kind_of_layout(architecture, padded, exact)
        self.layout: Layout = kind(model, architecture, self.router, self._adapters, exact)
        self.original_weight = original_weight
        model.__dict__[_OPEN] = True
        self._undo: list[Callable[[], None]] = [lambda: model.__dict__.pop(_OPEN), _freeze(model)]
        shape, apart = architecture, (*architecture.linears, *architecture.norms, *architecture.activations)
        self._exact_paths = frozenset((*apart, *shape.experts, *shape.routers))
        try:
            for install in (self.layout.attention, shape.install_tables):
                if install is not None:
                    self._undo.append(install(model, self.router))
            if exact:
                # Sites are needed also where no adapter sits now: the shape of the graph, and with it the order in
                # which gradients are summed, must not depend on which methods the neighbours use.
                for path in apart:
                    attach(model.get_submodule(path), path, self.router)
                for path in (*shape.experts, *shape.routers):
                    attach(model.get_submodule(path), path, self.router).alone_if_exact = True
            for path in shape.linears:
                if mixes_rows(module := model.get_submodule(path)):
                    attach(module, path, self.router).apart = True
            for path in shape.blocks if checkpointing else ():
                enable_checkpointing(model.get_submodule(path), self.router)
        except BaseException:
            self.close()
            raise

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the base computes."""
        weight = input_embeddings(self.model).weight
        return weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the base."""
        weight = input_embeddings(self.model).weight
        return weight.device

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order they came."""
        return list(self._adapters)

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise UserError(f"no adapter named '{name}'; there are: {', '.join(self._adapters) or 'none'}.")
        return self._adapters[name]

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def add(
        self,
        name: str,
        config: MethodConfig,
        *,
        seed: int = 0,
        tokenizer: Any = None,
        classification: ClassificationTask | None = None,
        blank: bool = False,
    ) -> Adapter:
        """Make a new adapter; its initial values come from a generator seeded with ``seed`` alone.

        ``classification`` gives it a head of its own. ``blank`` says that values will be loaded, so none are computed.

        Raises:
            UserError: The name is taken or no valid folder name, or the method finds nothing to tune.
        """
        check_name(name)
        if name in self._adapters:
            raise UserError(f"there is already an adapter named '{name}'; give this one another name.")
        context = BuildContext(
            self.model,
            self.architecture,
            torch.Generator().manual_seed(seed),
            dtype=master_dtype(self.dtype),
            device=self.device,
            tokenizer=tokenizer,
            keys_values=self._keys_values,
            blank=blank,
            router=self.router,
            original_weight=self.original_weight,
        )
        self.layout.check_config(config)
        adapter = config.build(name, context)
        if reason := self.layout.refusal(adapter):
            raise UserError(reason)
        adapter.hidden_size = self.architecture.hidden_size
        if classification is not None:
            shape = self.architecture
            pooler = self.model.get_submodule(shape.pooler) if shape.pooler else None
            adapter.head = ClassificationHead(classification, shape.head_kind, pooler, context)
        self._attach(name, adapter)
        try:
            if self.device.type != "meta":
                check_added(
                    adapter,
                    self.model,
                    self.architecture,
                    self._run,
                    padded=self.layout.masks_prefixes,
                    fresh=not blank,
                )
        except BaseException:
            self.remove(name)
            raise
        return adapter

    def _run(self, parts: Sequence[Part], *, plain: bool = False) -> Tensor:
        """Hidden states [N, d] of a small batch; ``plain``: as if there were no sites."""
        with without_sites(self.model) if plain else contextlib.nullcontext():
            return self.forward(self.stream(parts))

    def _attach(self, name: str, adapter: Adapter) -> Adapter:
        sites, inputs, blocks = adapter.sites(), adapter.input_sites(), adapter.inserted_blocks()
        parameters = adapter.parameter_sites()
        # All become sites before one gets its function: a module that cannot leaves no adapter half attached.
        at = {p: attach(self.model.get_submodule(p), p, self.router) for p in (*sites, *inputs, *blocks, *parameters)}
        for path, site in at.items():
            site.rows_name = self.architecture.rows_named.get(path)
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

    def stack(self, name: str, names: Sequence[str]) -> Adapter:
        """Let several adapters act on the same rows, in this order, under a new name; nothing is copied.

        They stay what they are and can be used by themselves; training the stack trains them.

        Raises:
            UserError: A name is missing, taken or given twice, or two of them have classification heads.
        """
        check_name(name)
        if name in self._adapters:
            raise UserError(f"there is already an adapter named '{name}'; give this one another name.")
        parts = [self[part] for part in names]
        if len(set(names)) < max(len(names), 1):
            raise UserError(f"a stack needs adapters to apply, each once, not {list(names)}.")
        heads = [part.head for part in parts if part.head.labels]
        if len(heads) > 1:
            raise UserError(f"{', '.join(names)}: more than one of them has a classification head of its own.")
        adapter = Combined(CombinedConfig(parts=tuple(part.config for part in parts)), name, parts)
        adapter.hidden_size = self.architecture.hidden_size
        adapter.head = heads[0] if heads else TokenHead()
        return self._attach(name, adapter)

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
            if site.empty and not site.apart and not (self.exact and site.path in self._exact_paths):
                detach(module)
        del self._adapters[name]

    def close(self) -> None:
        """Remove every adapter and every trace of it: the model is again the one that was loaded."""
        for name in reversed(self.names):  # a stack came after its parts
            self.remove(name)
        for module, _ in list(sites_in(self.model)):
            detach(module)
        for path in self.architecture.blocks:
            disable_checkpointing(self.model.get_submodule(path))
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
        touched = any(site_of(module) is not None for module in head_modules(self.model, self.architecture))
        with self.router.use(route if rows and touched else None):
            return head_logits(self.model, self.architecture, hidden)

    def losses(self, hidden: Tensor, targets: Tensor, rows: Counts) -> Tensor:
        """``-log p(target)`` [n] of the base's head after hidden states [n, d]; ``rows`` as in ``logits``.

        Logits are never held where the head is one matrix that no adapter changes.
        """
        form = self.architecture.head_form
        if form is None or any(self.changes_head(name) for name, _ in rows):
            return losses_of_logits(self.logits(hidden, rows), targets)
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        bias = getattr(head, "bias", None)
        return linear_cross_entropy(
            hidden, head.weight, targets, bias=bias, softcap=form.softcap, logit_scale=form.scale
        )

    def rows_route(self, rows: Counts) -> Route:
        """The route of single rows, each a hidden state that a head is asked about."""
        segments = (Segment(name, count, count, lengths=(1,) * count) for name, count in rows if count)
        return StreamRoute(tuple(segments), exact=self.exact)

    def shares_head(self, name: str | None) -> bool:
        """Whether the adapter answers with the base's own head, as it is."""
        return self.head(name) == TokenHead() and not self.changes_head(name)

    def changes_head(self, name: str | None) -> bool:
        """Whether the adapter's logits differ from the base's for the same hidden state."""
        sites = (site_of(module) for module in head_modules(self.model, self.architecture))
        return any(site is not None and (name in site.functions or name in site.inputs) for site in sites)

    @contextlib.contextmanager
    def route(self, route: Route | None) -> Iterator[None]:
        """Run the body under ``route`` (None: the sites stand aside)."""
        with self.router.use(route):
            yield

    @torch.no_grad()
    def _keys_values(self, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [kv_heads, n, head_dim] that the plain base gives for one text, per layer."""
        return self.layout.keys_values(input_ids.to(self.device))


def _kind_of_layout(shape: Architecture, padded: bool | None, exact: bool) -> type[Layout]:
    only = shape.install_attention is None
    if not (only if padded is None else padded):
        if only:
            raise UserError(f"{shape.model_type} models can only run padded batches; leave out padded=False.")
        return Packed
    if exact:
        raise UserError("exact mode needs the packed stream; padded batches pad by the longest neighbour.")
    return EncoderDecoder if shape.stacks > 1 else Padded


def is_open(model: nn.Module) -> bool:
    """Whether the model carries an ``Adapters`` now."""
    return _OPEN in model.__dict__


def _freeze(model: nn.Module) -> Callable[[], None]:
    """Switch off gradients and dropout of the base; returns the function that restores both."""
    trained = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    model.requires_grad_(False)
    model.eval()

    def undo() -> None:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True

    return undo
