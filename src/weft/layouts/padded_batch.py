"""Padded batches [B, T], for models that can do nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from weft.core.architecture import body_of
from weft.core.layout import Layout
from weft.core.route import BatchRoute
from weft.core.stream import Part, Stream
from weft.errors import UserError
from weft.layouts.building import embed, lay_out, run_body
from weft.libraries import cache_arguments, cache_name, fixed_cache, growing_cache, keys_values, output_cache


@final
class Padded(Layout):
    """One sequence per row, padded on the right, through the model's own attention."""

    route = BatchRoute
    masks_prefixes = True
    words = "in padded batches"

    def stream(self, parts: Sequence[Part], *, cache: Any = None) -> Stream:
        return lay_out(self, parts, cache)

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
        if cache_name(type(body).forward) is None:
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


def padded_prefix(stream: Stream, longest: int, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per layer every row's learned keys and values, [B, kv_heads, longest, head_dim], aligned to the right. The caller
    masks the rest."""
    pairs: list[tuple[Tensor, Tensor]] = []
    layers = len(next(iter(stream.route.prefixes.values())))
    some_key, some_value = next(iter(stream.route.prefixes.values()))[0]
    for layer in range(layers):
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for group, segment in enumerate(stream.route.segments):
            states = stream.route.prefixes.get(group)
            pair = states[layer] if states is not None else (some_key[:, :0], some_value[:, :0])
            for side, out in zip(pair, (keys, values), strict=True):
                padded = torch.nn.functional.pad(side.to(hidden.dtype), (0, 0, longest - side.shape[1], 0))
                out.append(padded[None].expand(segment.sequences, -1, -1, -1))
        pairs.append((torch.cat(keys), torch.cat(values)))
    return pairs
