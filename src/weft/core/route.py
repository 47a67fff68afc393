"""The route: which rows of a batch belong to which adapter. The router holds the current one.

A batch is sorted by adapter, so the rows of one adapter are one *segment*: a contiguous slice of the token stream, or,
on the padded path, a contiguous slice of the batch. The sites read the route from one shared ``Router``. It is a plain
attribute and not a ``ContextVar``, which would break a compiled graph; a checkpointed block re-enters the route of its
own forward through ``Router.contexts``.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from weft.ops.attention import SequenceLayout

# Learned keys and values of one adapter: one pair per layer, each [kv_heads, prefix, head_dim].
PrefixStates = Sequence[tuple[Tensor, Tensor]]


class KeyValueCache(Protocol):
    """A cache as attention needs it while generating (``weft.generate.cache`` has ours)."""

    @property
    def prefilled(self) -> bool:
        """Whether the prompts are stored; from then on every row of the stream is one new token."""

    def prefill(self, layer: int, k: Tensor, v: Tensor, route: Route) -> None:
        """Store the prompts' keys and values, [kv_heads, N, head_dim], after the prefixes of ``route``."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store one token per row, k and v [kv_heads, B, head_dim].

        Returns:
            The layer's keys and values, [B, kv_heads, T, head_dim] each, and how many of them each row has, [B].
        """

    def part(self, first: int, count: int) -> KeyValueCache:
        """A view of ``count`` rows from row ``first``, for layers that only these rows pass through."""


@dataclass(frozen=True)
class Segment:
    """The rows of one adapter.

    ``seed`` fixes every random number of these rows in this pass, so that neither a neighbour nor a recomputation can
    change it (None: no number is drawn, as in evaluation). ``lengths`` are its sequences', virtual tokens included.
    ``neftune_alpha`` is the strength of the noise on its embeddings (0: no noise). ``call`` (``weft.core.rows``) holds
    the arguments of the module at hand beside the rows, for functions that run it again (None: it has none).
    """

    adapter: str | None
    tokens: int
    sequences: int
    seed: int | None = None
    lengths: tuple[int, ...] = ()
    padded: bool = False
    neftune_alpha: float = 0.0
    call: Any = None


@dataclass(frozen=True)
class Route:
    """The adapter of every row of one forward pass.

    ``padded`` says that module inputs are [B, T, d] with one sequence per row of dimension 0, else [1, N, d].
    ``exact`` asks for one matrix product per segment, so that shapes (and hence bits) do not depend on neighbours.
    """

    segments: tuple[Segment, ...]
    layout: SequenceLayout | None = None
    prefixes: Mapping[int, PrefixStates] = field(default_factory=dict)
    cache: KeyValueCache | None = None
    padded: bool = False
    exact: bool = False
    # Module path -> its own route: a decoder's cross-attention also takes the encoder's rows.
    elsewhere: Mapping[str, Route] = field(default_factory=dict)
    # While a padded batch generates: adapter -> the cache of the blocks that it inserts.
    inserted: Mapping[str | None, Any] = field(default_factory=dict)
    _alone: dict[int, Route] = field(default_factory=dict, repr=False)

    def dim(self, x: Tensor) -> int | None:
        """The dimension of a module's input along which the segments lie; None if it has no such dimension.

        In the stream it is the one that counts the tokens: [1, N, d], [N, d], or, for norms of single heads,
        [1, N, heads, d] and [1, heads, N, d]. If both have the same size, the tokens' is the outer one in memory.
        """
        if self.padded:
            return 0
        tokens = sum(segment.tokens for segment in self.segments)
        # An embedding's input has no last dimension of features.
        dims = x.dim() - x.is_floating_point()
        return max((i for i in range(dims) if x.shape[i] == tokens), key=x.stride, default=None)

    def alone(self, index: int) -> Route:
        """The route of segment ``index`` alone, for work on its rows only."""
        if index not in self._alone:
            segment = self.segments[index]
            first = sum(s.sequences for s in self.segments[:index])
            layout = None
            if self.layout is not None:
                groups = (0,) if index in self.prefixes else ()
                layout = SequenceLayout.build(
                    segment.lengths, prefix_groups=groups, separate_groups=self.exact,
                    device=self.layout.cu_seqlens.device,
                )  # fmt: skip
            prefixes = {0: self.prefixes[index]} if index in self.prefixes else {}
            cache = None if self.cache is None else self.cache.part(first, segment.sequences)
            self._alone[index] = Route((segment,), layout, prefixes, cache, self.padded, self.exact)
        return self._alone[index]

    @property
    def sizes(self) -> list[int]:
        """The length of each segment along ``dim``."""
        return [s.sequences if self.padded else s.tokens for s in self.segments]


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from its parts, the same on every machine and in every run."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_dropout(x: Tensor, p: float, segment: Segment, site: str) -> Tensor:
    """Inverted dropout of x, [1, N, d] or padded [B, T, d], by a mask that only the segment's seed and the site fix."""
    if p <= 0.0 or segment.seed is None:
        return x
    generator = torch.Generator(device=x.device)
    generator.manual_seed(stable_seed(segment.seed, site))
    if not segment.padded:
        mask = torch.empty_like(x).bernoulli_(1.0 - p, generator=generator)
        return x * mask.div_(1.0 - p)
    # Padded [B, T, d]: drawn for the tokens alone, as in the stream, for T is the longest neighbour's length.
    lengths = torch.tensor(segment.lengths, device=x.device)
    inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    kept = x.new_empty(segment.tokens, x.shape[-1]).bernoulli_(1.0 - p, generator=generator)
    return x * torch.zeros_like(x).masked_scatter(inside[..., None], kept.div_(1.0 - p))


class Router:
    """Holds the route of the forward pass that is running; every site of one model shares it."""

    def __init__(self) -> None:
        self.current: Route | None = None

    @contextlib.contextmanager
    def use(self, route: Route | None) -> Iterator[None]:
        """Run the body under ``route``; the route before it comes back afterwards."""
        before, self.current = self.current, route
        try:
            yield
        finally:
            self.current = before

    def contexts(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """The contexts for ``torch.utils.checkpoint``, by which recomputation runs under the route of the forward."""
        return contextlib.nullcontext(), self.use(self.current)
