"""A layout: how the sequences of a batch lie while the base runs over them.

``weft.layouts`` has the three: packed stream, padded batch, encoder-decoder. Who trains, evaluates, generates or proves
asks the layout and never which it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from weft.core.adapter import Adapter
from weft.core.architecture import Architecture, Installer
from weft.core.route import Route, Router, Segment
from weft.core.stream import Part, Stream

# (adapter, how many rows of it), in the order of the rows.
Counts = Sequence[tuple[str | None, int]]


class Decoding(ABC):
    """Rows that write, one token each at a time.

    Attributes:
        hidden: [B, d], the states after their last tokens.
        patient: whether rows that have ended may stay until half of all have.
    """

    hidden: Tensor
    patient: ClassVar[bool] = True

    @abstractmethod
    def step(self, tokens: Tensor, counts: Counts) -> None:
        """Go on with these tokens [B]."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these [n], in ascending order."""


class Layout(ABC):
    """How batches lie. It sees the adapters that come and go, and holds no batch.

    Attributes:
        route: how modules are given their rows.
        masks_prefixes: whether learned keys stand before every row of a batch, masked for those without.
        words: how the base runs, for messages.
        tasks: what can be done over such batches.
        writes_apart: whether what is written is no part of the sequence that is read.
    """

    route: ClassVar[type[Route]]
    masks_prefixes: ClassVar[bool] = False
    words: ClassVar[str]
    tasks: ClassVar[frozenset[str]] = frozenset({"causal_lm", "sequence_classification"})
    writes_apart: ClassVar[bool] = False

    def __init__(
        self, model: nn.Module, shape: Architecture, router: Router, adapters: Mapping[str, Adapter], exact: bool
    ) -> None:
        self.model, self.shape, self.router, self.adapters, self.exact = model, shape, router, adapters, exact

    @property
    def attention(self) -> Installer | None:
        """What makes the model attend along such batches; None: its own attention does."""
        return None if self.route.padded else self.shape.install_attention

    @abstractmethod
    def stream(self, parts: Sequence[Part], *, cache: Any = None) -> Stream:
        """Lay out a batch; rows of ``parts`` keep their order."""

    @property
    def shares_rows(self) -> bool:
        """Whether sequences can have their first rows in common."""
        # Tables that are chosen by a sequence's own length make equal rows of two sequences differ.
        return self.route.shares and self.shape.install_tables is None and not self.shape.bidirectional

    def can_share(self, part: Part) -> bool:
        """Whether sequences of the part can: numbers that are drawn for each sequence make its rows its own."""
        adapter = None if part.adapter is None else self.adapters[part.adapter]
        drawn = part.seed is not None and (part.neftune_alpha > 0 or (adapter is not None and adapter.draws))
        return self.shares_rows and not drawn

    def next_route(self, counts: Counts, **more: Any) -> Route:
        """Where one new token per row goes."""
        segments = tuple(Segment(name, n, n, lengths=(1,) * n, padded=self.route.padded) for name, n in counts)
        return self.route(segments, exact=self.exact, **more)

    def next_tokens(self, tokens: Tensor, positions: Tensor, counts: Counts, **more: Any) -> Stream:
        """A batch of one new token [B] per row, at these positions [B]."""
        rows = range(len(tokens))
        return Stream(
            input_ids=tokens,
            position_ids=positions,
            lengths=(1,) * len(rows),
            rows=tuple(range(i, i + 1) for i in rows),
            virtual_rows={},
            prefix_length=(0,) * len(rows),
            route=self.next_route(counts, **more),
            standing=tuple(rows),
        )

    @abstractmethod
    def forward(self, stream: Stream) -> Tensor:
        """Last hidden states [N, d] of a batch that ``stream`` laid out; of an encoder-decoder those of its encoder."""

    def run(self, parts: Sequence[Part]) -> tuple[Stream, Tensor]:
        """The batch of what answers, whose ``rows`` are those of each sequence, and its last hidden states [N, d]."""
        stream = self.stream(parts)
        return stream, self.forward(stream)

    def written(self, context: Sequence[int], ids: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """The sequence, and the target, of a batch in which a row stands before each of ``ids`` after ``context``."""
        return [*context, *ids[:-1]], ()

    def before(self, stream: Stream, number: int, start: int, count: int) -> list[int]:
        """The rows before ``count`` tokens that sequence ``number`` writes from place ``start`` on."""
        rows = stream.rows[number]
        return [
            stream.before(rows[place]) if place < len(rows) else stream.standing[number]
            for place in range(start, start + count)
        ]

    @abstractmethod
    def keys_values(self, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer the keys and values [kv_heads, n, head_dim] that the plain base has for one text [n]."""

    def refusal(self, adapter: Adapter) -> str:
        """Why the adapter's sites cannot work in such batches; "": they can."""
        return ""
