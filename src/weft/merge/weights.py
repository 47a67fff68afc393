"""The merge of an adapter's effect at a module into the module's own tensors.

A linear, a norm or an embedding ``f(x; W, b)`` with a site on it is often such a module again, with other tensors:
``W x + b + s B A x = (W + s B A) x + b``. A layer of a method that knows these tensors has a ``merge_into``
(``Mergeable``); a layer without it cannot be merged. The tensors are computed in double precision and rounded once. For
a quantised module they start from the dequantised weights, which training saw. The base itself is only read.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.base.embeddings import input_embeddings
from weft.base.kinds import is_layer
from weft.base.packed import PackedLinear
from weft.core.adapter import Adapter
from weft.core.adapters import Adapters
from weft.core.architecture import Architecture
from weft.errors import UserError
from weft.merge.blocks import check_numbers
from weft.methods.mergeable import LARGE, Mergeable, MergeableParameter, MergedBlock, MergedModule


@dataclass(frozen=True)
class MergedWeights:
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


@torch.no_grad()
def merge_adapter(adapters: Adapters, name: str, dtype: torch.dtype | None = None) -> MergedWeights:
    """The weights of a model that computes by itself what the base computes with adapter ``name``.

    The base, which is only read, and the adapter stay what they are. A classification head is not among the
    weights. ``dtype``: of all of them; default: each one's own, and that of the embeddings for quantised ones.

    Raises:
        UserError: what the adapter, or a part of it, computes cannot be weights of the base.
    """
    adapter, model, shape = adapters[name], adapters.model, adapters.architecture
    check_mergeable(adapter)
    changes: Mapping[str, Sequence[Any]] = adapter.merges()
    inserted: Mapping[str, Sequence[Any]] = adapter.inserted_blocks()
    if inserted:
        check_numbers(adapters)
    at = {id(model.get_submodule(path)): found for path, found in changes.items()}
    _share_with_copies_of_the_table(model, at)
    rename, blocks = _new_numbers(shape, inserted)
    table = input_embeddings(model)
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
    return MergedWeights(tensors, blocks, tuple(added), untied)


def check_mergeable(adapter: Adapter) -> None:
    """Refuse an adapter whose effect cannot be weights of the base.

    Raises:
        UserError: It cannot; the message says which of its methods, why, and what to do instead.
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


def _follow_ties(
    model: nn.Module, rename: Callable[[str], str], owners: Mapping[int, Sequence[str]], tensors: dict[str, Tensor]
) -> None:
    """Change a tensor also where a module that is no layer holds it beside its layer (BERT's head holds the output
    layer's bias)."""
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
    quantised = any(not tensor.is_floating_point() for tensor in own.values()) or isinstance(module, PackedLinear)
    if isinstance(module, PackedLinear):
        own["weight"] = module.weight
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
    """Change the tables of an encoder-decoder's stacks too: they are tied to the shared one, where adapters sit."""
    table = input_embeddings(model)
    for module in model.modules():
        tied = isinstance(module, nn.Embedding) and module.weight is table.weight
        if tied and id(table) in at:
            at[id(module)] = at[id(table)]


def _tie(tensors: dict[str, Tensor], keys: Sequence[str]) -> bool:
    """Whether the tensors that are one in the base are still equal; equal ones become one again."""
    different: list[Tensor] = []
    for key in keys:
        same = next((one for one in different if _equal(tensors[key], one)), None)
        if same is None:
            different.append(tensors[key])
        else:
            tensors[key] = same
    return len(different) == 1


def _equal(a: Tensor, b: Tensor) -> bool:
    # Changed tensors are on the CPU, the others on the base's device.
    return a is b or torch.equal(a.cpu(), b.cpu())


def _moved(path: str, by: int) -> str:
    parent, _, number = path.rpartition(".")
    return f"{parent}.{int(number) + by}"


def _new_numbers(
    shape: Architecture, inserted: Mapping[str, Sequence[MergedBlock]]
) -> tuple[functools.partial[str], tuple[int, ...]]:
    """The function from a module's path to its path in a model with the new blocks, and the origin of each block."""
    moved: dict[str, str] = {}
    blocks: list[int] = []
    for number, path in enumerate(shape.blocks):
        moved[path] = _moved(path, len(blocks) - number)
        blocks += [number] * (1 + len(inserted.get(path, ())))
    return functools.partial(_renamed, moved if inserted else {}), tuple(blocks)


def _renamed(moved: Mapping[str, str], path: str) -> str:
    block = next((block for block in moved if path == block or path.startswith(f"{block}.")), None)
    return path if block is None else moved[block] + path.removeprefix(block)
