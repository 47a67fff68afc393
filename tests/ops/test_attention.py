"""varlen_attention and decode_attention against their written-out references, and the isolation between sequences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.ops import attention, products
from weft.ops.attention import (
    SequenceLayout,
    varlen_attention,
    varlen_attention_ref,
)
from weft.ops.decoding import decode_attention, decode_attention_ref, hidden_keys

# Relative to the largest entry. In 16 bits, about six eps (bfloat16: 7.8e-3, float16: 9.8e-4): each of the two rounds
# its result (1 eps together), the weights before they meet the values (1), and scores of up to 4 before exp (4).
# Wider dtypes sum in another order: at most n eps / 2 for n = 300 terms, and ten times what was seen.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
SCALE = 0.35


def stream(seed: int, heads: int, n: int, dim: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    """[heads, n, dim] in the memory order of a projection, requiring grad."""
    made = torch.randn(n, heads, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).transpose(0, 1).requires_grad_()


def run(f: Any, layout: SequenceLayout, leaves: list[Tensor], prefix_groups: list[int], **kw: Any) -> list[Tensor]:
    """Output and the gradients of all leaves: q, k, v, then keys and values of each prefix group."""
    pairs = list(zip(leaves[3::2], leaves[4::2], strict=True))
    out = f(*leaves[:3], layout, scale=SCALE, prefix=dict(zip(prefix_groups, pairs, strict=True)) or None, **kw)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, d_out)]


def check(
    lengths: list[int],
    groups: list[int] | None = None,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float64,
    prefix_rows: dict[int, int] | None = None,
    separate: bool = False,
    **kw: Any,
) -> None:
    """Fast equals ref, values and gradients."""
    prefix_rows = prefix_rows or {}
    layout = SequenceLayout.build(lengths, groups, prefix_groups=prefix_rows, separate_groups=separate)
    leaves = [stream(s, h, sum(lengths), dtype=dtype) for s, h in enumerate((heads, kv_heads, kv_heads))]
    leaves += [stream(10 + s, kv_heads, rows, dtype=dtype) for rows in prefix_rows.values() for s in (rows, 50 + rows)]
    fast = run(varlen_attention, layout, leaves, list(prefix_rows), **kw)
    ref = run(varlen_attention_ref, layout, leaves, list(prefix_rows), **kw)
    for a, b in zip(fast, ref, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype == dtype
        largest = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1.0, largest))


LAYOUTS = {
    "one token": [1],
    "one sequence": [37],
    "mixed": [5, 1, 40, 17, 300, 2],
    "equal": [12] * 20,
    "many buckets": [600, 3, 400, 200, 1],
}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "window": {"sliding_window": 7},
    "window 1": {"sliding_window": 1},
    "softcap": {"softcap": 1.5},
    "bidirectional": {"causal": False},
    "bidirectional softcap": {"causal": False, "softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "sinks and window": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "sliding_window": 70},
    "all": {"alibi_slopes": torch.tensor([0.3, 0.2, 0.1, 0.05]), "sliding_window": 70, "softcap": 2.0},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_ref_float64(lengths: list[int], features: dict[str, Any]) -> None:
    check(lengths, **features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_equals_ref_in_every_dtype(
    features: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for instructions in (True, False):  # for products in 16 bits
        monkeypatch.setattr(products, "faster_wide_from", lambda *_, there=instructions: math.inf if there else 1)
        check([5, 1, 40, 17, 120, 2], [0, 1, 0, 2, 1, 0], dtype=dtype, prefix_rows={1: 4}, **features)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (6, 2)])
@pytest.mark.parametrize("separate", [False, True])
def test_head_grouping_and_prefix(heads: int, kv_heads: int, separate: bool) -> None:
    """Two groups with prefixes of different lengths, one without; group 3's prefix has no rows."""
    rows = {0: 3, 2: 5, 3: 0}
    lengths, groups = [9, 30, 1, 12, 300, 7], [0, 1, 2, 0, 2, 3]
    check(lengths, groups, heads=heads, kv_heads=kv_heads, prefix_rows=rows, separate=separate)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_prefix_with_features(features: dict[str, Any]) -> None:
    """Prefix rows are real positions to the bias and the window; long enough for several query chunks."""
    check([9, 30, 1, 520], [0, 1, 0, 0], prefix_rows={0: 6}, **features)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_layouts(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=9))
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    present = [g for g in (1, 2) if g in groups]
    features: dict[str, Any] = {
        "sliding_window": data.draw(st.sampled_from([None, 1, 3, 20])),
        "softcap": data.draw(st.sampled_from([None, 2.0])),
        "alibi_slopes": data.draw(st.sampled_from([None, torch.tensor([0.5, 0.25, 0.1, 0.05])])),
    }
    if data.draw(st.booleans()):
        features = {"softcap": features["softcap"], "causal": False}
    separate = data.draw(st.booleans())
    chunk, attention.QUERY_CHUNK = attention.QUERY_CHUNK, data.draw(st.sampled_from([3, 16, 256]))
    try:
        check(lengths, groups, prefix_rows={g: 2 + g for g in present}, separate=separate, **features)
    finally:
        attention.QUERY_CHUNK = chunk


def test_every_token_is_in_one_bucket_once() -> None:
    lengths, groups = [300, 7, 7, 90, 1, 100, 299], [0, 1, 0, 1, 2, 2, 1]
    layout = SequenceLayout.build(lengths, groups, prefix_groups=[2])
    assert layout.cu_seqlens.tolist() == [0, 300, 307, 314, 404, 405, 505, 804]
    assert layout.cu_seqlens.dtype == torch.int32
    real = [row[:n] for b in layout.buckets for row, n in zip(b.tokens.tolist(), b.lengths, strict=True)]
    assert sorted(t for row in real for t in row) == list(range(804))
    assert all({groups[s] for s in b.sequences} == {2} for b in layout.buckets if b.group == 2)
    assert not any(2 in {groups[s] for s in b.sequences} for b in layout.buckets if b.group != 2)
    separate = SequenceLayout.build(lengths, groups, separate_groups=True)
    assert all(len({groups[s] for s in b.sequences}) == 1 for b in separate.buckets)


@pytest.mark.parametrize("features", [{}, FEATURES["all"], {"causal": False}], ids=["plain", "all", "bidirectional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_separate_groups_is_bitwise_what_each_group_is_alone(dtype: torch.dtype, features: dict[str, Any]) -> None:
    lengths, groups = [33, 65, 7, 90, 1, 310, 64, 28], [0, 1, 0, 2, 1, 1, 0, 3]
    rows = {1: 4, 3: 2}
    dim, bounds = 64, torch.tensor([0, *lengths]).cumsum(0).tolist()
    together = [stream(s, h, sum(lengths), dim, dtype) for s, h in enumerate((4, 2, 2))]
    prefixes = {g: [stream(20 + g + s, 2, p, dim, dtype) for s in (0, 50)] for g, p in rows.items()}
    layout = SequenceLayout.build(lengths, groups, prefix_groups=rows, separate_groups=True)
    leaves = together + [x for pair in prefixes.values() for x in pair]
    out, *grads = run(varlen_attention, layout, leaves, list(rows), **features)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    for group in sorted(set(groups)):
        mine = [s for s, g in enumerate(groups) if g == group]
        at = torch.tensor([t for s in mine for t in range(bounds[s], bounds[s + 1])])
        # The same numbers in a stream of their own, in a projection's memory order.
        leaves = [x.detach().transpose(0, 1)[at].transpose(0, 1).requires_grad_() for x in together]
        leaves += prefixes.get(group, [])
        own = [lengths[s] for s in mine]
        alone = SequenceLayout.build(own, [group] * len(own), prefix_groups=rows, separate_groups=True)
        prefix = {group: tuple(prefixes[group])} if group in rows else None
        got = varlen_attention(*leaves[:3], alone, scale=SCALE, prefix=prefix, **features)
        alone_grads = torch.autograd.grad(got, leaves, d_out[at])
        assert torch.equal(got, out[at])
        assert all(torch.equal(a, b[:, at]) for a, b in zip(alone_grads[:3], grads[:3], strict=True))
        if group in rows:
            first = 3 + 2 * list(rows).index(group)
            assert all(torch.equal(a, b) for a, b in zip(alone_grads[3:], grads[first : first + 2], strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("poison", [5.0, float("nan")])
def test_a_sequence_never_moves_another(poison: float, causal: bool) -> None:
    """Same bucket, one sequence changed (even to NaN): outputs and gradients of the others differ by exactly 0."""
    lengths = [20, 25, 17, 22]
    layout = SequenceLayout.build(lengths)
    assert len(layout.buckets) == 1
    others = torch.cat([torch.arange(20), torch.arange(45, 84)])
    leaves = [stream(s, h, 84, dtype=torch.float32) for s, h in enumerate((4, 2, 2))]
    changed = [x.detach().clone() for x in leaves]
    for x in changed:
        x[:, 20:45] = poison
        x.requires_grad_()
    before, after = (run(varlen_attention, layout, x, [], causal=causal) for x in (leaves, changed))
    assert torch.equal(before[0][others], after[0][others])
    assert all(torch.equal(a[:, others], b[:, others]) for a, b in zip(before[1:], after[1:], strict=True))


def test_any_memory_order_and_partial_gradients() -> None:
    """[H, N, D]-contiguous inputs and a slice of a fused qkv give the same; gradients only where they are wanted."""
    lengths = [7, 30, 11]
    layout = SequenceLayout.build(lengths)
    q, k, v = (stream(s, 4, 48) for s in range(3))
    expected = varlen_attention_ref(q, k, v, layout, scale=SCALE)
    fused = torch.cat([x.detach().transpose(0, 1) for x in (q, k, v)], 1)
    for parts in ([x.detach().contiguous() for x in (q, k, v)], [x.transpose(0, 1) for x in fused.split(4, 1)]):
        torch.testing.assert_close(varlen_attention(*parts, layout, scale=SCALE), expected, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(expected.sin().sum(), v)
    out = varlen_attention(q.detach(), k.detach(), v, layout, scale=SCALE)
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), v), wanted, rtol=0, atol=1e-12)


def test_alibi_in_bfloat16_is_exact_far_from_the_start() -> None:
    """slope * position rounded to bf16 would be wrong by whole units at position 1000."""
    kw: dict[str, Any] = {"scale": 0.1, "alibi_slopes": torch.tensor([0.7])}
    q, k, v = (stream(s, 1, 1100, dtype=torch.bfloat16) for s in range(3))
    layout = SequenceLayout.build([1100])
    fast, ref = varlen_attention(q, k, v, layout, **kw), varlen_attention_ref(q, k, v, layout, **kw)
    # The fault moves a result by 1.5. Each of the two rounds one to bfloat16 (1 eps together), of values up to 4.2.
    torch.testing.assert_close(fast, ref, rtol=2e-2, atol=2e-2)


def test_wrong_input_is_refused() -> None:
    q, k = stream(0, 4, 10), stream(1, 2, 10)
    with pytest.raises(ValueError, match="at least one token"):
        SequenceLayout.build([3, 0])
    with pytest.raises(ValueError, match="2 lengths but 1 groups"):
        SequenceLayout.build([3, 7], [0])
    with pytest.raises(ValueError, match="N = 9"):
        varlen_attention(q, k, k, SequenceLayout.build([9]), scale=1.0)
    with pytest.raises(ValueError, match="one dtype"):
        varlen_attention(q, k.float(), k, SequenceLayout.build([10]), scale=1.0)
    with pytest.raises(ValueError, match="causal attention only"):
        varlen_attention(q, k, k, SequenceLayout.build([10]), scale=1.0, sliding_window=3, causal=False)
    with pytest.raises(ValueError, match="prefix_groups"):
        varlen_attention(q, k, k, SequenceLayout.build([10]), scale=1.0, prefix={0: (k, k)})


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_of_the_sinks(window: int | None, dtype: torch.dtype) -> None:
    layout = SequenceLayout.build([9, 140, 1])
    found = []
    for f in (varlen_attention, varlen_attention_ref):
        q, k, v = (stream(s, h, 150, dtype=dtype) for s, h in enumerate((4, 2, 2)))
        sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=dtype, requires_grad=True)
        out = f(q, k, v, layout, scale=SCALE, sinks=sinks, sliding_window=window)
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
        found.append(torch.autograd.grad(out, sinks, d_out)[0].double())
    # Sums over 150 rows and 8 values of about one.
    torch.testing.assert_close(*found, rtol=TOLERANCE[dtype] * 10, atol=TOLERANCE[dtype] * 35)


# One new token sees all that is in the cache: there is nothing that is not causal about it.
CAUSAL = {name: features for name, features in FEATURES.items() if features.get("causal", True)}


@pytest.mark.parametrize("features", CAUSAL.values(), ids=CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decode_equals_ref(features: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gen = torch.Generator().manual_seed(3)
    q = torch.randn(5, 4, 8, generator=gen).to(dtype)
    k, v = (torch.randn(2, 5, 33, 8, generator=gen).to(dtype) for _ in range(2))
    lengths = torch.tensor([1, 33, 7, 20, 2])
    ref = decode_attention_ref(q, k, v, lengths, scale=SCALE, **features)
    for instructions in (True, False) if dtype.itemsize == 2 else (True,):
        monkeypatch.setattr(products, "faster_wide_from", lambda *_, there=instructions: math.inf if there else 1)
        fast = decode_attention(q, k, v, lengths, scale=SCALE, **features)
        assert fast.dtype == dtype
        torch.testing.assert_close(fast, ref, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("features", CAUSAL.values(), ids=CAUSAL)
def test_decode_continues_varlen(features: dict[str, Any]) -> None:
    """The last token of a sequence, decoded against its cache, gives the row that the whole sequence gives."""
    n = 24
    q, k, v = (stream(s, h, n).detach() for s, h in enumerate((4, 2, 2)))
    full = varlen_attention(q, k, v, SequenceLayout.build([n]), scale=SCALE, **features)
    given = (q[None, :, -1], k[:, None], v[:, None])
    lengths = torch.tensor([n])
    hidden = hidden_keys(lengths, n, features.get("sliding_window"), lengths.device)
    for rows, more in ((lengths, {}), (None, {}), (lengths, {"hidden": hidden})):
        last = decode_attention(*given, rows, scale=SCALE, **features, **more)
        torch.testing.assert_close(last[0], full[-1], rtol=0, atol=1e-12)
