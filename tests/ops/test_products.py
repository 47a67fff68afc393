"""Products in 16 bits, with and without instructions for them, beside the same in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from tests import kit
from torch import Tensor

from weft.ops import products
from weft.ops.products import add_product_, in_pieces, linear, linear_ref, multiply, product

# (rows, in, out); every product is in several pieces, of which the last is smaller.
SHAPES = [(1, 5, 7), (3, 33, 20), (9, 40, 70), (70, 9, 1), (17, 1, 33)]


@pytest.fixture(params=[True, False], ids=["instructions", "none"])
def _machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with or without the instructions; without them nothing is too small."""
    slow_from = math.inf if request.param else 1
    monkeypatch.setattr(products, "faster_wide_from", lambda *_: slow_from)
    monkeypatch.setattr(products, "_FEW", 1)
    monkeypatch.setattr(products, "_SMALL", 0)
    monkeypatch.setattr(products, "_PIECE", 100)
    monkeypatch.setattr(products, "MANY", 10)


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(what: str, found: Tensor, wanted: Tensor, terms: int) -> None:
    """``found`` is ``wanted`` (float64), a sum of ``terms`` products in fp32 at least, rounded once or twice."""
    eps, sums = torch.finfo(found.dtype).eps, torch.finfo(torch.promote_types(found.dtype, torch.float32)).eps
    limit = (2 * eps + terms * sums) * max(1.0, float(wanted.abs().max())) * 2
    kit.measured(what, float((found.double() - wanted).abs().max()), limit, derived=True)


@pytest.mark.usefixtures("_machine")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_orders(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """b as it lies, and b as the transpose of what lies; a as it lies, and as the transpose."""
    rows, inner, outer = shape
    a, b = drawn(rows, inner, dtype=dtype), drawn(inner, outer, dtype=dtype, seed=1)
    wanted = a.double() @ b.double()
    for left in (a, a.t().contiguous().t()):
        for right in (b, b.t().contiguous().t()):
            close("a b", multiply(left, right), wanted, inner)
            wide = torch.promote_types(dtype, torch.float32)
            assert multiply(left, right, wide).dtype == wide
            y = drawn(rows, outer, dtype=dtype, seed=2)
            sums = 0.5 * y.double() - 2 * wanted
            add_product_(y, left, right, alpha=-2.0, beta=0.5)
            close("beta y + alpha a b", y, sums, inner)
            y.fill_(math.nan)
            add_product_(y, left, right, beta=0)
            close("what was there does not count", y, wanted, inner)


@pytest.mark.usefixtures("_machine")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_and_its_gradients(shape: tuple[int, int, int], bias: bool, dtype: torch.dtype) -> None:
    rows, inner, outer = shape
    leaves = [drawn(2, rows, inner, dtype=dtype), drawn(outer, inner, dtype=dtype, seed=1)]
    leaves += [drawn(outer, dtype=dtype, seed=2)] if bias else []
    d_out = drawn(2, rows, outer, dtype=dtype, seed=3)

    def run(function: Callable[..., Tensor], own: Sequence[Tensor]) -> list[Tensor]:
        given = [leaf.clone().requires_grad_() for leaf in own]
        y = function(*given)
        assert y.shape == (2, rows, outer)
        y.backward(d_out.to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in given if leaf.grad is not None)]

    exact = run(linear_ref, [leaf.double() for leaf in leaves])
    close("the reference", linear_ref(*leaves), exact[0], inner)
    for found, wanted, terms in zip(run(linear, leaves), exact, (inner, outer, 2 * rows, 2 * rows), strict=False):
        assert found.dtype == dtype
        close("linear", found, wanted, terms)


@pytest.mark.usefixtures("_machine")
@pytest.mark.parametrize("flipped", [False, True])
def test_a_frozen_weight_and_a_frozen_input(flipped: bool) -> None:
    x, weight = drawn(9, 8, dtype=torch.bfloat16), drawn(8, 8, dtype=torch.bfloat16, seed=1)
    for trained in (x, weight):
        trained.requires_grad_()
        product(x, weight, flipped=flipped).sum().backward()
        ones = torch.ones(9, 8, dtype=torch.float64)
        w = weight.detach().double()
        dx = ones @ (w if flipped else w.t())
        dw = ones.t() @ x.detach().double() if flipped else x.detach().double().t() @ ones
        assert trained.grad is not None
        close("the gradient", trained.grad, dx if trained is x else dw, 9)
        trained.requires_grad_(False)


@pytest.mark.usefixtures("_machine")
def test_inference_mode_leaves_nothing_behind() -> None:
    """The memory of a piece outlives the call that made it."""
    products._SCRATCH.__dict__.clear()
    x, weight = drawn(9, 8, dtype=torch.bfloat16), drawn(8, 8, dtype=torch.bfloat16, seed=1)
    with torch.inference_mode():
        inside = linear(x, weight)
    x.requires_grad_()
    outside = linear(x, weight)
    outside.sum().backward()
    assert torch.equal(inside, outside)


def test_lengths_of_pieces() -> None:
    """Many rows are cut into multiples of what kernels are written for, and where a block begins."""
    assert products.lengths_of_pieces(4096, 11008) == 192
    assert products.lengths_of_pieces(11008, 4096) == 512
    assert products.lengths_of_pieces(100, 40) >= 100
    assert products.lengths_of_pieces(11008, 4100, 16) % 32 == 0
    assert products.lengths_of_pieces(11008, 4097, 64) == 512
    assert products.lengths_of_pieces(3000, 1 << 19) == 4
    assert products.lengths_of_pieces(4096, 4096, slabs=True) == 1024


def test_a_gradient_of_few_rows_comes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward torch reads a transposed weight quickly; back it takes 27 ms for one row of 2048 x 2048."""
    monkeypatch.setattr(products, "faster_wide_from", lambda *_: 1)
    asked: list[bool] = []
    plain = products.wide_product
    monkeypatch.setattr(
        products,
        "wide_product",
        lambda a, rows, *, flipped: asked.append(flipped) or plain(a, rows, flipped=flipped),
    )
    x, weight = drawn(2, 1024, dtype=torch.bfloat16).requires_grad_(), drawn(1024, 1024, dtype=torch.bfloat16, seed=1)
    y = linear(x, weight)
    assert asked == []
    y.sum().backward()
    assert asked == [False]
    assert x.grad is not None
    close("the gradient", x.grad, torch.ones(2, 1024, dtype=torch.float64) @ weight.double(), 1024)


def test_what_is_small_stays_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "faster_wide_from", lambda *_: 1)
    monkeypatch.setattr(products, "_wide", lambda *_: pytest.fail("a few rows are faster as they are"))
    x, weight = drawn(7, 512, dtype=torch.bfloat16), drawn(512, 512, dtype=torch.bfloat16)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
    x, weight = drawn(64, 8, dtype=torch.bfloat16), drawn(8, 8, dtype=torch.bfloat16)
    assert torch.equal(product(x, weight), x @ weight)


def test_what_has_few_tokens_stays_where_there_are_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else does, however small it is: oneDNN makes a kernel for each number of tokens."""
    monkeypatch.setattr(products, "faster_wide_from", lambda *_: 32)
    for tokens, there in ((31, False), (32, True)):
        x, narrow, wide = (drawn(*shape, dtype=torch.bfloat16) for shape in ((tokens, 512), (8, 512), (512, 512)))
        z, one = x @ narrow.t(), x[:, :1].contiguous()
        products_of_a_step = (
            (x, wide.t()), (x, wide), (x, narrow.t()), (z, narrow), (z.t(), x), (x.t(), z), (one.t(), x)
        )  # fmt: skip
        assert [in_pieces(a, b) for a, b in products_of_a_step] == [there] * 7
