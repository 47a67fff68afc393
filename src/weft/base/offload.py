"""What checkpointing keeps, elsewhere than where it was computed: in CPU memory, or on a disk. Not a bit changes."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from weft.base.pages import leave_memory, pages

Place = Literal["cpu", "disk"]


class Kept(Protocol):
    """One tensor that is somewhere else."""

    def get(self) -> Tensor:
        """The tensor in its own shape, again where it was; a copy of its own at every call."""


class Store(Protocol):
    """A place for tensors."""

    def put(self, x: Tensor) -> Kept:
        """Copy x [...] there."""


@dataclass(frozen=True)
class _Form:
    """All of a tensor but its numbers. How they lie in memory counts too: kernels may round by it."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> _Form:
        like = torch.empty_like(x, device="meta")  # what is expanded becomes dense
        return cls(x.shape, like.stride(), x.dtype, x.device)

    def empty(self) -> Tensor:
        """A tensor [...] of this form, of any numbers."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, eq=False)
class _File:
    own: mmap.mmap
    content: Tensor  # [bytes] uint8


@dataclass(eq=False)
class _OnDisk:
    file: _File
    numbers: Tensor  # as it lies in the file
    form: _Form

    def get(self) -> Tensor:
        found = self.form.empty().copy_(self.numbers)
        leave_memory(self.file.own)  # or all that was kept would be in memory again at the end of the way back
        return found


@dataclass
class DiskStore:
    """Tensors in files without names, which are used again: a pass needs as many as the one before.

    ``folder`` is the files' (None: that of temporary files). Raises UserError where the disk has no room.
    """

    folder: str | None = None
    _free: list[_File] = field(default_factory=list)

    def put(self, x: Tensor) -> Kept:
        """Copy x [...] into a file."""
        form, size = _Form.of(x), x.numel() * x.element_size()
        file = self._take(size)
        numbers = file.content[:size].view(x.dtype).view(x.shape).copy_(x.detach())
        leave_memory(file.own)
        kept = _OnDisk(file, numbers, form)
        weakref.finalize(kept, self._free.append, file)
        return kept

    def _take(self, size: int) -> _File:
        fitting = [file for file in self._free if len(file.content) >= size]
        if fitting:
            self._free.remove(found := min(fitting, key=lambda file: len(file.content)))
            return found
        if self._free:  # one that is too small for this pass makes room for one that is not
            self._free.remove(min(self._free, key=lambda file: len(file.content)))
        own = pages(
            max(size, mmap.PAGESIZE), self.folder,
            whose="offload_activations", key="offload_folder: PATH",
        )  # fmt: skip
        return _File(own, torch.frombuffer(own, dtype=torch.uint8))


class _InMemory:
    """A tensor of a GPU, in pinned memory of the CPU. Copies go on a stream of their own, beside the computation."""

    def __init__(self, x: Tensor, stream: torch.cuda.Stream, before: _InMemory | None) -> None:
        self.form, self.stream = _Form.of(x), stream
        # Backward asks in the opposite order. A weak reference: what is not needed any more shall go.
        self.before = None if before is None else weakref.ref(before)
        self.coming: Tensor | None = None
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.numbers = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x.detach(), non_blocking=True)
        x.record_stream(stream)

    def fetch(self) -> Tensor:
        """Begin to copy it back, unless that has begun."""
        if self.coming is None:
            self.stream.wait_stream(torch.cuda.current_stream(self.form.device))
            with torch.cuda.stream(self.stream):
                self.coming = self.form.empty().copy_(self.numbers, non_blocking=True)
        return self.coming

    def get(self) -> Tensor:
        found, self.coming = self.fetch(), None
        current = torch.cuda.current_stream(self.form.device)
        current.wait_stream(self.stream)
        found.record_stream(current)
        if self.before is not None and (before := self.before()) is not None:
            before.fetch()
        return found


class MemoryStore:
    """Tensors of a GPU in memory of the CPU. The one before is on its way while a block is computed again."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: weakref.ref[_InMemory] | None = None

    def put(self, x: Tensor) -> Kept:
        """Copy x [...] of a GPU there."""
        stream = self._streams.get(x.device) or self._streams.setdefault(x.device, torch.cuda.Stream(x.device))
        kept = _InMemory(x, stream, None if self._last is None else self._last())
        self._last = weakref.ref(kept)
        return kept


def store_at(place: Place, folder: str | None = None) -> Store:
    """The store of the setting ``offload_activations``."""
    own = None if folder is None else str(Path(folder).absolute())  # code of a run may go to another folder
    return DiskStore(own) if place == "disk" else MemoryStore()


def offloading(store: Store, chosen: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
    """Inside, autograd keeps ``chosen`` [...] in the store, and all else where it is."""

    def place(x: Tensor) -> tuple[object, ...]:
        return x.data_ptr(), x.shape, x.dtype

    wanted = place(chosen)  # autograd keeps ``pack`` as well, so that may not hold the tensor itself

    def pack(x: Tensor) -> Tensor | Kept:
        return store.put(x) if place(x) == wanted else x

    def unpack(kept: Tensor | Kept) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.get()

    hooks: Callable[..., torch.autograd.graph.saved_tensors_hooks] = torch.autograd.graph.saved_tensors_hooks
    return hooks(pack, unpack)
