"""The sequences of all adapters laid end to end, their embeddings, and the run of the base's body over them."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.base.body import accepted, held
from weft.base.embeddings import input_embeddings
from weft.core.adapter import Adapter, Run
from weft.core.architecture import Architecture, body_of
from weft.core.layout import Layout
from weft.core.route import PrefixStates, Route, Segment, StreamRoute
from weft.core.stream import Part, Stream
from weft.errors import UserError
from weft.layouts.end_to_end import EndToEnd
from weft.ops.seeds import stable_seed
from weft.ops.sequence_layout import SequenceLayout


def lay_out(layout: Layout, parts: Sequence[Part], cache: Any = None) -> Stream:
    """The batch of ``parts`` for the base of ``layout``; their rows keep their order.

    Raises:
        UserError: There is no sequence, or one of them holds what is no token id of the base.
    """
    shape, table = layout.shape, input_embeddings(layout.model).weight
    with explained(parts, len(table)):
        stream = build_stream(
            parts,
            layout.adapters,
            device=table.device,
            vocabulary=len(table),
            route=layout.route,
            exact=layout.exact,
            cache=cache,
            first_position=shape.first_position,
            token_types=shape.token_types,
            first_stands=shape.bidirectional,
            shares=layout.can_share,
        )
        if 0 in stream.lengths:  # it would have no row that stands for it
            raise ValueError("a sequence without a token")
    return stream


def build_stream(
    parts: Sequence[Part],
    adapters: Mapping[str, Adapter],
    *,
    device: torch.device,
    vocabulary: int | None = None,
    route: type[Route] = StreamRoute,
    exact: bool = False,
    cache: Any = None,
    first_position: int = 0,
    token_types: int = 0,
    first_stands: bool = False,
    shares: Callable[[Part], bool] = lambda part: False,
) -> Stream:
    """Lay the parts' sequences, with virtual tokens among them, end to end; a first or last row stands for one.

    ``shares`` tells of a part whether its sequences can have the rows in common of which ``Part.shared`` speaks.
    """
    laid = EndToEnd()
    groups: list[int] = []
    prefix_length: list[int] = []
    segments: list[Segment] = []
    virtual_rows: dict[int, Tensor] = {}
    virtual_numbers: dict[int, Tensor] = {}
    prefixes: dict[int, PrefixStates] = {}
    parts = [part for part in parts if part.sequences]
    for group, part in enumerate(parts):
        adapter = adapters[part.adapter] if part.adapter is not None else None
        prefix = adapter.num_prefix_tokens if adapter else 0
        begin, first = len(laid.ids), len(laid.rows)
        learned = _lay_part(laid, part, adapter, first_position + prefix, shares(part))
        groups += [group] * len(part.sequences)
        prefix_length += [prefix] * len(part.sequences)
        if adapter and (virtual := adapter.num_virtual_tokens):
            virtual_rows[group] = torch.tensor(learned, device=device)
            if len(learned) < virtual * len(part.sequences):
                virtual_numbers[group] = torch.arange(virtual, device=device).repeat(len(learned) // virtual)
        if prefix and adapter:
            prefixes[group] = adapter.prefix_states()
        segments.append(Segment(
            part.adapter, len(laid.ids) - begin, len(part.sequences), seed=part.seed, padded=route.padded,
            lengths=tuple(laid.lengths[first:]), neftune_alpha=part.neftune_alpha,
        ))  # fmt: skip
    lengths, sharing = laid.lengths, laid.sharing(groups)
    layout = None if route.padded else SequenceLayout.build(
        lengths, groups, prefix_groups=(*prefixes, *(one.group for one in sharing)), separate_groups=exact,
        device=device,
    )  # fmt: skip
    return Stream(
        input_ids=id_tensor(laid.ids, vocabulary, device),
        position_ids=torch.tensor(laid.positions, device=device),
        lengths=tuple(lengths),
        rows=tuple(laid.rows),
        virtual_rows=virtual_rows,
        prefix_length=tuple(prefix_length),
        route=route(tuple(segments), layout, prefixes, cache=cache, exact=exact, sharing=sharing),
        standing=tuple(own.start if first_stands else own.stop - 1 for own in laid.own),
        token_types=_token_types(parts, laid.rows, len(laid.ids), token_types, device) if token_types else None,
        virtual_numbers=virtual_numbers,
        joints=laid.joints,
    )


def _lay_part(laid: EndToEnd, part: Part, adapter: Adapter | None, position: int, shares: bool) -> list[int]:
    """Lay the sequences of a part; returns the rows of its virtual tokens."""
    learned: list[int] = []
    leader = -1
    theirs: Sequence[Run] = ()
    for index, sequence in enumerate(part.sequences):
        runs: Sequence[Run] = ()
        if adapter is not None and adapter.num_virtual_tokens:
            place = part.answers[index] if part.answers else None
            answer = adapter.head.answer(place, len(sequence))
            runs = tuple(adapter.places(len(sequence), answer, part.slots[index] if part.slots else ()))
        shared = part.shared[index] if part.shared else 0
        if shared and shares and runs == theirs and all(place <= shared for place, _ in runs):
            laid.follow(sequence, shared, leader)
            continue
        learned += laid.add(sequence, runs, position)
        if not shared:
            leader, theirs = len(laid.rows) - 1, runs
    return learned


def id_tensor(ids: Sequence[int], vocabulary: int | None, device: torch.device) -> Tensor:
    """The token ids [N] as a tensor; ``explained`` says what is wrong where this fails."""
    found = torch.tensor(ids)
    low, high = found.aminmax()
    if found.dim() != 1 or found.dtype != torch.int64 or low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ValueError("these are no token ids")
    return found.to(device)


@contextlib.contextmanager
def explained(parts: Sequence[Part], vocabulary: int) -> Iterator[None]:
    """Look for what is wrong with a batch, token by token, only where it cannot be laid out inside.

    Raises:
        UserError: Something is; names the part and the place.
    """
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        _check_parts(parts, vocabulary)
        raise


def _check_parts(parts: Sequence[Part], vocabulary: int) -> None:
    for part in parts:
        who = f"the part of {'the base' if part.adapter is None else repr(part.adapter)}"
        for index, sequence in enumerate(_list(part.sequences, f"{who}: its sequences", "lists of token ids")):
            check_ids(sequence, vocabulary, f"{who}: sequences[{index}]")
        for name in ("answers", "slots", "token_types", "targets"):
            given = _list(getattr(part, name), f"{who}: its {name}", "a list with an entry for each sequence")
            if given and len(given) != len(part.sequences):
                raise UserError(f"{who}: {len(given)} {name} for {len(part.sequences)} sequences.")
        for index, sequence in enumerate(part.targets):
            if len(sequence):  # a part that writes nothing has empty ones
                check_ids(sequence, vocabulary, f"{who}: targets[{index}]")
    if not any(part.sequences for part in parts):
        raise UserError("the batch holds no sequence; give at least one part with one.")


def check_ids(sequence: object, vocabulary: int, where: str) -> None:
    """Refuse what is no list of token ids, or an empty one.

    Raises:
        UserError: It is; names the first place.
    """
    if not (ids := _list(sequence, where, "a list of token ids")):
        raise UserError(f"{where} is without a single token.")
    for place, token in enumerate(ids):
        try:
            known = 0 <= operator.index(token) < vocabulary
        except TypeError:
            known = False
        if not known:
            raise UserError(f"{where}: {token!r} at place {place} is no token id; the base has 0 to {vocabulary - 1}.")


def _list(value: object, where: str, expected: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        hint = " (.tolist() gives one)" if hasattr(value, "tolist") else ""
        raise UserError(f"{where} must be {expected}, not {type(value).__name__}{hint}.")
    return value


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


def embed(model: nn.Module, stream: Stream, adapters: Mapping[str, Adapter]) -> Tensor:
    """Token embeddings [N, d] with the adapters' virtual tokens in their rows."""
    table = input_embeddings(model)
    hidden = table(stream.input_ids)
    hidden = _noise(hidden, stream)
    for group, rows in stream.virtual_rows.items():
        segment = stream.route.segments[group]
        assert segment.adapter is not None
        learned = adapters[segment.adapter].virtual_tokens(segment.seed).to(hidden.dtype)
        numbers = stream.virtual_numbers.get(group)
        learned = learned.repeat(segment.sequences, 1) if numbers is None else learned[numbers]
        hidden = hidden.index_copy(0, rows, learned)
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
