"""Encoder-decoders (T5 and its kin): two padded batches, the encoder's [B, Te] and the decoder's [B, Td].

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
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter, MethodConfig
from weft.core.architecture import Architecture
from weft.core.embeddings import input_embeddings, stacks
from weft.core.route import PrefixStates, Route, Segment
from weft.core.stream import Part, Stream, embed, padded_prefix
from weft.errors import UserError
from weft.libraries import cache_arguments, fixed_decoder_cache, growing_decoder_cache, keys_values, output_cache

if TYPE_CHECKING:
    from weft.core.adapters import Adapters


@dataclass(frozen=True)
class Memory:
    """The encoder's result: ``states`` [B, Te, d], ``mask`` [B, Te] (1: a token), and its batch."""

    states: Tensor
    mask: Tensor
    stream: Stream


def encode(adapters: Adapters, parts: Sequence[Part]) -> Memory:
    """Run the encoder over the parts' sequences, each with its adapter's virtual tokens."""
    stream = adapters.stream(parts)
    encoder, _ = stacks(adapters.model)
    with adapters.router.use(stream.route):
        hidden, mask, _ = _pad(embed(adapters.model, stream, cast(Any, adapters)), stream.lengths)
        states = encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
    return Memory(states, mask, stream)


def run_seq2seq(adapters: Adapters, parts: Sequence[Part], targets: Sequence[Sequence[int]]) -> tuple[Stream, Tensor]:
    """Run one pass over both stacks, in which the decoder sees the tokens before each target.

    Args:
        parts: The encoder's sequences, by adapter.
        targets: The text that the decoder is to write, one per sequence in the parts' order.

    Returns:
        The decoder's batch, whose ``rows`` hold one row per target, and its last hidden states [N, d].
    """
    memory = encode(adapters, parts)
    start = start_token(adapters.model)
    stream = _decoder_stream(adapters.architecture, memory, [(start, *target[:-1]) for target in targets])
    longest = max(stream.prefix_length)
    past = fixed_decoder_cache(padded_prefix(stream, longest, memory.states)) if longest else None
    with adapters.router.use(stream.route):
        hidden, mask, rows = _pad(embed(adapters.model, stream, cast(Any, adapters)), stream.lengths)
        mask = torch.cat([_prefix_mask(stream, mask), mask], dim=1)
        out = _decode(adapters.model, memory, hidden, mask, past)
    return stream, out.flatten(0, 1)[rows]


class Decoder:
    """A decoder that writes one token per row and step. All rows are of one length, so only prefixes are padded."""

    def __init__(self, adapters: Adapters, parts: Sequence[Part]) -> None:
        """Send the prompts, ``parts``, through the encoder."""
        self.adapters, self.memory = adapters, encode(adapters, parts)
        first = start_token(adapters.model)
        stream = _decoder_stream(adapters.architecture, self.memory, [(first,)] * len(self.memory.states))
        self._mask, self._route = _prefix_mask(stream, self.memory.mask), stream.route
        longest = max(stream.prefix_length)
        prefix = padded_prefix(stream, longest, self.memory.states) if longest else []
        self._cache = growing_decoder_cache(prefix)
        self.first_tokens = stream.input_ids

    def step(self, tokens: Tensor, counts: Sequence[tuple[str | None, int]]) -> Tensor:
        """The hidden states [B, d] after the tokens [B]; ``counts`` holds (adapter, rows) in order."""
        segments = tuple(Segment(name, n, n, lengths=(1,) * n, padded=True) for name, n in counts)
        model, route = self.adapters.model, replace(self._route, segments=segments, prefixes={})
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        with self.adapters.router.use(route):
            hidden = input_embeddings(model)(tokens)
            return _decode(model, self.memory, hidden[:, None], self._mask, self._cache)[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these [n], in this order."""
        memory = self.memory
        self.memory = Memory(memory.states[rows], memory.mask[rows], memory.stream)
        self._mask = self._mask[rows]
        self._cache.batch_select_indices(rows)


def start_token(model: nn.Module) -> int:
    """The token with which the decoder's input begins.

    Raises:
        UserError: The model's configuration names none.
    """
    for config in (model.config, getattr(model, "generation_config", None)):
        found = getattr(config, "decoder_start_token_id", None)
        if isinstance(found, int):
            return found
    raise UserError("the model's config.json has no decoder_start_token_id, which its decoder begins with (T5: 0).")


def _decoder_stream(architecture: Architecture, memory: Memory, inputs: Sequence[Sequence[int]]) -> Stream:
    """The decoder's batch. Rows and seeds are the encoder's; the prefixes move from there to here."""
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
    prefixes = {group: _by_layer(states, architecture) for group, states in source.prefixes.items()}
    elsewhere = dict.fromkeys(architecture.memory_linears, source)
    device = memory.states.device
    return Stream(
        torch.tensor([token for sequence in inputs for token in sequence], device=device),
        torch.tensor([place for own_rows in rows for place in range(len(own_rows))], device=device),
        tuple(len(own_rows) for own_rows in rows),
        tuple(rows),
        {},
        memory.stream.prefix_length,
        Route(tuple(segments), None, prefixes, None, True, elsewhere=elsewhere),
    )


def _by_layer(states: PrefixStates, architecture: Architecture) -> PrefixStates:
    return [states[_pair(layer, len(states))] for layer in range(architecture.num_layers)]


def _pair(layer: int, layers: int) -> int:
    """The number of the pair of keys and values in a file that a decoder's layer gets."""
    return 2 * layer % layers


def _pad(hidden: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """[N, d] as [B, T, d] with zeros on the right, its mask [B, T], and the places of the N rows in [B * T]."""
    count, width = len(lengths), max(lengths)
    rows = torch.cat([torch.arange(i * width, i * width + n, device=hidden.device) for i, n in enumerate(lengths)])
    padded = hidden.new_zeros(count * width, hidden.shape[-1]).index_copy(0, rows, hidden)
    mask = torch.zeros(count * width, dtype=torch.int64, device=hidden.device).index_fill(0, rows, 1)
    return padded.view(count, width, -1), mask.view(count, width), rows


def _prefix_mask(stream: Stream, like: Tensor) -> Tensor:
    """[B, longest prefix]: 1 where a row has learned keys; they stand on the right."""
    longest = max(stream.prefix_length)
    seen = torch.tensor(stream.prefix_length, device=like.device)[:, None]
    return (torch.arange(longest, device=like.device)[None] >= longest - seen).to(like.dtype)


def _decode(model: nn.Module, memory: Memory, hidden: Tensor, mask: Tensor, past: Any) -> Tensor:
    _, decoder = stacks(model)
    return decoder(
        inputs_embeds=hidden,
        attention_mask=mask,
        encoder_hidden_states=memory.states,
        encoder_attention_mask=memory.mask,
        **cache_arguments(decoder.forward, past),
    ).last_hidden_state


@torch.no_grad()
def prompt_keys_values(model: nn.Module, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs of keys and values [heads, n, head_dim] of the plain decoder for one text, as prefixes are laid out.

    The encoder reads the same text [n].
    """
    out: Any = model(input_ids=input_ids[None], decoder_input_ids=input_ids[None], use_cache=True)
    layers = [(keys[0], values[0]) for keys, values in keys_values(output_cache(out))]
    pairs = list(layers)
    for index in reversed(range(len(layers))):
        pairs[_pair(index, len(layers))] = layers[index]
    return pairs


def check_task(config: MethodConfig, architecture: Architecture) -> None:
    """Refuse a method that is not made for encoder-decoders on one.

    Raises:
        UserError: The message names the method and the tasks it is made for.
    """
    if architecture.task != "seq2seq":
        return
    for part in getattr(config, "parts", (config,)):
        if "seq2seq" not in part.tasks:
            raise UserError(
                f"method {part.method} does not work with {architecture.model_type}, whose task is seq2seq; it is made "
                f"for: {', '.join(sorted(part.tasks))}. Take another method (lora, for one) or another base."
            )


def check_job(name: str, task: str, architecture: Architecture) -> None:
    """Refuse a job that the base cannot do; ``causal_lm``, the default, means the writing that the base was made for.

    Raises:
        UserError: The task is ``seq2seq`` without an encoder-decoder, or classification with one.
    """
    kind = architecture.model_type
    if task == "seq2seq" and architecture.task != "seq2seq":
        raise UserError(
            f"job '{name}': task is seq2seq, but a {kind} model is no encoder-decoder (T5 and mT5 are). Leave task "
            "out, or take such a base."
        )
    if task == "sequence_classification" and architecture.task == "seq2seq":
        raise UserError(
            f"job '{name}': task is sequence_classification, which Weft does not do with an encoder-decoder ({kind}). "
            "Set task: seq2seq and let it write the name of the class, or take another base."
        )


def check_sites(adapter: Adapter, architecture: Architecture) -> None:
    """Refuse an adapter that sits where an encoder-decoder has no rows of one sequence each.

    Raises:
        UserError: It adds blocks, or touches more than linears, norms, the shared embeddings and the head.
    """
    if architecture.task != "seq2seq":
        return
    if adapter.inserted_blocks():
        raise UserError(f"method {adapter.config.method} adds blocks, which works in decoders only, not in seq2seq.")
    known = {*architecture.linears, *architecture.norms, *architecture.activations}
    known |= {architecture.embeddings, architecture.head}
    foreign = sorted({*adapter.sites(), *adapter.input_sites()} - known)
    if foreign:
        raise UserError(
            f"method {adapter.config.method}: '{foreign[0]}' of this {architecture.model_type} model cannot carry an "
            "adapter; its linear modules, norms, the shared embeddings and the head can."
        )
