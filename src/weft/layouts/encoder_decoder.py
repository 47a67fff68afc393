"""Encoder-decoders: two padded batches, the encoder's [B, Te] and the decoder's [B, Td].

The rows of both are sorted by adapter. Each has a route of its own, because an adapter's random numbers depend on the
lengths of the rows that it sees. The linears of cross-attention that read the encoder's states run under the encoder's
route, in the middle of the decoder (``Route.elsewhere``).

As in PEFT, virtual tokens stand at the head of the encoder's input, and learned keys and values before those of the
decoder's self-attention. PEFT 0.21 gives layer ``i`` of ``n`` the pair ``2 i mod n`` of a file's keys and values. So do
we, or a file would mean two things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from weft.base.embeddings import input_embeddings, stacks
from weft.core.adapter import Adapter
from weft.core.architecture import Architecture
from weft.core.layout import Counts, Decoding, Layout
from weft.core.route import BatchRoute, PrefixStates, Segment
from weft.core.stream import Part, Stream
from weft.errors import UserError
from weft.layouts.building import embed, explained, id_tensor, lay_out
from weft.layouts.padded_batch import padded, padded_prefix, padded_rows, prefix_mask
from weft.libraries import cache_arguments, fixed_decoder_cache, growing_decoder_cache, keys_values, output_cache


@dataclass(frozen=True)
class Memory:
    """The encoder's result: ``states`` [B, Te, d], ``mask`` [B, Te] (1: a token), and its batch."""

    states: Tensor
    mask: Tensor
    stream: Stream


@final
class EncoderDecoder(Layout):
    """Every sequence is read by the encoder; its part's target is what the decoder writes."""

    route = BatchRoute
    words = "in padded batches"
    tasks = frozenset({"seq2seq"})
    writes_apart = True

    def stream(self, parts: Sequence[Part], *, cache: Any = None) -> Stream:
        """The encoder's batch: texts without an answer in them."""
        return lay_out(self, [replace(part, answers=()) for part in parts], cache)

    def forward(self, stream: Stream) -> Tensor:
        rows = padded_rows(stream.lengths, stream.input_ids.device)
        return self.encode(stream).states.flatten(0, 1)[rows]

    def encode(self, stream: Stream) -> Memory:
        """Run the encoder over a batch, in which every sequence has its adapter's virtual tokens."""
        encoder, _ = stacks(self.model)
        with self.router.use(stream.route):
            hidden, mask, _ = self._embedded(stream)
            states = encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        return Memory(states, mask, stream)

    def run(self, parts: Sequence[Part]) -> tuple[Stream, Tensor]:
        """Both stacks, the decoder seeing each target's predecessors: its batch has one row per token of a target."""
        memory, start = self._read(parts), start_token(self.model)
        with explained(parts, len(input_embeddings(self.model).weight)):
            stream = self.decoder_stream(memory, [(start, *target[:-1]) for part in parts for target in part.targets])
        longest = max(stream.prefix_length)
        past = fixed_decoder_cache(padded_prefix(stream, longest, memory.states)) if longest else None
        with self.router.use(stream.route):
            hidden, mask, rows = self._embedded(stream)
            mask = torch.cat([prefix_mask(stream, mask), mask], dim=1)
            out = self.decode(memory, hidden, mask, past)
        return stream, out.flatten(0, 1)[rows]

    def _read(self, parts: Sequence[Part]) -> Memory:
        """The encoder's result for the sequences of a batch; one that is all the last one's before it is read once."""
        stream = self.stream(parts)
        kept = [_kept(part) for part in parts if part.sequences]
        if all(place == number for own in kept for place, number in enumerate(own)):
            return self.encode(stream)
        first, at = 0, list[int]()
        for own in kept:
            numbers = {place: first + number for number, place in enumerate(dict.fromkeys(own))}
            at += [numbers[place] for place in own]
            first += len(numbers)
        few = [_only(part, own) for part, own in zip([p for p in parts if p.sequences], kept, strict=True)]
        memory = self.encode(self.stream(few))
        index = torch.tensor(at, device=memory.states.device)
        return Memory(memory.states[index], memory.mask[index], stream)

    def written(self, context: Sequence[int], ids: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        return context, ids

    def before(self, stream: Stream, number: int, start: int, count: int) -> list[int]:
        """Each row of the decoder stands before its own token."""
        return list(stream.rows[number][:count])

    def _embedded(self, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, T, d], the mask [B, T], and where the N rows are in [B * T]."""
        hidden = embed(self.model, stream, self.adapters)
        rows, size = padded_rows(stream.lengths, hidden.device), (len(stream.lengths), max(stream.lengths))
        mask = torch.ones(len(hidden), dtype=torch.int64, device=hidden.device)
        return padded(hidden, rows, *size), padded(mask, rows, *size), rows

    def decode(self, memory: Memory, hidden: Tensor, mask: Tensor, past: Any) -> Tensor:
        """The decoder's last hidden states [B, T, d] of embeddings [B, T, d]."""
        _, decoder = stacks(self.model)
        states: Tensor = decoder(
            inputs_embeds=hidden,
            attention_mask=mask,
            encoder_hidden_states=memory.states,
            encoder_attention_mask=memory.mask,
            **cache_arguments(decoder.forward, past),
        ).last_hidden_state
        return states

    def decoder_stream(self, memory: Memory, inputs: Sequence[Sequence[int]]) -> Stream:
        """The decoder's batch; rows and seeds are the encoder's, prefixes move here from there."""
        source = memory.stream.route
        segments: list[Segment] = []
        rows: list[range] = []
        first = begin = 0
        for segment in source.segments:
            own = tuple(len(sequence) for sequence in inputs[first : first + segment.sequences])
            for length in own:
                rows.append(range(begin, begin + length))
                begin += length
            segments.append(replace(segment, tokens=sum(own), lengths=own, neftune_alpha=0.0))
            first += segment.sequences
        prefixes = {group: _by_layer(states, self.shape) for group, states in source.prefixes.items()}
        elsewhere, device = dict.fromkeys(self.shape.memory_linears, source), memory.states.device
        return Stream(
            input_ids=id_tensor(list(chain.from_iterable(inputs)), len(input_embeddings(self.model).weight), device),
            position_ids=torch.tensor([place for own_rows in rows for place in range(len(own_rows))], device=device),
            lengths=tuple(len(own_rows) for own_rows in rows),
            rows=tuple(rows),
            virtual_rows={},
            prefix_length=memory.stream.prefix_length,
            route=BatchRoute(tuple(segments), None, prefixes, elsewhere=elsewhere),
            standing=tuple(own_rows.stop - 1 for own_rows in rows),
        )

    def keys_values(self, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of the decoder, as prefixes are laid out; the encoder reads the same text."""
        out: Any = self.model(input_ids=input_ids[None], decoder_input_ids=input_ids[None], use_cache=True)
        layers = [(keys[0], values[0]) for keys, values in keys_values(output_cache(out))]
        pairs = list(layers)
        for index in reversed(range(len(layers))):
            pairs[_pair(index, len(layers))] = layers[index]
        return pairs

    def refusal(self, adapter: Adapter) -> str:
        """It must add no blocks, and touch nothing but linears, norms, the shared embeddings and the head."""
        shape, method = self.shape, adapter.config.method
        if adapter.inserted_blocks():
            return f"method {method} adds blocks, which works in decoders only, not in seq2seq."
        known = {*shape.linears, *shape.norms, *shape.activations, shape.embeddings, shape.head}
        foreign = sorted({*adapter.sites(), *adapter.input_sites()} - known)
        if not foreign:
            return ""
        return (
            f"method {method}: '{foreign[0]}' of this {shape.model_type} model cannot carry an adapter; its linear "
            "modules, norms, the shared embeddings and the head can."
        )


@final
class Decoder(Decoding):
    """Writes one token per row and step; every row stands at the same place, so nothing is padded but prefixes."""

    def __init__(self, layout: EncoderDecoder, parts: Sequence[Part]) -> None:
        """``parts``: the prompts, which go through the encoder here."""
        self.layout, self.memory = layout, layout.encode(layout.stream(parts))
        first = start_token(layout.model)
        stream = layout.decoder_stream(self.memory, [(first,)] * len(self.memory.states))
        self._mask, self._elsewhere = prefix_mask(stream, self.memory.mask), stream.route.elsewhere
        longest = max(stream.prefix_length)
        self._cache = growing_decoder_cache(padded_prefix(stream, longest, self.memory.states) if longest else [])
        self.step(stream.input_ids, [(s.adapter, s.sequences) for s in stream.route.segments])

    def step(self, tokens: Tensor, counts: Counts) -> None:
        layout = self.layout
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        with layout.router.use(layout.next_route(counts, elsewhere=self._elsewhere)):
            hidden = input_embeddings(layout.model)(tokens)
            self.hidden = layout.decode(self.memory, hidden[:, None], self._mask, self._cache)[:, 0]

    def keep(self, rows: Tensor) -> None:
        memory = self.memory
        self.memory = Memory(memory.states[rows], memory.mask[rows], memory.stream)
        self._mask = self._mask[rows]
        self._cache.batch_select_indices(rows)


def _kept(part: Part) -> list[int]:
    """Of each sequence the place of the one that is read for it: an equal one before, or it itself."""
    places: list[int] = []
    for place, sequence in enumerate(part.sequences):
        shared = part.shared[place] if part.shared and part.seed is None else 0
        before = places[-1] if places else 0
        same = 0 < shared == len(sequence) and list(sequence) == list(part.sequences[before])
        slots = not part.slots or list(part.slots[place]) == list(part.slots[before])
        places.append(before if same and slots else place)
    return places


def _only(part: Part, places: Sequence[int]) -> Part:
    """What the encoder reads of a part: its sequences at these places, each once."""
    chosen = list(dict.fromkeys(places))
    slots = [part.slots[place] for place in chosen] if part.slots else ()
    return replace(part, sequences=[part.sequences[place] for place in chosen], slots=slots, targets=(), shared=())


def start_token(model: nn.Module) -> int:
    """The token with which the decoder's input begins.

    Raises:
        UserError: The model's configuration names none.
    """
    for config in (model.config, getattr(model, "generation_config", None)):
        found = getattr(config, "decoder_start_token_id", None)
        if isinstance(found, int):
            return found
    raise UserError("the model's config.json has no decoder_start_token_id, which its decoder begins with (often 0).")


def _by_layer(states: PrefixStates, architecture: Architecture) -> PrefixStates:
    return [states[_pair(layer, len(states))] for layer in range(architecture.num_layers)]


def _pair(layer: int, layers: int) -> int:
    """The number of the pair of keys and values in a file that a decoder's layer gets."""
    return 2 * layer % layers
