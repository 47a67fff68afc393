"""The embeddings of a batch, and the run of the base's body over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.base.body import accepted, held
from weft.base.embeddings import input_embeddings
from weft.core.adapter import Adapter
from weft.core.architecture import Architecture, body_of
from weft.core.stream import Stream
from weft.ops.seeds import stable_seed


def embed(model: nn.Module, stream: Stream, adapters: Mapping[str, Adapter]) -> Tensor:
    """Token embeddings [N, d] with the adapters' virtual tokens in their rows."""
    table = input_embeddings(model)
    hidden = table(stream.input_ids)
    hidden = _noise(hidden, stream)
    for group, rows in stream.virtual_rows.items():
        segment = stream.route.segments[group]
        assert segment.adapter is not None
        learned = adapters[segment.adapter].virtual_tokens(segment.seed).to(hidden.dtype)
        hidden = hidden.index_copy(0, rows, learned.repeat(segment.sequences, 1))
    return hidden


def _noise(hidden: Tensor, stream: Stream) -> Tensor:
    """NEFTune (Jain et al. 2023, algorithm 1): in training, a sequence of L own tokens gets uniform noise from
    (-1, 1) * alpha / sqrt(L d) on its embeddings; the numbers come from the segment's own seed."""
    segments = stream.route.segments
    if not any(segment.neftune_alpha and segment.seed is not None for segment in segments):
        return hidden
    pieces, begin, first, d = [], 0, 0, hidden.shape[1]
    for rows, segment in zip(hidden.split([s.tokens for s in segments]), segments, strict=True):
        if segment.neftune_alpha and segment.seed is not None:
            sequences = stream.rows[first : first + segment.sequences]
            own = torch.tensor([row - begin for places in sequences for row in places], device=hidden.device)
            lengths = torch.tensor([len(places) for places in sequences for _ in places])
            generator = torch.Generator().manual_seed(stable_seed(segment.seed, "neftune"))
            noise = torch.rand(len(own), d, generator=generator) * 2 - 1
            noise *= (segment.neftune_alpha / (lengths * d).sqrt())[:, None]
            # Virtual rows are put in afterwards, and so have none.
            rows = rows.index_add(0, own, noise.to(rows))
        pieces.append(rows)
        begin, first = begin + segment.tokens, first + segment.sequences
    return torch.cat(pieces)


def run_body(model: nn.Module, shape: Architecture, embeds: Tensor, ids: Tensor, **arguments: Any) -> Any:
    """Run the body over embeddings [B, T, d] of the tokens ``ids`` [B, T], with those arguments that it takes."""
    body = body_of(model, shape)
    more = accepted(body, **arguments)
    if not shape.by_ids:
        return body(inputs_embeds=embeds, **more)
    with held(input_embeddings(model), embeds):
        return body(input_ids=ids, **more)
