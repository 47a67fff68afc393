"""Draws and told log-probabilities against their plain references, and draws against their distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.ops.next_token import Cut, draw, draw_ref, token_logprobs, token_logprobs_ref

CUTS = st.builds(
    Cut,
    st.sampled_from([1e-300, 0.1, 0.7, 1.0, 5.0]),
    st.sampled_from([0, 1, 2, 50, 1500, 10**6]),
    st.sampled_from([0.0, 1e-9, 0.3, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 1e-9, 0.02, 0.5, 1.0]),
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def random_logits(rows: int, vocabulary: int, seed: int, dtype: torch.dtype) -> Tensor:
    """[rows, vocabulary], some of them -inf, those of bfloat16 with many ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    logits[:, 1:][torch.rand(rows, vocabulary - 1, generator=generator) < 0.1] = -math.inf
    return logits.to(dtype)


@given(
    st.lists(CUTS, min_size=1, max_size=5),
    st.sampled_from([1, 2, 255, 256, 257, 1100]),
    DTYPES,
    st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_a_draw_is_that_of_the_reference(cuts: list[Cut], vocabulary: int, dtype: torch.dtype, seed: int) -> None:
    logits = random_logits(len(cuts), vocabulary, seed, dtype)
    before = logits.clone()
    edges = [0.0, 1 - 2**-53, *torch.rand(len(cuts), generator=torch.Generator().manual_seed(seed)).tolist()]
    for uniforms in (edges[: len(cuts)], edges[-len(cuts) :]):
        # A sum of n numbers in another order may differ by n roundings; between those all ids are right.
        near = vocabulary * 2**-53
        low, high = (draw_ref(logits, cuts, [u + side * near for u in uniforms]) for side in (-1, 1))
        found = draw(logits, cuts, uniforms)
        assert bool(((low <= found) & (found <= high)).all()), (low, found, high)
    assert torch.equal(logits, before)


def test_a_wide_vocabulary_without_a_peak() -> None:
    """More tokens make up top_p than are looked at first, so all are sorted."""
    logits = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0)) / 30
    cuts = [Cut(1.0, top_p=0.9), Cut(1.0, top_k=1200, top_p=0.5), Cut(1.0, top_k=3, top_p=0.5)]
    for uniform in (0.0, 0.3, 0.999):
        assert draw(logits, cuts, [uniform] * 3).tolist() == draw_ref(logits, cuts, [uniform] * 3).tolist()
    spread = [Cut(1.0, top_p=0.9)] * 3000
    drawn = draw(logits[:1].expand(3000, -1), spread, [place / 3000 for place in range(3000)])
    assert 0.85 * 1500 < len(drawn.unique()) < 0.95 * 1500


@pytest.mark.parametrize(
    "cut",
    [
        Cut(1.3),
        Cut(1.0, top_k=40),
        Cut(1.0, top_p=0.7),
        Cut(1.0, min_p=0.3),
        Cut(0.5, top_k=100, top_p=0.9, min_p=0.01),
    ],
    ids=str,
)
def test_many_draws_follow_the_distribution(cut: Cut) -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    order = logits[0].argsort(descending=True)
    shares = (logits[0, order].double() / cut.temperature).softmax(-1)
    shares[cut.top_k or 300 :] = 0
    shares[shares.cumsum(-1) - shares >= cut.top_p * shares.sum()] = 0
    shares[shares < cut.min_p * shares[0]] = 0
    assert (shares == 0).any() == (cut != Cut(1.3))
    count = 20_000
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(2), dtype=torch.float64).tolist()
    drawn = draw(logits.expand(count, -1), [cut] * count, uniforms)
    found = torch.bincount(drawn, minlength=300).double()[order]
    assert not found[shares == 0].any()
    expected = count * shares / shares.sum()
    statistic = float(((found - expected) ** 2 / expected)[shares > 0].sum())
    # P(chi2_d > d + 2 sqrt(d t) + 2 t) <= exp(-t) (Laurent and Massart 2000, lemma 1); t = 14: one in a million.
    freedom = int((shares > 0).sum()) - 1
    assert statistic < freedom + 2 * math.sqrt(freedom * 14) + 2 * 14


@given(st.integers(1, 4), st.sampled_from([1, 3, 300]), DTYPES, st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_log_probabilities_are_those_of_the_reference(
    rows: int, vocabulary: int, dtype: torch.dtype, seed: int
) -> None:
    logits = random_logits(rows, vocabulary, seed, dtype)
    temperatures, counts = [1.0, 0.5, 2.0, 0.1][:rows], [min(n, vocabulary) for n in (0, 1, 5, 20)][:rows]
    tokens = logits.argmax(-1).tolist()
    found = token_logprobs(logits, tokens, temperatures, counts)
    wanted = token_logprobs_ref(logits, tokens, temperatures, counts)
    for (own, top), (own_ref, top_ref) in zip(found, wanted, strict=True):
        assert [token for token, _ in top] == [token for token, _ in top_ref]
        # fp32 rounds logits of up to 20, divided by 0.1, by 200 eps / 2; the sums of 300 terms by less.
        assert own == pytest.approx(own_ref, abs=2e-5)
        assert [p for _, p in top] == pytest.approx([p for _, p in top_ref], abs=2e-5)


def test_of_equally_likely_tokens_those_with_small_ids_are_told() -> None:
    """Whatever a neighbour asks for."""
    logits = torch.zeros(2, 300)
    logits[:, 250] = 1
    (_, few), (_, many) = token_logprobs(logits, [250, 250], [1.0, 1.0], [3, 40])
    assert [token for token, _ in few] == [250, 0, 1]
    assert [token for token, _ in many] == [250, *range(39)]
