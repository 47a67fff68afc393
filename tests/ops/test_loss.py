"""linear_cross_entropy against its written-out reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.ops.loss import linear_cross_entropy, linear_cross_entropy_ref

# Relative to the largest entry. In 16 bits, four eps (bfloat16: 7.8e-3, float16: 9.8e-4): logits of up to about 6 are
# rounded by half an eps on either side, and the gradients once more. Wider dtypes: ten times what was seen.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def make(s: int, vocab: int, dtype: torch.dtype, train: str = "", dim: int = 16) -> tuple[list[Tensor], Tensor]:
    """[hidden, weight, bias], of which hidden and those named in ``train`` require grad; targets."""
    gen = torch.Generator().manual_seed(s * 1000 + vocab)
    shapes = {"hidden": (s, dim), "weight": (vocab, dim), "bias": (vocab,)}
    made = [torch.randn(n, generator=gen, dtype=torch.float64).mul_(0.7).to(dtype) for n in shapes.values()]
    for x, name in zip(made, shapes, strict=True):
        x.requires_grad_(name == "hidden" or name in train)
    return made, torch.randint(vocab, (s,), generator=gen)


def check(s: int, vocab: int, dtype: torch.dtype, train: str = "", *, use_bias: bool = True, **kw: Any) -> None:
    """Losses and the gradients of a weighted sum of them."""
    (hidden, weight, bias), targets = make(s, vocab, dtype, train)
    weights = torch.linspace(-1, 2, s, dtype=torch.float64)
    leaves = [x for x in (hidden, weight, bias) if x.requires_grad]
    results = []
    for f in (linear_cross_entropy, linear_cross_entropy_ref):
        loss = f(hidden, weight, targets, bias=bias if use_bias else None, **kw)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        results.append([loss, *torch.autograd.grad((loss * weights).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kw", [{}, {"softcap": 3.0}, {"logit_scale": 0.25}, {"softcap": 2.0, "logit_scale": 1.7}])
@pytest.mark.parametrize("train", ["", "weight", "bias", "weight bias"])
def test_equals_ref(dtype: torch.dtype, kw: dict[str, float], train: str) -> None:
    check(23, 101, dtype, train, chunk_tokens=5, **kw)


@pytest.mark.parametrize("train", ["", "weight"])
@pytest.mark.parametrize("chunk", [None, 1, 23, 100])
def test_any_chunk_without_bias(chunk: int | None, train: str) -> None:
    check(23, 101, torch.float64, train, use_bias=False, chunk_tokens=chunk)


@settings(max_examples=30, deadline=None)
@given(
    s=st.integers(1, 40),
    vocab=st.integers(2, 60),
    chunk=st.integers(1, 45),
    train=st.sampled_from(["", "weight", "bias"]),
    softcap=st.sampled_from([None, 4.0]),
)
def test_random_shapes(s: int, vocab: int, chunk: int, train: str, softcap: float | None) -> None:
    check(s, vocab, torch.float64, train, chunk_tokens=chunk, softcap=softcap)


def test_frozen_head_saves_u_and_no_logits() -> None:
    """What backward keeps is one [S, d] tensor; nothing if no gradient is wanted."""
    (hidden, weight, _), targets = make(64, 500, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=8)
        assert [tuple(x.shape) for x in saved] == [(64, 16)]
        saved.clear()
        assert not linear_cross_entropy(hidden.detach(), weight, targets).requires_grad
        with torch.no_grad():
            assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    assert not saved


def test_only_the_head_is_trained() -> None:
    (hidden, weight, _), targets = make(9, 30, torch.float64, "weight")
    hidden = hidden.detach()
    fast, ref = (f(hidden, weight, targets).sum() for f in (linear_cross_entropy, linear_cross_entropy_ref))
    torch.testing.assert_close(torch.autograd.grad(fast, weight), torch.autograd.grad(ref, weight), rtol=0, atol=1e-12)


def test_large_logits_do_not_overflow_and_sure_targets_stay_precise() -> None:
    hidden = torch.tensor([[300.0, 0.0], [0.0, 8.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 2]))
    assert loss[0].item() == 600.0
    assert loss[1].item() == pytest.approx(2 * 0.00033546, rel=1e-3)
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss.sum(), hidden))


def test_empty_and_wrong_input() -> None:
    (hidden, weight, _), targets = make(0, 30, torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.shape == (0,)
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss.sum(), hidden)[0].shape == (0, 16)
    with pytest.raises(ValueError, match="cast one of them"):
        linear_cross_entropy(hidden.float(), weight, targets)
