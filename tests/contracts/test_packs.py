"""In a best-fit pack of one job's records, with every method: each is what it is alone, and feels no neighbour."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests import kit
from torch import Tensor

from weft.api import Adapters
from weft.data import Sample
from weft.data.pack import fill, pack, pack_in_order
from weft.layouts import packed as packed_layout
from weft.models import describe
from weft.objectives.passes import Work, sequence_losses

CAPACITY = 64


def packed(virtual: int) -> list[list[Sample]]:
    """Two packs, by either rule, each of several sequences and next to full."""
    samples = kit.samples(60, high=20, seed=3)
    lengths = [sample.size + virtual for sample in samples]
    found = []
    for packs in (pack_in_order(lengths, CAPACITY), pack(lengths, CAPACITY)):
        found.append(next(one for one in packs if len(one) >= 4 and fill(lengths, [one], CAPACITY) > 0.95))
    return [[samples[index] for index in one] for one in found]


def losses_and_gradients(
    adapters: Adapters, name: str, passes: list[list[Sample]]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The loss of every sequence, and the gradients of their sum, over some passes."""
    losses = []
    for samples in passes:
        (found,) = sequence_losses(adapters, [Work(name, samples)])
        if found.requires_grad:
            found.sum().backward()
        losses += list(found.detach())
    return losses, kit.gradients(adapters[name])


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "gpt2",
        "bloom",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("mistral", "qwen2", "gemma", "gpt_neox")),
    ],
)
def test_packed_is_alone(kind: str) -> None:
    limit = 1e-12
    adapters = kit.open_with_all(kit.make_model(kind, torch.float64))
    worst = 0.0
    for method in kit.ALL:
        for samples in packed(adapters[method].num_virtual_tokens):
            together = losses_and_gradients(adapters, method, [samples])
            alone = losses_and_gradients(adapters, method, [[sample] for sample in samples])
            assert together[1] or method in kit.UNTRAINED
            scale = max([1.0, *(float(g.abs().max()) for g in alone[1].values())])
            worst = max(
                worst,
                kit.difference(together[0], alone[0]),
                kit.difference(together[1].values(), alone[1].values()) / scale,
            )
            assert worst <= limit, (method, worst)
    kit.measured(f"{kind} packed - alone, {len(kit.ALL)} methods, losses and gradients", worst, limit)
    adapters.close()


@pytest.mark.parametrize(
    ("kind", "dtype"), kit.in_turn(["llama", "gpt2", "bloom"], [torch.float64, torch.float32, torch.bfloat16])
)
def test_a_neighbours_ids_change_not_one_bit(kind: str, dtype: torch.dtype) -> None:
    adapters = kit.open_with_all(kit.make_model(kind, dtype))
    for method in kit.ALL:
        for samples in packed(adapters[method].num_virtual_tokens):
            (before,) = sequence_losses(adapters, [Work(method, samples)])
            for kept in range(len(samples)):
                changed = [
                    sample if i == kept else replace(sample, input_ids=[96 - token for token in sample.input_ids])
                    for i, sample in enumerate(samples)
                ]
                (after,) = sequence_losses(adapters, [Work(method, changed)])
                assert torch.equal(before[kept], after[kept]), (method, kept)
                assert not any(torch.equal(before[i], after[i]) for i in range(len(samples)) if i != kept)
    adapters.close()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_the_gradient_with_respect_to_a_neighbours_rows_is_zero(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = kit.open_with_all(kit.make_model(kind, torch.float64))
    kept: list[Tensor] = []
    plain = packed_layout.embed

    def embed(*args: object) -> Tensor:
        kept[:] = [plain(*args).detach().requires_grad_()]  # type: ignore[arg-type]
        return kept[0]

    monkeypatch.setattr(packed_layout, "embed", embed)
    for method in kit.ALL:
        samples = packed(adapters[method].num_virtual_tokens)[0]
        (losses,) = sequence_losses(adapters, [Work(method, samples)])
        lengths = [sample.size + adapters[method].num_virtual_tokens for sample in samples]
        for own, loss in enumerate(losses):
            (grad,) = torch.autograd.grad(loss, kept[0], retain_graph=True)
            assert [bool(rows.any()) for rows in grad.split(lengths)] == [i == own for i in range(len(samples))], method
    adapters.close()


def test_a_leak_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same comparison, with the mask between sequences gone."""
    from weft.layouts import attention
    from weft.ops.attention import SequenceLayout, varlen_attention

    def leaking(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, **options: object) -> Tensor:
        return varlen_attention(q, k, v, SequenceLayout.build([layout.tokens]), **options)  # type: ignore[arg-type]

    adapters = Adapters(model := kit.make_model("llama", torch.float64), describe(model))
    kit.randomize(adapters.add("lora", kit.method_config("lora")))
    samples = packed(0)[0]
    monkeypatch.setattr(attention, "varlen_attention", leaking)
    together, alone = (losses_and_gradients(adapters, "lora", p)[0] for p in ([samples], [[s] for s in samples]))
    assert kit.difference(together[:1], alone[:1]) < 1e-12, "nothing stands before the first"
    assert kit.difference(together[1:], alone[1:]) > 1e-3
    adapters.close()
