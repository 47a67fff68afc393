"""Training without numbers: the code of a step runs, and every tensor of floats has a shape and no memory.

Tensors of integers (ids, positions, rows) are real, since code asks what is in them. What is recorded is when each
piece of memory is taken and given back, and every operator with the shapes of its tensors.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from weft.errors import UserError, reason_of

_ASKED = 1.0  # the answer where code asks for a float, as for the norm of a gradient


@dataclass
class Piece:
    """A piece of memory: its bytes, the events at which it was taken and given back (None: it is held), what the code
    was doing then, and what it turned out to be (a gradient, say)."""

    bytes: int
    taken: int
    _: KW_ONLY
    phase: str
    freed: int | None = None
    cause: str | None = None

    def held_at(self, event: int) -> bool:
        """Whether it is held after ``event``."""
        return self.taken <= event and (self.freed is None or self.freed > event)


@dataclass(frozen=True)
class Call:
    """An operator with its arguments, of which tensors are given by shape, strides and dtype."""

    operator: Any
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Shaped:
    """What a tensor without memory has: enough to make a real one like it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: str


@dataclass
class Recording:
    """What a dry run did: pieces of memory in the order they came, and operators in the order they ran."""

    pieces: list[Piece] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    events: int = 0


class Ghost(Tensor):
    """A tensor of a device without memory there: ``shell`` is its like on the meta device, which computes shapes.

    torch has a ``FakeTensor`` for this. It also serves torch.compile, and a call of it takes five times as long.
    """

    shell: Tensor
    home: DryRun

    @staticmethod
    def __new__(cls, shell: Tensor, device: torch.device, home: DryRun) -> Ghost:
        made: Ghost = Tensor._make_wrapper_subclass(
            cls, shell.shape, strides=shell.stride(), storage_offset=shell.storage_offset(), dtype=shell.dtype,
            device=device,
        )  # fmt: skip
        made.shell, made.home = shell, home
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Ghost({self.dtype}{list(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        home = next(x.home for x in _leaves((args, tuple((kwargs or {}).values()))) if isinstance(x, Ghost))
        return home.__torch_dispatch__(func, types, args, kwargs)


class DryRun(TorchDispatchMode):
    """Inside, floats have no memory. ``record`` says whether calls are kept."""

    def __init__(self, device: torch.device, *, record: bool = True) -> None:
        super().__init__()
        self.recording, self.phase, self.record, self.device = Recording(), "", record, device
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._pieces: dict[int, Piece] = {}  # those that are held, by their storage

    def empty(self, like: Tensor) -> Tensor:
        """A tensor without memory with the shape and dtype of ``like``; it belongs to the base, and is not counted."""
        made = Ghost(_shell(like), self.device, self)
        storage = made.shell.untyped_storage()
        self._seen[id(storage)] = weakref.ref(storage)
        return made

    def piece_of(self, tensor: Tensor) -> Piece | None:
        """The piece of memory that a tensor [...] lies in; None: it is not counted."""
        return self._pieces.get(id(tensor.shell.untyped_storage())) if isinstance(tensor, Ghost) else None

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is taken inside belongs to ``phase``."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        tensors = [x for x in _leaves((args, tuple(options.values()))) if isinstance(x, Tensor)]
        ghosts = [x for x in tensors if isinstance(x, Ghost)]
        if not ghosts and (tensors or not _makes_tensors(func)):
            return func(*args, **options)
        if func is torch.ops.aten._local_scalar_dense.default:
            return _ASKED
        device = torch.device(options["device"]) if options.get("device") is not None else None
        shells = {id(ghost.shell): ghost for ghost in ghosts}
        own = {key: _for_shapes(value) for key, value in options.items()}
        if device is not None or not tensors:
            own["device"] = torch.device("meta")
            own.pop("pin_memory", None)
        found = _shapes_of(func, tuple(map(_for_shapes, args)), own)
        if not tensors and not (isinstance(found, Tensor) and found.is_floating_point()):
            return func(*args, **options)
        if self.record:
            self.recording.calls.append(_call(func, args, options))
        where = device or (ghosts[0].device if ghosts else self.device)
        return self._wrapped(found, shells, where)

    def _wrapped(self, found: Any, known: Mapping[int, Ghost], device: torch.device) -> Any:
        if isinstance(found, (list, tuple)):
            return type(found)(self._wrapped(one, known, device) for one in found)
        if not isinstance(found, Tensor):
            return found
        if (same := known.get(id(found))) is not None:
            return same
        self._take(found)
        return Ghost(found, device, self)

    def _take(self, shell: Tensor) -> None:
        storage = shell.untyped_storage()
        key = id(storage)
        known = self._seen.get(key)
        if known is not None and known() is storage:
            return
        recording = self.recording
        piece = Piece(storage.nbytes(), recording.events, phase=self.phase)
        recording.events += 1
        recording.pieces.append(piece)

        def free(_: object) -> None:
            piece.freed = recording.events
            recording.events += 1
            self._seen.pop(key, None)
            self._pieces.pop(key, None)

        self._seen[key], self._pieces[key] = weakref.ref(storage, free), piece


@functools.cache
def _makes_tensors(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _shapes_of(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What an operator gives on the meta device.

    Raises:
        UserError: It computes nothing there.
    """
    try:
        if func.overloadpacket is not torch.ops.aten._grouped_mm:
            return func(*args, **options)
        # There it takes bfloat16 alone, and on a CPU every dtype.
        narrow = [x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        return func(*narrow, **options).to(args[0].dtype)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"there is no plan for this run: the operator {func} gives no shapes without memory ({reason_of(error)})."
        ) from error


def _shell(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _for_shapes(value: Any) -> Any:
    """The argument on the meta device, where shapes are computed."""
    if isinstance(value, Ghost):
        return value.shell
    if isinstance(value, Tensor):
        return _shell(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_for_shapes, value))
    return value


def _call(func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Call:
    return Call(func, tuple(map(_shaped, args)), tuple((k, _shaped(v)) for k, v in options.items()))


def _shaped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Shaped(tuple(value.shape), tuple(value.stride()), value.dtype, value.device.type)
    if isinstance(value, torch.Generator):
        return None  # which numbers are drawn is of no matter, and each generator would be another call
    return tuple(map(_shaped, value)) if isinstance(value, (list, tuple)) else value


def without_memory(modules: Iterable[nn.Module], make: Callable[[Tensor], Tensor]) -> None:
    """Put ``make(tensor)`` in the place of every parameter and buffer [...]; what is shared stays shared."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def one(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = make(tensor)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = (tensor, new)
        return made[id(tensor)][1]

    for module in modules:
        for found in (module._parameters, module._buffers):
            for name, tensor in list(found.items()):
                if tensor is not None and not isinstance(tensor, Ghost):
                    found[name] = one(tensor)  # type: ignore[assignment]
