"""The sequences of all adapters laid end to end, and their embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter, Run
from weft.core.architecture import Architecture
from weft.core.body import accepted, body_of, held
from weft.core.embeddings import input_embeddings
from weft.core.route import PrefixStates, Route, Segment, StreamRoute, stable_seed
from weft.errors import UserError
from weft.ops.attention import SequenceLayout


@dataclass(frozen=True)
class Part:
    """The sequences (token ids) of one adapter in a batch; ``adapter`` None is the plain base.

    ``answers`` and ``slots``: per sequence, where its answer begins and the places its template names, for adapters
    whose virtual tokens stand there (``Adapter.places``). ``neftune_alpha``: noise on the embeddings in training.
    ``token_types``: per sequence, the segment of each token; nothing, or an empty sequence: all 0. ``targets``: per
    sequence, what an encoder-decoder is to write.
    """

    adapter: str | None
    sequences: Sequence[Sequence[int]]
    seed: int | None = None
    _: KW_ONLY
    answers: Sequence[int | None] = ()
    slots: Sequence[Sequence[int]] = ()
    neftune_alpha: float = 0.0
    token_types: Sequence[Sequence[int]] = ()
    targets: Sequence[Sequence[int]] = ()


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A batch, laid out.

    Attributes:
        input_ids, position_ids: [N] int64; rows of virtual tokens hold id 0, their embedding is put in later.
        rows: stream row of every own token, one tuple per sequence.
        virtual_rows: for each segment with virtual tokens, the rows they take, [sequences * num_virtual_tokens].
        prefix_length: learned keys that each sequence sees before its own.
        route: where each row goes.
        standing: of each sequence the row whose hidden state stands for all of it.
        token_types: [N] int64, or None: all 0. Virtual tokens have type 0, as in PEFT.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    rows: tuple[Sequence[int], ...]
    virtual_rows: Mapping[int, Tensor]
    prefix_length: tuple[int, ...]
    route: Route
    standing: tuple[int, ...]
    token_types: Tensor | None = None


def build_stream(
    parts: Sequence[Part],
    adapters: Mapping[str, Adapter],
    *,
    device: torch.device,
    route: type[Route] = StreamRoute,
    exact: bool = False,
    cache: Any = None,
    first_position: int = 0,
    token_types: int = 0,
    first_stands: bool = False,
) -> Stream:
    """Lay the parts' sequences, with virtual tokens among them, end to end; a first or last row stands for one."""
    ids: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    groups: list[int] = []
    own_rows: list[Sequence[int]] = []
    prefix_length: list[int] = []
    segments: list[Segment] = []
    virtual_rows: dict[int, Tensor] = {}
    prefixes: dict[int, PrefixStates] = {}
    parts = [part for part in parts if part.sequences]
    for group, part in enumerate(parts):
        adapter = adapters[part.adapter] if part.adapter is not None else None
        virtual = adapter.num_virtual_tokens if adapter else 0
        prefix = adapter.num_prefix_tokens if adapter else 0
        begin = len(ids)
        learned: list[int] = []
        for index, sequence in enumerate(part.sequences):
            start, length = len(ids), virtual + len(sequence)
            own: Sequence[int] = range(start, start + length)
            if adapter is not None and virtual:
                place = part.answers[index] if part.answers else None
                answer = adapter.head.answer(place, len(sequence))
                runs = adapter.places(len(sequence), answer, part.slots[index] if part.slots else ())
                own, taken = _interleave(len(sequence), runs, start)
                learned.extend(taken)
            own_rows.append(own)
            ids.extend([0] * length)
            for row, token in zip(own, sequence, strict=True):
                ids[row] = token
            positions.extend(range(first_position + prefix, first_position + prefix + length))
            lengths.append(length)
            groups.append(group)
            prefix_length.append(prefix)
        if virtual:
            virtual_rows[group] = torch.tensor(learned, device=device)
        if prefix and adapter:
            prefixes[group] = adapter.prefix_states()
        segments.append(Segment(
            part.adapter, len(ids) - begin, len(part.sequences), seed=part.seed, padded=route.padded,
            lengths=tuple(lengths[-len(part.sequences) :]), neftune_alpha=part.neftune_alpha,
        ))  # fmt: skip
    layout = None if route.padded else SequenceLayout.build(
        lengths, groups, prefix_groups=tuple(prefixes), separate_groups=exact, device=device
    )  # fmt: skip
    starts = (end - length for end, length in zip(accumulate(lengths), lengths, strict=True))
    return Stream(
        input_ids=torch.tensor(ids, device=device),
        position_ids=torch.tensor(positions, device=device),
        lengths=tuple(lengths),
        rows=tuple(own_rows),
        virtual_rows=virtual_rows,
        prefix_length=tuple(prefix_length),
        route=route(tuple(segments), layout, prefixes, cache=cache, exact=exact),
        standing=tuple(starts if first_stands else (end - 1 for end in accumulate(lengths))),
        token_types=_token_types(parts, own_rows, len(ids), token_types, device) if token_types else None,
    )


def _token_types(
    parts: Sequence[Part], rows: Sequence[Sequence[int]], tokens: int, known: int, device: torch.device
) -> Tensor | None:
    given = [types for part in parts for types in part.token_types or [()] * len(part.sequences)]
    if not any(any(types) for types in given):
        return None
    found = [0] * tokens
    for own, types in zip(rows, given, strict=True):
        for row, kind in zip(own, types, strict=bool(types)):
            found[row] = kind
    if not 0 <= min(found) <= max(found) < known:
        raise UserError(f"the tokenizer tells {max(found) + 1} segments apart, the model {known}: they do not belong "
                        "together.")  # fmt: skip
    return torch.tensor(found, device=device)


def _interleave(length: int, runs: Sequence[Run], start: int) -> tuple[list[int], list[int]]:
    """Rows, from ``start``, of a sequence's own tokens, and those of its virtual tokens in the order of ``runs``."""
    own: list[int] = []
    taken: dict[int, range] = {}
    row = start
    for index in sorted(range(len(runs)), key=lambda i: runs[i][0]):
        place, count = runs[index]
        ahead = place - len(own)
        own.extend(range(row, row + ahead))
        taken[index] = range(row + ahead, row + ahead + count)
        row += ahead + count
    own.extend(range(row, row + length - len(own)))
    return own, [virtual for index in range(len(runs)) for virtual in taken[index]]


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
