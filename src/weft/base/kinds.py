"""The kinds of a model's modules: linears, norms, activations, experts, routers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import cast

from torch import nn


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a matrix product over its last dimension: nn.Linear and its kin, or Conv1D."""
    if any("Router" in kind.__name__ and "forward" in vars(kind) for kind in type(module).__mro__):
        return False  # some are nn.Linear by birth, but give experts and their weights
    return isinstance(module, nn.Linear) or type(module).__name__.removeprefix("Routed") == "Conv1D"


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a LayerNorm, an RMSNorm or one of their kin."""
    return "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), nn.Parameter)


def is_activation(module: nn.Module) -> bool:
    """Whether the module is an activation function of torch or transformers."""
    home, name = type(module).__module__, type(module).__name__.lower()
    return home in ("torch.nn.modules.activation", "transformers.activations") or "gelu" in name


def holds_experts(path: str, module: nn.Module) -> bool:
    """Whether the module itself holds the matrices of many experts, which are no linears then."""
    named = "expert" in path.lower() or "expert" in type(module).__name__.lower()
    return named and not is_layer(module) and any(p.dim() > 1 for p in module.parameters(recurse=False))


def is_experts(path: str, module: nn.Module) -> bool:
    """Whether the module holds experts, and is called with the text's tokens and the experts that each one goes to.

    Other modules are called with rows that are already sorted by expert, or another module reads their parameters.
    """
    stacked = any(p.dim() == 3 for p in module.parameters(recurse=False))
    given = inspect.signature(plain_forward(module)).parameters if stacked else ()
    return holds_experts(path, module) and any("index" in name or "indices" in name for name in given)


def plain_forward(module: nn.Module) -> Callable[..., object]:
    """The forward of the module's own class, also where it is a site."""
    own = next(kind for kind in type(module).__mro__ if not kind.__name__.startswith("Routed"))
    return cast(type[nn.Module], own).forward


def is_router(path: str, module: nn.Module) -> bool:
    """Whether the module chooses experts by a matrix that it holds itself."""
    name = f"{path.rsplit('.', 1)[-1]} {type(module).__name__}".lower()
    named = any(word in name for word in ("router", "gate", "gating"))
    inner = holds_layers(module)
    own = any(p.dim() == 2 for p in module.parameters(recurse=False))
    return named and own and not inner and not is_layer(module)


def holds_layers(module: nn.Module) -> bool:
    """Whether there is a linear, norm, embedding or convolution inside, on which adapters can sit."""
    return any(is_layer(inner) for inner in module.modules() if inner is not module)


def is_layer(module: nn.Module) -> bool:
    """Whether the module is one of torch's own kinds that hold a weight: linear, norm, embedding, convolution."""
    known = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return is_linear(module) or is_norm(module) or isinstance(module, known)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a module for which ``is_linear`` holds."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight.shape[0], weight.shape[1]


def linears_in(model: nn.Module, blocks: Iterable[str]) -> tuple[str, ...]:
    """Paths of the linears in these blocks of the model."""
    inside = (found for block in blocks for found in model.get_submodule(block).named_modules(prefix=block))
    return tuple(path for path, module in inside if is_linear(module))
