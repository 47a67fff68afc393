"""Merging: what an adapter computes at a module, written into the module's own tensors.

A linear, a norm or an embedding ``f(x; W, b)`` with a site on it is often again such a module, with other tensors:
``W x + b + s B A x = (W + s B A) x + b``. A layer of a method that knows these tensors has a ``merge_into``
(``Mergeable``); what has none cannot be merged. They are worked out in double precision, of a quantised module from
the weights that training saw, the dequantised ones, and rounded once. The base itself is only read.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from weft.core.architecture import Architecture, is_layer, is_linear
from weft.core.weights import dense_weight
from weft.errors import UserError

if TYPE_CHECKING:
    from weft.core.adapter import Adapter

# Matrices with more entries than this are worked out in single precision (a table of 150,000 tokens in double
# precision would take 5 GB a copy).
LARGE = 2**27


class MergedModule:
    """The tensors of one module of the base while a merge changes them.

    Attributes:
        weight: of a linear [out, in], whatever its layout; of an embedding [rows, d]; of a norm as it is.
        bias: None where the module has none; ``add_bias`` makes one.
        base_weight, base_bias: what they are in the base.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module, self.linear = module, is_linear(module)
        weight = dense_weight(module, dtype) if self.linear else module.get_parameter("weight").to(dtype)
        self.base_weight = weight.detach()
        bias = module._parameters.get("bias")
        self.base_bias = None if bias is None else bias.detach().to(dtype)
        self.weight, self.bias = self.base_weight, self.base_bias
        self._input_scale: Tensor | None = None

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor of the adapter in the precision of the merge."""
        return tensor.detach().to(self.weight)

    def add_bias(self, change: Tensor) -> None:
        """``y + change``."""
        change = self.cast(change)
        self.bias = change if self.bias is None else self.bias + change

    def scale_input(self, scale: Tensor) -> None:
        """``f(scale * x)``; all else that is done here is done to what goes in then."""
        scale = self.cast(scale)
        self._input_scale = scale if self._input_scale is None else self._input_scale * scale

    def laid_out(self, tensor: Tensor) -> Tensor:
        """A matrix in the module's own layout as ``weight``, or ``weight`` in the module's: Conv1D keeps [in, out]."""
        return tensor.t() if self.linear and not isinstance(self.module, nn.Linear) else tensor

    def tensors(self, weight_dtype: torch.dtype, bias_dtype: torch.dtype) -> dict[str, Tensor]:
        """The module's tensors as it keeps them, rounded; in the CPU's memory, for the base fills the GPU's."""
        weight = self.weight if self._input_scale is None else self.weight * self._input_scale
        found = {"weight": self.laid_out(weight).to(weight_dtype).cpu().contiguous()}
        return found if self.bias is None else {**found, "bias": self.bias.to(bias_dtype).cpu().contiguous()}


@runtime_checkable
class Mergeable(Protocol):
    """A layer of an adapter whose effect can be written into the weights of the module it sits on."""

    def merge_into(self, merged: MergedModule) -> None:
        """Change ``merged`` so that the module computes with it what it and this layer compute together."""


@runtime_checkable
class MergeableParameter(Protocol):
    """A layer of an adapter that changes one parameter of a module which is no linear, norm or embedding."""

    parameter: str

    def merged(self, weight: Tensor) -> Tensor:
        """The parameter as the module computes with it, in its own dtype."""


@runtime_checkable
class MergedBlock(Protocol):
    """A block of an adapter's own that can become one of the model's."""

    def merged_tensors(self) -> Mapping[str, Tensor]:
        """Its state dict, in the base's dtypes."""


@dataclass(frozen=True)
class Merged:
    """The weights of a model that computes without an adapter what the base computes with it.

    Attributes:
        tensors: a state dict. What the adapter leaves alone is the base's own tensor, no copy: do not write to it. What
            it changes is on the CPU.
        blocks: for each of the new model's blocks the number of the base's block that it is, or was copied from.
        added: names of tensors that the base has no place for (biases), beside those of new blocks.
        untied: tensors that are one in the base are no longer equal (a head and its table of embeddings).
    """

    tensors: dict[str, Tensor]
    blocks: tuple[int, ...]
    added: tuple[str, ...]
    untied: bool


def check_mergeable(adapter: Adapter) -> None:
    """Refuse an adapter whose effect is not one of the base's weights.

    Raises:
        UserError: says which of its methods it is, why, and what to do instead.
    """
    for part in adapter.parts:
        reason = _no_weights(part)
        if reason:
            method, every = part.config.method, "+".join(p.config.method for p in adapter.parts)
            named = f" ({method})" if part is adapter else f" ({every}: its part {method})"
            raise UserError(
                f"adapter '{adapter.name}'{named} cannot be merged: {reason}. {part.config.instead_of_merging}"
            )


def _no_weights(adapter: Adapter) -> str:
    """Why the adapter cannot be merged; empty if it can."""
    if adapter.num_virtual_tokens:
        return "what it adds are virtual tokens in the text, not weights of the base"
    if adapter.num_prefix_tokens:
        return "what it adds are keys and values before the text, not weights of the base"
    merges = adapter.merges()
    sites = {**adapter.sites(), **adapter.input_sites(), **adapter.parameter_sites()}
    known = (Mergeable, MergeableParameter)
    strange = [path for path in sites if not all(isinstance(layer, known) for layer in merges.get(path, (None,)))]
    blocks = itertools.chain.from_iterable(adapter.inserted_blocks().values())
    if strange or not all(isinstance(block, MergedBlock) for block in blocks):
        where = f" at '{strange[0]}'" if strange else ""
        return f"what it computes{where} is more than other weights there would"
    return ""


@torch.no_grad()
def merge_weights(
    model: nn.Module,
    shape: Architecture,
    changes: Mapping[str, Sequence[Mergeable]],
    inserted: Mapping[str, Sequence[MergedBlock]],
    dtype: torch.dtype | None = None,
) -> Merged:
    """Work out the weights of ``model`` with ``changes`` at its modules and new blocks after its own.

    Args:
        changes: module path -> what is done there, in order.
        inserted: block path -> the blocks after it.
        dtype: of all tensors; None: each one's own, of quantised ones that of the embeddings.
    """
    at = {id(model.get_submodule(path)): found for path, found in changes.items()}
    _share_with_copies_of_the_table(model, at)
    rename, blocks = _new_numbers(shape, inserted)
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    of_base = table.weight.dtype if dtype is None else dtype
    done: dict[int, dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    owners: dict[int, list[str]] = {}
    added = []
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) not in done:
            done[id(module)] = _tensors_of(module, at.get(id(module), ()), dtype, of_base)
        for part, tensor in done[id(module)].items():
            key = f"{rename(path)}.{part}"
            tensors[key] = tensor
            own = module._parameters.get(part)
            if own is not None:
                owners.setdefault(id(own), []).append(key)
            elif part not in module._buffers:
                added.append(key)
    _follow_ties(model, rename, owners, tensors)
    for path, new in inserted.items():
        for number, block in enumerate(new, 1):
            place = _moved(rename(path), number)
            tensors |= {f"{place}.{k}": t.to(dtype or t.dtype) for k, t in block.merged_tensors().items()}
    ends = {f"{rename(path)}.weight" for path in (shape.embeddings, shape.head)}
    untied = False
    for keys in owners.values():
        if not _tie(tensors, keys):
            if not ends & set(keys):
                raise UserError(
                    f"'{keys[0]}' and '{keys[1]}' are one tensor in the base, and the adapter changes them in "
                    f"different ways; no weights of a {shape.model_type} model can hold that. Serve the adapter beside "
                    "its base instead (weft chat, weft generate)."
                )
            untied = True
    return Merged(tensors, blocks, tuple(added), untied)


def _follow_ties(
    model: nn.Module, rename: Callable[[str], str], owners: Mapping[int, Sequence[str]], tensors: dict[str, Tensor]
) -> None:
    """A tensor that a layer shares with a module that is none (a head that holds its output layer's bias) is changed
    there too: that module only holds it."""
    layers = {rename(path) for path, module in model.named_modules(remove_duplicate=False) if is_layer(module)}
    for keys in owners.values():
        of_layers = [key for key in keys if key.rpartition(".")[0] in layers]
        if of_layers and len(of_layers) < len(keys):
            for key in set(keys) - set(of_layers):
                tensors[key] = tensors[of_layers[0]]


def _tensors_of(
    module: nn.Module, changes: Sequence[Mergeable], dtype: torch.dtype | None, of_base: torch.dtype
) -> dict[str, Tensor]:
    """A module's own parameters and buffers, changed, by their names in it."""
    own = {name: p.detach() for name, p in module._parameters.items() if p is not None}
    for change in changes:
        if isinstance(change, MergeableParameter):
            own[change.parameter] = change.merged(own[change.parameter])
    changes = [change for change in changes if isinstance(change, Mergeable)]
    quantised = any(not tensor.is_floating_point() for tensor in own.values())
    kept = {
        name: b
        for name, b in module._buffers.items()
        if b is not None and name not in module._non_persistent_buffers_set
    }
    if not changes and not quantised:
        return {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in {**own, **kept}.items()}
    stored = of_base if quantised or dtype else own["weight"].dtype
    large = own["weight"].numel() > LARGE and stored != torch.float64
    merged = MergedModule(module, torch.float32 if large else torch.float64)
    for change in changes:
        change.merge_into(merged)
    return merged.tensors(stored, own["bias"].dtype if dtype is None and "bias" in own else stored)


def _share_with_copies_of_the_table(model: nn.Module, at: dict[int, Sequence[Mergeable]]) -> None:
    """An encoder-decoder's stacks have each a table that is tied to the shared one; adapters sit on that alone."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    for module in model.modules():
        tied = isinstance(module, nn.Embedding) and module.weight is table.weight
        if tied and id(table) in at:
            at[id(module)] = at[id(table)]


def _tie(tensors: dict[str, Tensor], keys: Sequence[str]) -> bool:
    """Whether the values of what is one tensor in the base are still equal; those that are become one again."""
    different: list[Tensor] = []
    for key in keys:
        same = next((one for one in different if _equal(tensors[key], one)), None)
        if same is None:
            different.append(tensors[key])
        else:
            tensors[key] = same
    return len(different) == 1


def _equal(a: Tensor, b: Tensor) -> bool:
    # What is changed is on the CPU, what is not where the base is.
    return a is b or torch.equal(a.cpu(), b.cpu())


def _moved(path: str, by: int) -> str:
    parent, _, number = path.rpartition(".")
    return f"{parent}.{int(number) + by}"


def _new_numbers(
    shape: Architecture, inserted: Mapping[str, Sequence[MergedBlock]]
) -> tuple[functools.partial[str], tuple[int, ...]]:
    """The path of a module in a model with the new blocks, and which block each of its blocks comes from."""
    moved: dict[str, str] = {}
    blocks: list[int] = []
    for number, path in enumerate(shape.blocks):
        moved[path] = _moved(path, len(blocks) - number)
        blocks += [number] * (1 + len(inserted.get(path, ())))
    return functools.partial(_renamed, moved if inserted else {}), tuple(blocks)


def _renamed(moved: Mapping[str, str], path: str) -> str:
    block = next((block for block in moved if path == block or path.startswith(f"{block}.")), None)
    return path if block is None else moved[block] + path.removeprefix(block)
