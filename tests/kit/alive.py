"""How many bytes of tensors are held: of those made inside, whose memory has not been given back."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Inside, every new tensor is noted; ``bytes()`` says what is left of them, ``most`` what there was at once."""

    def __init__(self, watch_most: bool = False) -> None:
        super().__init__()
        self.watch_most, self.most = watch_most, 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := self._key(x)) not in given:
                self._made[key] = StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes()
        if self.watch_most:
            self.most = max(self.most, self.bytes())
        return out

    @staticmethod
    def _key(x: Tensor) -> int:
        return int(x.untyped_storage()._cdata)

    def bytes(self) -> int:
        """The bytes of what was made inside and is still held."""
        self._made = {key: one for key, one in self._made.items() if not one[0].expired()}
        return sum(size for _, size in self._made.values())
