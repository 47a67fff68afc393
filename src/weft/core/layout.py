"""A layout: how the sequences of a batch lie while the base runs over them.

Packed: end to end in one stream of N tokens, and no pad token is computed. Padded: a batch [B, T], for models that can
do nothing else. Encoder-decoders have a batch for each of their stacks (``weft.core.seq2seq``). Who trains, evaluates,
generates or proves asks the layout and never which it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter, MethodConfig
from weft.core.architecture import Architecture, AttentionInstaller
from weft.core.body import body_of, takes_cache
from weft.core.route import BatchRoute, KeyValueCache, Route, Router, Segment, StreamRoute
from weft.core.stream import Part, Stream, build_stream, embed, padded_prefix, run_body
from weft.errors import UserError
from weft.libraries import cache_arguments, fixed_cache, growing_cache, keys_values, output_cache

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
    """

    route: ClassVar[type[Route]]
    masks_prefixes: ClassVar[bool] = False
    words: ClassVar[str]
    tasks: ClassVar[frozenset[str]] = frozenset({"causal_lm", "sequence_classification"})

    def __init__(
        self, model: nn.Module, shape: Architecture, router: Router, adapters: Mapping[str, Adapter], exact: bool
    ) -> None:
        self.model, self.shape, self.router, self.adapters, self.exact = model, shape, router, adapters, exact

    @property
    def attention(self) -> AttentionInstaller | None:
        """What makes the model attend along such batches; None: its own attention does."""
        return None if self.route.padded else self.shape.install_attention

    def stream(self, parts: Sequence[Part], *, cache: Any = None) -> Stream:
        """Lay out a batch; rows of ``parts`` keep their order."""
        return build_stream(
            parts,
            self.adapters,
            device=self.model.get_input_embeddings().weight.device,  # type: ignore[operator]
            route=self.route,
            exact=self.exact,
            cache=cache,
            first_position=self.shape.first_position,
            token_types=self.shape.token_types,
            first_stands=self.shape.bidirectional,
        )

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

    @abstractmethod
    def keys_values(self, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer the keys and values [kv_heads, n, head_dim] that the plain base has for one text [n]."""

    def check_config(self, config: MethodConfig) -> None:
        """Refuse a method that is not made for the base's task.

        Raises:
            UserError: names the method and what it is made for.
        """
        for part in config.methods():
            if self.tasks.isdisjoint(part.tasks):
                raise UserError(
                    f"method {part.method} does not work with {self.shape.model_type}, whose task is "
                    f"{self.shape.task}; it is made for: {', '.join(sorted(part.tasks))}. Take another method (lora, "
                    "for one) or another base."
                )

    def refusal(self, adapter: Adapter) -> str:
        """Why the adapter's sites cannot work in such batches; "": they can."""
        return ""


@final
class Packed(Layout):
    """Sequences end to end; attention keeps them apart."""

    route = StreamRoute
    words = "over the packed stream"

    def forward(self, stream: Stream) -> Tensor:
        with self.router.use(stream.route):
            hidden = embed(self.model, stream, self.adapters)
            types = {} if stream.token_types is None else {"token_type_ids": stream.token_types[None]}
            out = run_body(
                self.model, self.shape, hidden[None], stream.input_ids[None],
                position_ids=stream.position_ids[None], use_cache=False, **types,
            )  # fmt: skip
            # Some residual streams are float32 in every dtype; the model's own head takes rows of the model's.
            return out.last_hidden_state[0].to(hidden.dtype)

    def keys_values(self, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        recorder = _Recorder()
        self.forward(self.stream([Part(None, [input_ids.tolist()])], cache=recorder))
        return recorder.layers


@final
class Padded(Layout):
    """One sequence per row, padded on the right, through the model's own attention."""

    route = BatchRoute
    masks_prefixes = True
    words = "in padded batches"

    def forward(self, stream: Stream) -> Tensor:
        with self.router.use(stream.route):
            hidden = embed(self.model, stream, self.adapters)
            rows = padded_rows(stream.lengths, hidden.device)

            def batch(values: Tensor) -> Tensor:
                return padded(values, rows, len(stream.lengths), max(stream.lengths))

            types = {} if stream.token_types is None else {"token_type_ids": batch(stream.token_types)}
            mask, past = self._with_prefix(stream, batch(torch.ones_like(stream.input_ids)), hidden)
            out = run_body(
                self.model, self.shape, batch(hidden), batch(stream.input_ids),
                position_ids=batch(stream.position_ids), attention_mask=mask, **types,
                **cache_arguments(type(body_of(self.model, self.shape)).forward, past),
            )  # fmt: skip
            return out.last_hidden_state.flatten(0, 1)[rows].to(hidden.dtype)

    def _with_prefix(self, stream: Stream, mask: Tensor, hidden: Tensor) -> tuple[Tensor, Any]:
        """The mask [B, T] with columns for learned keys before it, and the cache that holds these; None: none does."""
        longest = max(stream.prefix_length)
        if not longest:
            return mask, None
        body, encodes = body_of(self.model, self.shape), self.shape.bidirectional
        if not takes_cache(body):
            hint = "; leave out padded" if encodes else ""
            raise UserError(
                f"{type(body).__name__} takes no prefix in padded batches: it knows no cache of keys and values{hint}."
            )
        width = mask.shape[1]
        mask = torch.cat([prefix_mask(stream, mask), mask], dim=1)
        if encodes:
            # Encoders make their own of [B, T] masks without thinking of what stands before the text.
            mask = hidden.new_zeros(mask.shape).masked_fill(mask == 0, torch.finfo(hidden.dtype).min)
            mask = mask[:, None, None].expand(-1, 1, width, -1)
        return mask, fixed_cache(padded_prefix(stream, longest, hidden))

    def keys_values(self, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        body: Any = body_of(self.model, self.shape)
        # An encoder makes no cache by itself, but fills one that it is given.
        given = growing_cache() if self.shape.bidirectional else None
        how = {"use_cache": True} if given is None else cache_arguments(body.forward, given)
        out = body(input_ids=input_ids[None], **how)
        filled = keys_values(output_cache(out) if given is None else given)
        return [(keys[0], values[0]) for keys, values in filled]


class _Recorder:
    """Stands where a cache would and keeps what the layers show it."""

    prefilled = False

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def prefill(self, layer: int, k: Tensor, v: Tensor, route: Route) -> None:
        self.layers.append((k, v))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("a recorder sees one pass only")

    def part(self, first: int, count: int) -> KeyValueCache:
        raise AssertionError("a recorder sees the plain base only")


def padded_rows(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where the rows [N] of sequences of these lengths are in [B * T]."""
    width = max(lengths)
    return torch.cat([torch.arange(i * width, i * width + n, device=device) for i, n in enumerate(lengths)])


def padded(values: Tensor, rows: Tensor, count: int, width: int) -> Tensor:
    """[N, ...] as [B, T, ...], zeros where nothing is; ``rows`` as ``padded_rows`` gives them."""
    empty = values.new_zeros(count * width, *values.shape[1:])
    return empty.index_copy(0, rows, values).view(count, width, *values.shape[1:])


def prefix_mask(stream: Stream, like: Tensor) -> Tensor:
    """[B, longest prefix]: 1 where a row has learned keys; they stand on the right."""
    longest = max(stream.prefix_length)
    seen = torch.tensor(stream.prefix_length, device=like.device)[:, None]
    return (torch.arange(longest, device=like.device)[None] >= longest - seen).to(like.dtype)
