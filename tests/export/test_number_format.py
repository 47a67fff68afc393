"""What a number format makes of a weight, against the library that stores it; and how far that may be."""

from __future__ import annotations

import math

import pytest
import torch

from weft.export.figures import Distances, clear_positions, divergence, larger, relative_difference
from weft.export.number_format import NumberFormat, format_of, rms
from weft.export.weights import ROUNDINGS, Weights, compare_weights, explained_errors
from weft.methods.dense import dense_weight


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_quantised_weight_is_rounded_as_the_library_does(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = drawn(64, 128).half().float()
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
        layer = layer.to("cpu")
        layer(drawn(2, 128).half())
    else:
        layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type=kind, compress_statistics=True)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, compress_statistics=True)
        layer = layer.to("cpu")
    stored, form = dense_weight(layer, torch.float32), format_of(layer.weight)
    assert (form.name, form.exact) == (kind, False)
    assert rms(form.rounded(weight) - stored) <= 0.1 * form.error(weight)
    assert form.error(weight) == pytest.approx(rms(stored - weight), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_a_dtype(dtype: torch.dtype) -> None:
    weight, form = drawn(50, 40), NumberFormat(dtype)
    assert torch.equal(form.rounded(weight), weight.to(dtype).float())
    assert torch.equal(form.moved(weight), weight.to(dtype).float() - weight)
    assert rms(form.moved(weight)) <= form.error(weight)
    # One that was rounded before may come from as far, though it is held as it is.
    held = form.rounded(weight)
    noise = form.moved(held)
    assert ((held + noise).to(dtype).float() == held).float().mean() > 0.98, (
        "below a power of two are nearer neighbours"
    )
    assert rms(noise) == pytest.approx(rms(form.moved(weight)), rel=0.1)


def weights(tensor: torch.Tensor, form: NumberFormat, label: str) -> Weights:
    return Weights({"w": tensor}, {"w": form}, label=label)


def test_tensors_within_their_formats() -> None:
    """Two right ones of sixteen bits, rounded once and twice; one that is further off than four roundings."""
    exact, form = drawn(80, 60), NumberFormat(torch.bfloat16)
    once, twice = form.rounded(exact), form.rounded(form.rounded(exact / 3) + form.rounded(exact * 2 / 3))
    a = weights(exact, NumberFormat(torch.float32), "A")
    for right in (once, twice):
        assert compare_weights(a, weights(right, form, "B")).differing == ()
    assert compare_weights(weights(once, form, "A"), weights(twice, form, "B")).differing == ()
    moved = once + 2 * ROUNDINGS * form.error(exact)
    assert compare_weights(a, weights(moved, form, "B")).differing == ("w",)
    assert explained_errors(a, weights(exact, form, "B")) == {}, "what is the same needs no explanation"
    assert list(explained_errors(weights(once, form, "A"), weights(twice, form, "B"))) == ["w"]
    assert compare_weights(a, weights(torch.full_like(exact, math.nan), form, "B")).differing == ("w",)


def test_distances() -> None:
    """A divergence against torch's own; -inf on both sides is no difference; NaN stays."""
    wanted, found = drawn(5, 7), drawn(5, 7, seed=1)
    own = torch.nn.functional.kl_div(
        found.double().log_softmax(-1), wanted.double().log_softmax(-1), reduction="sum", log_target=True
    )
    assert divergence(wanted, found) == pytest.approx(float(own))
    barred = [logits.index_fill(1, torch.tensor([3]), -math.inf) for logits in (wanted, found)]
    assert math.isfinite(relative_difference(*barred))
    assert math.isfinite(divergence(*barred))
    assert math.isnan(larger(math.nan, 1.0))
    assert math.isnan(larger(1.0, math.nan))
    sums = Distances()
    sums.add(wanted, wanted)
    sums.add(wanted, wanted.fill_(math.nan))
    assert (sums.positions, math.isnan(sums.largest)) == (10, True)
    leads = torch.tensor([[0.0, 1.0], [0.0, 0.1]])
    assert clear_positions(leads, 0.2).tolist() == [True, False]
