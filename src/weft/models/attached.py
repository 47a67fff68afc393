"""The proof of a fresh adapter, before its first step: it begins as it promises, all of it learns, neighbours stay.

A few short sequences go through the base twice in one batch, under the adapter and without it. The proof shows that

- an adapter that begins as the identity gives the base's results;
- every trained tensor gets a gradient (if zeros multiply one at first, it gets its gradient after all have moved);
- the adapter does not change the base's rows beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter
from weft.core.adapters import Adapters
from weft.core.site import mixes_rows, without_sites
from weft.core.stream import Part
from weft.errors import UserError
from weft.methods.site_adapter import SiteAdapter
from weft.models import trial
from weft.models.difference import first_beside
from weft.ops.seeds import stable_seed

# Rounding, in units of the last place of the largest number: the two halves of a batch differ by hardly more.
_UNITS = 256
# In a narrow dtype that would be all there is, so the limit is smaller; the difference of two batch sizes comes on top.
_MOST = 0.05
_NOISE = 4
# The distance by which parameters move where zeros hide a gradient, relative to their own size and beside it.
_MOVE = 0.02


def prove_attached(adapters: Adapters, name: str) -> None:
    """Prove the fresh adapter ``name``; afterwards its values and gradients are the old ones.

    Raises:
        UserError: It does not begin as it promises, a trained tensor has no gradient, or the base's rows change.
    """
    adapter = adapters[name]
    if adapters.architecture.memory_linears or not any(p.requires_grad for p in adapter.parameters()):
        return
    learned = adapter.num_learned_tokens
    sequences = trial.sequences_for(adapters.model, adapters.architecture, learned)
    with torch.no_grad():
        # In int8 sites also keep rows apart (``mixes_rows``), and so change the base's rows.
        mixes = any(mixes_rows(module) for module in adapters.model.modules())
        with contextlib.nullcontext() if mixes else without_sites(adapters.model):
            alone = _run(adapters, [Part(None, sequences)])
            near = _rounding(adapters, sequences, alone)
        both = _run(adapters, [Part(name, sequences), Part(None, sequences)])
    own, beside = both[: -len(alone)], both[-len(alone) :]
    if not mixes:
        _check_beside(adapters, name, sequences, beside=beside, alone=alone, near=near)
    if adapter.begins_as_identity and not _close(own, alone, near):
        raise UserError(
            f"'{name}' ({adapter.config.method}) promises to begin as the base and does not: on this "
            f"{adapters.architecture.model_type} model its hidden states differ by "
            f"{float((own - alone).abs().max()):.2g} of {float(alone.abs().max()):.2g} before the first step. "
            f"{_whose(adapter)} Take another method."
        )
    _check_gradients(adapters, name, sequences)


def _rounding(adapters: Adapters, sequences: Sequence[Sequence[int]], alone: Tensor) -> float:
    """The distance by which the size of the batch may move the base's hidden states."""
    scale = float(alone.abs().max())
    units = _UNITS * max(torch.finfo(alone.dtype).eps, torch.finfo(torch.float32).eps)
    if units <= _MOST:
        return units * scale
    twice = _run(adapters, [Part(None, sequences), Part(None, sequences)])
    return _MOST * scale + _NOISE * float((twice[-len(alone) :] - alone).abs().max())


def _whose(adapter: Adapter) -> str:
    paths = [*adapter.inserted_blocks(), *adapter.sites(), *adapter.input_sites()]
    return f"It acts on {paths[0]!r}{' and others' if len(paths) > 1 else ''}." if paths else ""


def _run(adapters: Adapters, parts: Sequence[Part]) -> Tensor:
    """Hidden states of the parts' own tokens, [n, d]."""
    stream = adapters.stream(parts)
    hidden = adapters.forward(stream)
    rows = [row for own in stream.rows for row in own]
    return hidden.index_select(0, torch.tensor(rows, device=hidden.device))


def _close(a: Tensor, b: Tensor, near: float) -> bool:
    return bool(((a - b).abs() <= near).all())


def _check_beside(
    adapters: Adapters, name: str, sequences: Sequence[Sequence[int]], beside: Tensor, alone: Tensor, near: float
) -> None:
    if not _close(beside, alone, near):
        raise UserError(
            f"'{name}' ({adapters[name].config.method}) changes the rows of the plain base beside it by "
            f"{float((beside - alone).abs().max()):.2g} of {float(alone.abs().max()):.2g}, first at "
            f"{first_beside(adapters, name, sequences) or 'no single module'}. Train it in a run of its own, or take "
            "another method."
        )


def _check_gradients(adapters: Adapters, name: str, sequences: Sequence[Sequence[int]]) -> None:
    adapter = adapters[name]
    trained = {key: p for key, p in adapter.named_parameters() if p.requires_grad and not key.startswith("head.")}
    if not trained:
        return
    called: set[str] = set()
    missing = _without_gradient(adapters, name, sequences, trained, called)
    if missing:
        with _moved(trained):
            missing &= _without_gradient(adapters, name, sequences, trained, called)
    places = _places(adapter)
    # An expert that got no token shows nothing.
    missing = {key for key in missing if not trial.has_called_sibling(places.get(key, ""), called)}
    if missing:
        some = sorted({places.get(key, key) for key in missing})
        raise UserError(
            f"'{name}' ({adapter.config.method}): {len(missing)} of its trained tensors would learn nothing: no "
            f"gradient reaches what stands at {', '.join(repr(place) for place in some[:3])}"
            f"{' ...' if len(some) > 3 else ''} of this {adapters.architecture.model_type} model. Leave those modules "
            "out (target_modules), or take another method."
        )


def _places(adapter: Adapter) -> Mapping[str, str]:
    """Parameter -> the path of the module that it acts on, for parameters that act on one."""
    found: dict[str, str] = {}
    for index, part in enumerate(adapter.parts):
        if part is not adapter:
            found |= {f"part_modules.{index}.{key}": path for key, path in _places(part).items()}
    if not isinstance(adapter, SiteAdapter):
        return found
    for key, _ in adapter.named_parameters():
        kind, _, rest = key.partition(".")
        number = rest.partition(".")[0]
        paths = {"layers": adapter.paths, "own": adapter.own_paths}.get(kind)
        if paths is not None and number.isdigit():
            found[key] = paths[int(number)]
    return found


def _without_gradient(
    adapters: Adapters,
    name: str,
    sequences: Sequence[Sequence[int]],
    trained: Mapping[str, nn.Parameter],
    called: set[str],
) -> set[str]:
    with trial.calls(adapters.model) as order, torch.enable_grad():
        hidden = _run(adapters, [Part(name, sequences)])
        if adapters.changes_head(name):
            hidden = adapters.logits(hidden, [(name, len(hidden))])
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(hidden.shape, generator=generator).to(hidden)
        loss = (hidden * weights).sum()
        penalty = adapters[name].penalty()
        loss = loss if penalty is None else loss + penalty.to(loss)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    called.update(order)
    return {key for key, g in zip(trained, gradients, strict=True) if g is None or not bool(g.any())}


@contextlib.contextmanager
def _moved(trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, every parameter is moved a little."""
    kept = {key: parameter.detach().clone() for key, parameter in trained.items()}
    with torch.no_grad():
        for key, parameter in trained.items():
            generator = torch.Generator().manual_seed(stable_seed("moved", key))
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * (_MOVE * (1 + float(parameter.std(correction=0)))))
    try:
        yield
    finally:
        with torch.no_grad():
            for key, parameter in trained.items():
                parameter.copy_(kept[key])
