"""Results of matrix products that are kept where everything else is computed again.

torch's own selective checkpointing keeps the results of single operations. Our products are more than one as a rule,
and write into buffers; so here a whole function's result can be kept as well (``kept``). A recomputation runs the same
operations in the same order, and is given the results in that order.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from weft.libraries import alias_of, without_mode

# A product over fewer numbers is cheap: computing a number of its result takes no longer than writing it to memory and
# reading it again. So LoRA's second product is, and attention's scores are, which would fill the memory.
DEAR = 128
_STATE = threading.local()
# Operations, and which argument is their left factor; None: they are dear in any case.
_LEFT: dict[str, int | None] = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_grouped_mm": 0}
_LEFT |= {
    f"_scaled_dot_product_{kind}": None
    for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
}


class Put(Protocol):
    """Where a tensor is put; it comes back by ``get``."""

    def get(self) -> Tensor:
        """The tensor, in its own shape."""


@dataclass(frozen=True)
class _Alias:
    """A result where it is. ``get`` gives nothing if it was written to since."""

    x: Tensor
    version: int

    @classmethod
    def of(cls, x: Tensor) -> _Alias:
        alias = alias_of(x)  # without the graph, which would hold itself through it
        return cls(alias, alias._version)

    def get(self) -> Tensor | None:
        return alias_of(self.x) if self.x._version == self.version else None


@dataclass
class Results:
    """The results of one call of a block. ``put`` keeps a tensor somewhere else; default: where it is."""

    put: Callable[[Tensor], Put] | None = None
    _found: list[tuple[object, Any]] = field(default_factory=list)

    def add(self, what: object, result: Any) -> None:
        """Keep a result of the operation ``what``: tensors of any shape, and other values."""
        keep = self.put or _Alias.of
        self._found.append((what, tree_map(lambda x: keep(x) if isinstance(x, Tensor) else _Other(x), result)))

    def get(self, place: int, what: object) -> Any:
        """Result number ``place``, of the operation ``what``; None in the place of what was written to since."""
        if place >= len(self._found) or self._found[place][0] != what:
            raise RuntimeError(
                f"gradient_checkpointing: cheap: the recomputation of a block comes to {what} as product {place}, and "
                "its forward pass did not; this model does not compute the same twice. Take gradient_checkpointing: "
                "true."
            )
        return tree_map(lambda kept: kept.get(), self._found[place][1])

    def contexts(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """The contexts of the forward pass and of its recomputation."""
        return _Keeping(self), _Giving(self)


@dataclass(frozen=True)
class _Other:
    value: Any

    def get(self) -> Any:
        return self.value


class _Mode(TorchDispatchMode):
    def __init__(self, results: Results) -> None:
        super().__init__()
        self.results = results
        self._inside = False

    def __enter__(self) -> Any:
        self._before, _STATE.mode = getattr(_STATE, "mode", None), self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _STATE.mode = self._before
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = partial(func, *args, **(kwargs or {}))
        return run() if self._inside else self.result(run, _inner(func, args), func)

    def result(self, compute: Callable[[], Any], inner: float, what: object) -> Any:
        """The result of ``compute``, a product over ``inner`` numbers for each of its own."""
        return compute() if inner <= DEAR else self._dear(compute, (str(what), inner))

    def _dear(self, compute: Callable[[], Any], what: object) -> Any:
        raise NotImplementedError

    def _alone(self, compute: Callable[[], Any]) -> Any:
        """What is computed inside is part of this result, and not kept by itself."""
        self._inside = True
        try:
            with without_mode(self):
                return compute()
        finally:
            self._inside = False


class _Keeping(_Mode):
    def _dear(self, compute: Callable[[], Any], what: object) -> Any:
        out = self._alone(compute)
        self.results.add(what, out)
        return out


class _Giving(_Mode):
    def __enter__(self) -> Any:
        self._place = 0
        return super().__enter__()

    def _dear(self, compute: Callable[[], Any], what: object) -> Any:
        found, self._place = self.results.get(self._place, what), self._place + 1
        lost = found is None or (isinstance(found, tuple) and any(one is None for one in found))
        return self._alone(compute) if lost else found


def _inner(func: Any, args: tuple[Any, ...]) -> float:
    """The numbers that an operation multiplies for each of its result; 0: it is no product, or writes elsewhere."""
    if func.namespace != "aten" or func._overloadname != "default":
        return 0
    left = _LEFT.get(func._opname, -1)
    if left is None:
        return math.inf
    return 0 if left < 0 else int(args[left].shape[-1])


def kept(compute: Callable[[], Tensor], inner: int) -> Tensor:
    """``compute()``, a product [...] over ``inner`` numbers, or what it gave in the forward pass that is recomputed."""
    mode: _Mode | None = getattr(_STATE, "mode", None)
    return compute() if mode is None else mode.result(compute, inner, "product")
