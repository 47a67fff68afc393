"""The proof that the rows of a model that only runs padded batches may go on from a cache.

Once for the base and once for every adapter, two short texts go through ``generation.lockstep`` and, whole, through the
padded path. If the logits agree within what rounding does to them, the cache is used from then on. If not, or if
the model gives none, every token runs the whole text again: slow, and right.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from weft.base.embeddings import input_embeddings
from weft.core.adapters import Adapters
from weft.core.stream import Part
from weft.generation.lockstep import Group


@dataclass(frozen=True)
class Verdict:
    """Whether an adapter's rows (or the base's) may go on from a cache, and why.

    Attributes:
        rows: how many may share one; 0: none, the whole text runs again for every token.
        reason: in words, if ``rows`` is 0.
        difference: root mean square of (logits with the cache - logits of a pass over the whole text), over that of the
            logits, where it is largest. ``limit``: how far rounding may take it.
    """

    rows: int
    reason: str = ""
    cache_name: str | None = None
    _: KW_ONLY
    difference: float = math.nan
    limit: float = math.nan


@dataclass(frozen=True, order=True)
class Kind:
    """What rows must have in common to advance together; ``rows``: how many may, 0 if they cannot."""

    rows: int = 0
    length: int = 0
    prefix: int = 0


def kind(adapters: Adapters, name: str | None, length: int, verdict: Verdict) -> Kind:
    """The kind of a row that continues a prompt of ``length`` tokens."""
    virtual, prefix = learned_tokens(adapters, name)
    return Kind(verdict.rows, length + virtual, prefix) if verdict.rows else Kind()


MANY = 1 << 30
# The verdict of the base (its Adapters) and of every adapter that has generated, with the state of its parameters.
_VERDICTS: weakref.WeakKeyDictionary[object, tuple[object, Verdict]] = weakref.WeakKeyDictionary()
_FOLLOWING = 3  # tokens after the prompt of a proof
_ROUNDINGS = 10  # per block, about as large as one of what enters
_MOST = 0.1  # a limit beyond this would prove nothing


@torch.no_grad()
def verdict(adapters: Adapters, name: str | None, prompt: Sequence[int] = (), slots: Sequence[int] = ()) -> Verdict:
    """Try the cache for adapter ``name``, or remember; the prompt matters only if virtual tokens stand at its slots."""
    key: object = adapters if name is None else adapters[name]
    # An adapter at its start often does nothing, and shows nothing: after it was trained it is tried again.
    state = None if name is None else [(p.data_ptr(), p._version) for p in adapters[name].parameters()]
    known = _VERDICTS.get(key)
    if known is None or known[0] != state:
        base = None if name is None else verdict(adapters, None)
        known = _VERDICTS[key] = (state, _prove(adapters, name, base, prompt, slots))
    return known[1]


def _prove(
    adapters: Adapters, name: str | None, base: Verdict | None, prompt: Sequence[int], slots: Sequence[int]
) -> Verdict:
    if base is not None and not base.rows:
        return base
    if adapters.architecture.tables_move is not None:
        return Verdict(0, "the tables of positions depend on how long the text is")
    failed = Verdict(0, "no text is short enough for this model")
    for rows in (MANY, 1):
        if base is not None and rows > base.rows:
            continue
        found = [
            _try(adapters, name, texts, length, slots, rows=rows, cache_name=base.cache_name if base else None)
            for texts, length in _probes(adapters, name, prompt, slots)
        ]
        if found and all(one.rows for one in found):
            return max(found, key=lambda one: one.difference / one.limit)
        failed = next((one for one in found if not one.rows), failed)
    return failed


def _probes(
    adapters: Adapters, name: str | None, prompt: Sequence[int], slots: Sequence[int]
) -> list[tuple[list[list[int]], int]]:
    """Pairs of texts, each with the number of tokens that are the prompt."""
    tokens = int(input_embeddings(adapters.model).weight.shape[0])
    learned = learned_tokens(adapters, name)
    longest = (adapters.architecture.max_length or MANY) - sum(learned) - _FOLLOWING
    # These are shorter and longer than the kernel of a convolution, and longer than a small window.
    lengths = {11, 2} if name is None else {11}
    if name is None or learned[1]:
        lengths |= {n + 3 for n in _windows(adapters.model.config) if n <= 64}
    if slots:
        lengths = {len(prompt)}
    found = []
    for length in sorted({min(n, longest) for n in lengths}):
        if length > 0:
            pair = [[(7 + 13 * i + 5 * row) % tokens for i in range(length + _FOLLOWING)] for row in range(2)]
            if slots:
                pair[0][:length] = prompt
            found.append((pair, length))
    return found


def _try(
    adapters: Adapters,
    name: str | None,
    texts: list[list[int]],
    length: int,
    slots: Sequence[int],
    rows: int,
    cache_name: str | None,
) -> Verdict:
    """Try the cache with two rows together, of which the first leaves, or (``rows`` 1) with one row alone."""
    texts = texts[:rows]
    wanted = _whole(adapters, name, texts, length, slots)

    def part(sequences: list[list[int]]) -> list[Part]:
        count = len(sequences)
        return [Part(name, sequences, None, answers=[length] * count, slots=[slots] * count)]

    def logits(hidden: Tensor) -> Tensor:
        return adapters.logits(hidden, [(name, len(hidden))]).double()

    prompts = [text[:length] for text in texts]
    found: list[tuple[Tensor, Tensor]] = []
    try:
        group = Group(adapters, part(prompts), cache_name=cache_name)
        first = logits(group.hidden)
        found.append((first, wanted[:, 0]))
        left = list(range(len(texts)))
        for place in range(_FOLLOWING):
            if place == _FOLLOWING - 1 and len(left) > 1:
                left = left[1:]
                group.keep(torch.tensor(left, device=adapters.device))
            tokens = torch.tensor([texts[row][length + place] for row in left], device=adapters.device)
            group.step(tokens, [(name, len(left))])
            found.append((logits(group.hidden), wanted[left, place + 1]))
        if name is not None and adapters[name].inserted_blocks() and not _grows_only(group.cache):
            return Verdict(0, f"adapter '{name}' inserts blocks, and the model's layers keep more than keys and values")
        rough = Group(adapters, part(prompts), cache_name=cache_name, jitter=torch.finfo(adapters.dtype).eps)
        rounding = distance(logits(rough.hidden), first)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's own code may not foresee this call; the other way is slow and right
        return Verdict(0, f"{type(error).__name__}: {error}")
    difference = max(distance(ours, whole) for ours, whole in found)
    limit = min(_MOST, 10 * rounding * math.sqrt(_ROUNDINGS * adapters.architecture.num_layers))
    if not difference <= limit:
        why = f"logits differ by {difference:.2g}, rounding explains {limit:.2g}"
        return Verdict(0, why, difference=difference, limit=limit)
    return Verdict(rows, "", group.cache_name, difference=difference, limit=limit)


def _whole(adapters: Adapters, name: str | None, texts: list[list[int]], length: int, slots: Sequence[int]) -> Tensor:
    """Logits [texts, following + 1, vocabulary] of passes over the texts, from the prompt's last token on."""
    cut = [text[:n] for text in texts for n in range(length, length + _FOLLOWING + 1)]
    stream, hidden = adapters.run([Part(name, cut, None, answers=[length] * len(cut), slots=[slots] * len(cut))])
    logits = adapters.logits(hidden[torch.tensor(stream.standing, device=hidden.device)], [(name, len(cut))])
    return logits.double().view(len(texts), _FOLLOWING + 1, -1)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference of logits [n, vocabulary] over that of ``wanted``, of the worst row."""
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def learned_tokens(adapters: Adapters, name: str | None) -> tuple[int, int]:
    """How many virtual tokens and how many learned keys an adapter's rows have."""
    adapter = None if name is None else adapters[name]
    return (0, 0) if adapter is None else (adapter.num_virtual_tokens, adapter.num_prefix_tokens)


def _windows(config: object) -> list[int]:
    names = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size")
    return [n for name in names if isinstance(n := getattr(config, name, None), int) and n > 0]


def _grows_only(cache: object) -> bool:
    """Whether all that is kept of a text is every token's key and value, as a cache of an inserted block does."""
    return {type(layer).__name__ for layer in getattr(cache, "layers", [None])} == {"DynamicLayer"}
