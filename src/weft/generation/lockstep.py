"""A cache for models that only run padded batches: rows of one length advance in lock step, so nothing is padded.

How a model treats pads that lie in its cache is its own affair: a state-space model lets its state decay over them,
ALiBi counts them, a convolution sees them. So there are none: the rows of a group have as many tokens (own and virtual)
and as many learned keys before them. The model makes the cache that it wants in the first pass and gets it back in
every step. Whether that gives what a pass over the whole text gives is not assumed: ``generation.cache_proof`` tries it
before it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, final

import torch
from torch import Tensor

from weft.core.adapters import Adapters
from weft.core.architecture import body_of
from weft.core.layout import Counts, Decoding
from weft.core.stream import Part, Stream
from weft.layouts.building import embed, run_body
from weft.layouts.padded_batch import padded_prefix
from weft.libraries import CACHE_NAMES, cache_name, growing_cache

# A model's output may have the cache under these names; its forward takes it back under the same.
_NAMES = (*CACHE_NAMES, "cache_params", "state", "mems")


@final
class Group(Decoding):
    """Rows of one length under one cache; ``hidden`` [B, d] are the states after their last tokens,
    ``cache`` what the model keeps of the rows."""

    def __init__(
        self, adapters: Adapters, parts: Sequence[Part], *, cache_name: str | None = None, jitter: float = 0.0
    ) -> None:
        """Run the prompts, all of one length with as many learned keys before them.

        ``cache_name``: of the argument that takes the cache, needed where there are learned keys. ``jitter``: every
        number that enters is moved up or down by this share of it, to see how far one rounding reaches.

        Raises:
            NoCacheError: the model gives no cache.
        """
        self.adapters = adapters
        stream = adapters.stream(parts)
        self._counts: Counts = [(s.adapter, s.sequences) for s in stream.route.segments]
        self._inserted = _inserted_caches(adapters, self._counts)
        self._next = int(stream.position_ids[-1]) + 1
        self._name, self._jitter = cache_name, jitter
        self.cache: object = None
        self.hidden = self._run(replace(stream, route=replace(stream.route, inserted=self._inserted)))

    def step(self, tokens: Tensor, counts: Counts) -> None:
        self._counts, places = counts, torch.full_like(tokens, self._next)
        self._next += 1
        self.hidden = self._run(self.adapters.layout.next_tokens(tokens, places, counts, inserted=self._inserted))

    def keep(self, rows: Tensor) -> None:
        self.cache = select_rows(self.cache, rows)
        first = 0
        for name, count in self._counts:
            if name in self._inserted:
                own = rows[(rows >= first) & (rows < first + count)] - first
                self._inserted[name] = select_rows(self._inserted[name], own)
            first += count

    @property
    def cache_name(self) -> str:
        """What the model calls its cache."""
        assert self._name is not None
        return self._name

    def _run(self, stream: Stream) -> Tensor:
        adapters, count = self.adapters, len(stream.lengths)
        with adapters.router.use(stream.route):
            hidden = embed(adapters.model, stream, cast(Any, adapters))
            if self.cache is None and max(stream.prefix_length):
                self.cache = growing_cache(padded_prefix(stream, max(stream.prefix_length), hidden))
            if self._jitter:
                up = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(0)) < 0.5
                hidden = hidden + torch.where(up.to(hidden.device), hidden, -hidden) * self._jitter
            given: dict[str, object] = {} if self.cache is None else {self.cache_name: self.cache}
            # No mask is given: every row is whole, and a model makes the causal one by itself.
            out = run_body(
                adapters.model,
                adapters.architecture,
                hidden.view(count, -1, hidden.shape[-1]),
                stream.input_ids.view(count, -1),
                position_ids=stream.position_ids.view(count, -1),
                use_cache=True,
                **given,
            )
        fields = {field.name for field in dataclasses.fields(out)}
        given_back = next((name for name in _NAMES if name in fields and getattr(out, name) is not None), None)
        # The output may have an older name for it than the forward.
        self._name = (
            self._name or cache_name(type(body_of(adapters.model, adapters.architecture)).forward) or given_back
        )
        if given_back is None or self._name is None:
            raise NoCacheError(f"{type(adapters.model).__name__} gives no cache")
        self.cache = getattr(out, given_back)
        return out.last_hidden_state[:, -1]


class NoCacheError(Exception):
    """The model keeps nothing from which it could go on."""


def _inserted_caches(adapters: Adapters, counts: Counts) -> dict[str | None, object]:
    """Adapter -> a cache for the blocks that it inserts, which have no place in the base's."""
    return {name: growing_cache() for name, _ in counts if name is not None and adapters[name].inserted_blocks()}


def select_rows(cache: object, rows: Tensor) -> Any:
    """The cache with these rows [n] only; transformers' own are changed in place."""
    if hasattr(cache, "reorder_cache"):
        # An order of rows may leave some out. Not every kind of layer can select rows.
        cache.reorder_cache(rows)
    if torch.is_tensor(cache):
        return cache.index_select(0, rows) if cache.dim() else cache
    if isinstance(cache, dict):
        return {key: select_rows(value, rows) for key, value in cache.items()}
    if isinstance(cache, (list, tuple)):
        return type(cache)(select_rows(value, rows) for value in cache)
    if hasattr(cache, "__dict__"):
        for key, value in list(vars(cache).items()):
            if key != "layers" and (torch.is_tensor(value) or isinstance(value, (dict, list, tuple))):
                setattr(cache, key, select_rows(value, rows))
    return cache
