"""Whose values an adapter has now: what was computed with others must not answer for it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable

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
