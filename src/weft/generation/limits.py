"""What an engine may use, and how many blocks of keys and values that gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft.core.adapters import Adapters
from weft.errors import UserError
from weft.generation.request import Request
from weft.layouts.packed import Packed
from weft.machine import memory

# Of the memory that is free, for a cache whose size nobody has given.
_SHARE = 0.5
# Taken to be free where the system does not say.
_LITTLE = 1 << 30
# Texts of bases that name no longest one are taken to be of this length.
_USUAL_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an engine may use.

    Attributes:
        max_rows: rows that are written at once.
        prefill_tokens: tokens of prompts in one pass; None: 256 on a CPU, 2,048 on a GPU.
        cache_bytes: for keys and values; None: what ``max_rows`` of the longest texts need, at most half of the memory
            that is free.
        cache_tokens: the same, as a number of tokens; wins over ``cache_bytes``.
        block_tokens: tokens of a block of the cache.
    """

    max_rows: int = 64
    prefill_tokens: int | None = None
    cache_bytes: int | None = None
    cache_tokens: int | None = None
    block_tokens: int = 16

    def __post_init__(self) -> None:
        for name in ("max_rows", "prefill_tokens", "cache_bytes", "cache_tokens", "block_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; at least 1 is needed.")


def limits_for(adapters: Adapters, requests: Sequence[Request], max_rows: int) -> Limits:
    """The limits of an engine for these requests alone: its cache holds the ``max_rows`` longest, and no more."""
    names = {request.adapter for request in requests if request.adapter is not None}
    learned = max((adapters[name].num_learned_tokens for name in names), default=0)
    lengths = sorted(len(r.prompt) + r.max_new_tokens + learned for r in requests)[-max_rows:]
    # Two blocks more for each row: its last one is not full, and one stays free.
    tokens = sum(lengths) + 2 * Limits().block_tokens * len(lengths)
    return Limits(max_rows=max_rows, cache_tokens=max(1, tokens))


def cache_blocks(adapters: Adapters, limits: Limits) -> int:
    """How many blocks the cache has.

    Raises:
        UserError: ``cache_bytes`` is less than one block takes.
    """
    if not isinstance(adapters.layout, Packed):
        return 1  # its rows' caches are the model's own
    each = limits.block_tokens
    if limits.cache_tokens is not None:
        return -(-limits.cache_tokens // each)
    block = each * bytes_per_token(adapters)
    if limits.cache_bytes is not None:
        if limits.cache_bytes < block:
            raise UserError(f"cache_bytes is {limits.cache_bytes}; one block of {each} tokens takes {block}.")
        return limits.cache_bytes // block
    most = limits.max_rows * (-(-(adapters.architecture.max_length or _USUAL_LENGTH) // each) + 1)
    return max(1, min(most, int(_SHARE * _free_bytes(adapters.device)) // block))


@torch.no_grad()
def bytes_per_token(adapters: Adapters) -> int:
    """How many bytes the keys and values of one token take in all layers, inserted ones included."""
    pairs = adapters.layout.keys_values(torch.tensor([0], device=adapters.device))
    inserted = max((sum(map(len, adapters[name].inserted_blocks().values())) for name in adapters.names), default=0)
    bytes_of = [side.numel() * side.element_size() for pair in pairs for side in pair]
    return sum(bytes_of) + inserted * sum(bytes_of) // max(len(pairs), 1)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = memory()
    return _LITTLE if known is None else known[0]
