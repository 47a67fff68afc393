"""Whose values an adapter has now: what was computed with others must not answer for it."""

from __future__ import annotations

import hashlib
import itertools
import json
import weakref
from collections.abc import Hashable

import torch
from torch import Tensor

from weft.core.adapter import Adapter
from weft.core.adapters import Adapters


class Identities:
    """Gives each adapter, with its present values, a mark of its own.

    A name is none, because another adapter may come under it; the place in memory is none either, for the same reason.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        self._known: weakref.WeakKeyDictionary[Adapter, tuple[int, list[Tensor]]] = weakref.WeakKeyDictionary()
        self._numbers = itertools.count()

    def of(self, name: str | None) -> Hashable:
        """The mark of adapter ``name`` (None: the base). A step of training gives it another."""
        if name is None:
            return ("base",)
        adapter = self._adapters[name]
        if adapter not in self._known:
            self._known[adapter] = next(self._numbers), [*adapter.parameters(), *adapter.buffers()]
        serial, tensors = self._known[adapter]
        # Versions only rise, so that their sum changes with every one.
        return (serial, sum([tensor._version for tensor in tensors]))


def content_hash(adapter: Adapter) -> str:
    """The SHA-256 of all that an adapter answers by: its method's settings and its values. It is the same anywhere."""
    settings = adapter.config.model_dump(mode="python")
    digest = hashlib.sha256(json.dumps([adapter.config.method, settings], sort_keys=True, default=_plain).encode())
    for name, tensor in sorted([*adapter.named_parameters(), *adapter.named_buffers()]):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: object) -> object:
    """What JSON has no word for; a set's order is another one in every process."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)
