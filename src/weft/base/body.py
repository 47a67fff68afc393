"""The base without its head, and the way from its hidden states to logits by the model's own code.

All models are ``logits = head(body(embeddings))``. They differ in the rest: a scale, a soft cap, a dense layer and a
norm before the output layer, inputs per layer that are looked up by token id. None of it is written again here. Where
it is needed, the model's own forward runs with one of its parts held.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from weft.base.embeddings import output_head
from weft.ops.loss import HeadForm


@functools.cache
def _parameters(forward: Callable[..., object]) -> tuple[frozenset[str], bool]:
    found = inspect.signature(forward).parameters.values()
    return frozenset(p.name for p in found), any(p.kind is p.VAR_KEYWORD for p in found)


def accepted(module: nn.Module, **arguments: object) -> dict[str, object]:
    """Those of the arguments that the module's forward takes; a state-space model, for one, takes no positions."""
    names, anything = _parameters(type(module).forward)
    return {name: value for name, value in arguments.items() if anything or name in names}


@contextlib.contextmanager
def held(module: nn.Module, answer: object) -> Iterator[None]:
    """Inside, the module answers every call with ``answer`` and does not run."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


class _Output:
    """The output of a body for the code that comes after it: the hidden states, and None for everything else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __getitem__(self, key: Any) -> object:
        return (self.last_hidden_state,)[key]


def own_logits(model: nn.Module, body: nn.Module, hidden: Tensor) -> Tensor:
    """Logits [n, vocabulary] of hidden states [n, d] by the model's own forward, whose body is held."""
    ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    arguments = accepted(model, input_ids=ids, use_cache=False, return_dict=True)
    with held(body, _Output(hidden[None])):
        logits: Tensor = model(**arguments).logits
    return logits[0]


def head_logits(model: nn.Module, body: nn.Module, form: HeadForm | None, hidden: Tensor) -> Tensor:
    """Logits [n, vocabulary] of hidden states [n, d], by the form that was proved or by the model's own code."""
    if form is None:
        return own_logits(model, body, hidden)
    layer = output_head(model)
    assert layer is not None
    return scaled(layer(hidden), form)


def scaled(logits: Tensor, form: HeadForm) -> Tensor:
    """The result of an output layer, [n, vocabulary], multiplied and capped."""
    if form.scale != 1.0:
        logits = logits * form.scale
    return logits if form.softcap is None else torch.tanh(logits / form.softcap) * form.softcap


def head_modules(model: nn.Module, body: nn.Module, form: HeadForm | None) -> list[nn.Module]:
    """The modules that turn hidden states into logits: the output layer, and what the model puts around it."""
    output = output_head(model)
    if form is not None or output is None:
        return [] if output is None else [output]
    inside = set(body.modules())
    return [module for module in model.modules() if module not in inside and module is not model]
