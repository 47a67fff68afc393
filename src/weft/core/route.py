"""The route: which rows of a batch belong to which adapter. The router holds the current one.

A batch is sorted by adapter, so the rows of one adapter are one *segment*: a contiguous slice of the token stream, or,
on the padded path, a contiguous slice of the batch. The sites read the route from one shared ``Router``. It is a plain
attribute and not a ``ContextVar``, which would break a compiled graph; a checkpointed block re-enters the route of its
own forward through ``Router.contexts``.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Protocol, final

import torch
from torch import Tensor

from weft.core.rows import Groups, Rows
from weft.errors import UserError
from weft.ops.sequence_layout import SequenceLayout, Sharing

# Learned keys and values of one adapter: one pair per layer, each [kv_heads, prefix, head_dim].
PrefixStates = Sequence[tuple[Tensor, Tensor]]


class KeyValueCache(Protocol):
    """A cache as attention asks it while text is generated (``weft.generation.paged`` has ours)."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, **bias: Any) -> Tensor | None:
        """Store the rows' k and v [kv_heads, N, head_dim]; the attention [N, heads, head_dim] of q [heads, N, head_dim]
        to all that is stored of their texts. None: as without a cache. ``bias`` as in ``varlen_attention``."""

    def part(self, first: int, count: int) -> KeyValueCache:
        """A view of ``count`` sequences from ``first``, for layers that only these pass through."""


@dataclass(frozen=True)
class Segment:
    """The rows of one adapter.

    ``seed`` fixes every random number of these rows in this pass, so that neither a neighbour nor a recomputation can
    change it (None: no number is drawn, as in evaluation). ``lengths`` are its sequences', virtual tokens included,
    and without the rows that they share with one before them.
    ``neftune_alpha`` is the strength of the noise on its embeddings (0: no noise). ``call`` (``weft.core.rows``) holds
    the arguments of the module at hand beside the rows, for functions that run it again (None: it has none).
    """

    adapter: str | None
    tokens: int
    sequences: int
    _: KW_ONLY
    seed: int | None = None
    lengths: tuple[int, ...] = ()
    padded: bool = False
    neftune_alpha: float = 0.0
    call: Any = None

    def inside(self, x: Tensor) -> Tensor | None:
        """Where the tokens are in its rows x [B, T, d] of a padded batch, [B, T]; None: in a stream all rows are."""
        if not self.padded:
            return None
        lengths = torch.tensor(self.lengths, device=x.device)
        return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


@dataclass(frozen=True)
class Route(ABC):
    """Where every row of one forward pass goes, and how what modules are given is cut into the segments.

    ``exact`` asks for one matrix product per segment, so that shapes (and hence bits) do not depend on neighbours.
    """

    segments: tuple[Segment, ...]
    layout: SequenceLayout | None = None
    prefixes: Mapping[int, PrefixStates] = field(default_factory=dict)
    _: KW_ONLY
    cache: KeyValueCache | None = None
    exact: bool = False
    # Which sequences see rows of others before their own.
    sharing: tuple[Sharing, ...] = ()
    # Module path -> its own route: a decoder's cross-attention also takes the encoder's rows.
    elsewhere: Mapping[str, Route] = field(default_factory=dict)
    # While text is written: the changes that all adapters make at a site at once (``weft.generation.together``).
    together: Any = None
    # While a padded batch generates: adapter -> the cache of the blocks that it inserts.
    inserted: Mapping[str | None, Any] = field(default_factory=dict)
    _alone: dict[int, Route] = field(default_factory=dict, repr=False)

    # Whether module inputs are [B, T, d] with one sequence per row, else [1, N, d].
    padded: ClassVar[bool]
    # Whether sequences can have rows in common.
    shares: ClassVar[bool] = False

    @property
    @abstractmethod
    def sizes(self) -> list[int]:
        """How far each segment reaches along the dimension in which they lie."""

    @property
    @abstractmethod
    def whole(self) -> bool:
        """Whether its rows are texts, and not single states that a head is asked about."""

    @abstractmethod
    def rows(self, x: Tensor, path: str) -> Rows:
        """Where the segments lie in the rows [..., d] that the module at ``path`` is given.

        Raises:
            UserError: It is given other rows than the batch has (an expert's, say).
        """

    @abstractmethod
    def _unit(self, x: Tensor) -> tuple[int, int]:
        """The dimension in which the segments lie, and how many rows stand for one of their ``sizes``; 0: unknown."""

    def groups(self, x: Tensor, groups: Sequence[range], path: str) -> Groups:
        """Where ``groups`` of consecutive segments lie in x, [1, N, d], [N, d], [B, T, d] or [B T, d].

        Raises:
            UserError: x has other rows than the text's tokens, so nobody can say whose they are.
        """
        dim, each = self._unit(x)
        if not each:
            raise UserError(
                f"module '{path}' is called with rows {list(x.shape)} that are not the text's tokens one by one; which "
                "adapter they belong to is not known, so its parameters cannot be adapted. Leave them out of "
                "target_parameters."
            )
        return Groups(dim, tuple(each * sum(self.sizes[i] for i in group) for group in groups))

    def part(self, value: Any, index: int, hidden: Tensor) -> Any:
        """What segment ``index`` is given of one of a block's arguments; ``hidden`` [1, N, d], padded [B, T, d].

        Of tensors its rows, without the columns of neighbours' prefixes; instead of the cache, which belongs to the
        base's layers, the one that the route has for the inserted ones, if any; of everything else all.
        """
        if isinstance(value, tuple):
            return tuple(self.part(inner, index, hidden) for inner in value)
        if torch.is_tensor(value):
            return self._rows_of(value, index, hidden)
        is_cache = type(value).__name__.endswith("Cache")
        return self.inserted.get(self.segments[index].adapter) if is_cache else value

    @abstractmethod
    def _rows_of(self, value: Tensor, index: int, hidden: Tensor) -> Tensor:
        """``part`` of a tensor."""

    def alone(self, index: int) -> Route:
        """The route of segment ``index`` alone, for work on its rows only."""
        if index not in self._alone:
            segment = self.segments[index]
            first = sum(s.sequences for s in self.segments[:index])
            layout = None
            sharing: tuple[Sharing, ...] = ()
            if self.layout is not None:
                own = self.layout.groups[first : first + segment.sequences]
                sharing, groups = self._sharing_alone(index, own)
                layout = SequenceLayout.build(
                    segment.lengths, groups, separate_groups=self.exact, device=self.layout.cu_seqlens.device,
                    prefix_groups=(*((0,) if index in self.prefixes else ()), *(one.group for one in sharing)),
                )  # fmt: skip
            prefixes = {0: self.prefixes[index]} if index in self.prefixes else {}
            cache = None if self.cache is None else self.cache.part(first, segment.sequences)
            self._alone[index] = type(self)(
                (segment,), layout, prefixes, cache=cache, exact=self.exact, sharing=sharing
            )
        return self._alone[index]

    def _sharing_alone(self, index: int, groups: Sequence[int]) -> tuple[tuple[Sharing, ...], list[int]]:
        """Which sequences of segment ``index`` see rows of others, and their groups, when it is alone; now they are in
        ``groups``."""
        begin = sum(s.tokens for s in self.segments[:index])
        own = [one for one in self.sharing if one.group in groups]
        found = tuple(Sharing(n, one.begin - begin, one.end - begin, 0) for n, one in enumerate(own, start=1))
        names = {one.group: alone.group for one, alone in zip(own, found, strict=True)}
        return found, [names.get(group, 0) for group in groups]

    def _strange(self, x: Tensor, path: str) -> UserError:
        return UserError(
            f"module '{path}' is given {tuple(x.shape)} in a batch of {sum(self.sizes)} rows: which of them belong to "
            "which adapter is not known. Leave it out of target_modules, or train this adapter in a run of its own."
        )


@final
class StreamRoute(Route):
    """Sequences end to end in one stream, [1, N, d]."""

    padded, shares = False, True

    @property
    def sizes(self) -> list[int]:
        return [segment.tokens for segment in self.segments]

    @property
    def whole(self) -> bool:
        return self.layout is not None

    def rows(self, x: Tensor, path: str) -> Rows:
        if len(self.segments) == 1 and not self.exact:
            return Rows(0, [x.shape[0]])
        dim, each = self._unit(x)
        if not each:
            raise self._strange(x, path)
        return Rows(dim, self.sizes)

    def _unit(self, x: Tensor) -> tuple[int, int]:
        """It is [1, N, d], [N, d], ids [N] or [1, N], or, for norms of single heads, [1, N, heads, d] and
        [1, heads, N, d], where the outer one in memory is the tokens' if both have the same size."""
        tokens = sum(self.sizes)
        dims = range(x.dim() - x.is_floating_point())  # an embedding's input has no last dimension of features
        dim = max((i for i in dims if x.shape[i] == tokens), key=x.stride, default=None)
        return (0, 0) if dim is None else (dim, 1)

    def _rows_of(self, value: Tensor, index: int, hidden: Tensor) -> Tensor:
        dim = next((i for i in range(min(2, value.dim())) if value.shape[i] == hidden.shape[1]), None)
        if len(self.segments) == 1 or dim is None:
            return value
        # A copy: how a kernel rounds may depend on where its rows begin in memory.
        return value.split(self.sizes, dim)[index].clone(memory_format=torch.contiguous_format)


@final
class BatchRoute(Route):
    """One sequence per row of a padded batch, [B, T, d]."""

    padded = True

    @property
    def sizes(self) -> list[int]:
        return [segment.sequences for segment in self.segments]

    @property
    def whole(self) -> bool:
        return True

    def rows(self, x: Tensor, path: str) -> Rows:
        sizes, tokens = self.sizes, [segment.tokens for segment in self.segments]
        total = sum(sizes)
        if x.dim() == 2 and x.is_floating_point() and x.shape[0] % total == 0:
            # A batch that is flattened before the MLP; gated norms see every head as a row.
            return Rows(0, sizes, x.shape[0] // total)
        if len(self.segments) == 1 and not self.exact:
            return Rows(0, [x.shape[0]])
        if x.dim() == 1 and x.shape[0] != sum(tokens):
            # Positions, for one: one row for the whole batch, without a dimension for it.
            raise UserError(
                f"module '{path}' is asked once for a whole batch, not for its rows; no adapter can sit on it. Leave "
                "it out, or take another method, such as lora."
            )
        if x.dim() == 1 and not x.is_floating_point():
            return Rows(0, tokens)  # token ids are one flat stream here too
        if x.shape[0] not in (1, total):
            raise self._strange(x, path)
        return Rows(0, sizes, repeated=x.shape[0] != total)

    def _unit(self, x: Tensor) -> tuple[int, int]:
        rows, width = sum(self.sizes), max(max(segment.lengths) for segment in self.segments)
        flat = {rows * width: width} if x.dim() == 2 and x.is_floating_point() else {}
        return 0, ({rows: 1} | flat).get(x.shape[0], 0)

    def _rows_of(self, value: Tensor, index: int, hidden: Tensor) -> Tensor:
        batch, width = hidden.shape[:2]
        if value.dim() < 2:
            return value
        rows, first = value.shape[0], sum(self.sizes[:index])
        # A bias by head, as ALiBi, is [B * heads, 1, T].
        each = rows // batch if value.dim() == 3 and rows % batch == 0 else int(rows == batch)
        before = max((states[0][0].shape[1] for states in self.prefixes.values()), default=0)
        # Not the angles of rotary positions [B, T, head_dim], whose last dimension may happen to be as long.
        is_mask = value.dim() in (2, 4) or value.dtype == torch.bool or each > 1
        if before and is_mask and value.shape[-1] == before + width:
            value = value[..., before:]
        return value[first * each : (first + self.sizes[index]) * each] if each else value


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
