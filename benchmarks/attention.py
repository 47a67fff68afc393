"""Which way of attending over a padding-free stream is fastest on this machine, forward and backward together?

    python benchmarks/attention.py [--dtype bf16 fp32] [--repeats 15] [--quick]

Every variant gets the same q, k, v in the memory order of a projection ([N, heads, D]). Variants are run in turn,
repeatedly; the table shows the median and the least time of one forward + backward in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.ops import sequence_layout
from weft.ops.attention import SequenceLayout, varlen_attention

# Eight lengths like Alpaca's (median 68 tokens, p99 318), eight near its median, 32, packed pieces, a long document.
LENGTHS = {
    "alpaca": (41, 52, 60, 68, 71, 95, 140, 318),
    "alpaca-even": (58, 61, 64, 66, 68, 70, 75, 80),
    "alpaca-32": tuple(int(40 + 1.09**i * 18) for i in range(32)),
    "512s": (512, 512),
    "2048": (2048,),
}
Variant = Callable[[Tensor, Tensor, Tensor, SequenceLayout, float], Tensor]


def sdpa_per_sequence(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """One call per sequence, each on a slice of the stream. Returns [N, H, D]."""
    outs = []
    for parts in zip(*(x[None].split(layout.lengths, 2) for x in (q, k, v)), strict=True):
        o = F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale, enable_gqa=q.shape[0] != k.shape[0])
        outs.append(o[0].transpose(0, 1))
    return torch.cat(outs)


def sdpa_per_bucket(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """Right-padded buckets through SDPA with is_causal."""
    outs, order = [], []
    for bucket in layout.buckets:
        block = [x.transpose(0, 1)[bucket.tokens].transpose(1, 2) for x in (q, k, v)]
        o = F.scaled_dot_product_attention(*block, is_causal=True, scale=scale, enable_gqa=q.shape[0] != k.shape[0])
        real = torch.arange(bucket.length) < torch.tensor(bucket.lengths)[:, None]
        outs.append(o.transpose(1, 2)[real])
        order.append(bucket.tokens[real])
    return torch.cat(outs)[torch.cat(order).argsort()]


def padded_eager(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """Everything padded to the longest, plain autograd: what a padding trainer does ('eager' in transformers)."""
    longest = max(layout.lengths)
    rows = [F.pad(x.transpose(0, 1), (0, 0, 0, 0, 0, 0)).split(layout.lengths) for x in (q, k, v)]
    qp, kp, vp = (torch.nn.utils.rnn.pad_sequence(r, batch_first=True).transpose(1, 2) for r in rows)
    kp, vp = (x.repeat_interleave(q.shape[0] // k.shape[0], 1) for x in (kp, vp))
    mask = torch.full((longest, longest), -torch.inf, dtype=q.dtype).triu(1)
    p = (qp @ kp.transpose(2, 3) * scale + mask).softmax(-1, dtype=torch.float32).to(q.dtype)
    o = (p @ vp).transpose(1, 2)
    return torch.cat([o[i, :n] for i, n in enumerate(layout.lengths)])


def weft(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """The delivered function."""
    return varlen_attention(q, k, v, layout, scale=scale)


def layouts(lengths: tuple[int, ...]) -> dict[str, SequenceLayout]:
    """The same sequences under several bucket granularities."""
    kept, made = sequence_layout.BUCKET_OVERHEAD, {}
    grades = {"one each": -1, "3k": 3_000, "10k": 10_000, "30k": 30_000, "100k": 100_000, "one": 2**60}
    for name, overhead in grades.items():
        sequence_layout.BUCKET_OVERHEAD = overhead
        made[name] = SequenceLayout.build(lengths)
    sequence_layout.BUCKET_OVERHEAD = kept
    return made


def measure(run: dict[str, Callable[[], None]], repeats: int) -> dict[str, tuple[float, float]]:
    """Interleaved, so that a busy moment hits all alike. Name -> (median, least) in ms."""
    times: dict[str, list[float]] = {name: [] for name in run}
    for turn in range(repeats + 2):
        for name, f in run.items():
            start = time.perf_counter()
            f()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: (statistics.median(t), min(t)) for name, t in times.items()}


def inputs(n: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v [heads, N, D] as views of [N, heads, D], and an output gradient [N, H, D]."""
    made = [torch.randn(n, h, dim).to(dtype).transpose(0, 1) for h in (heads, kv_heads, kv_heads)]
    return [x.requires_grad_() for x in made] + [torch.randn(n, heads, dim).to(dtype)]


def compare(name: str, heads: int, kv_heads: int, dtype: torch.dtype, repeats: int, quick: bool) -> None:
    """Print one block of the table."""
    lengths = LENGTHS[name]
    q, k, v, d_out = inputs(sum(lengths), heads, kv_heads, 64, dtype)

    def timed(variant: Variant, layout: SequenceLayout) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(variant(q, k, v, layout, 0.125), (q, k, v), d_out)

        return run

    default = SequenceLayout.build(lengths)
    run = {"weft": timed(weft, default), "sdpa per sequence": timed(sdpa_per_sequence, default)}
    if not quick:
        run["sdpa per bucket"] = timed(sdpa_per_bucket, default)
        if max(lengths) <= 512:
            run["padded eager"] = timed(padded_eager, default)
        for label, layout in layouts(lengths).items():
            run[f"weft, buckets {label} ({len(layout.buckets)})"] = timed(weft, layout)
    results = measure(run, repeats)
    base = results["weft"][0]
    print(f"\n{name}: {len(lengths)} sequences, {sum(lengths)} tokens, H={heads} K={kv_heads} D=64, {dtype}")
    for label, (median, least) in results.items():
        print(f"  {label:30s} {median:9.2f} ms  (least {least:8.2f})  {median / base:6.2f} x weft")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--kv-heads", nargs="+", type=int, default=[32, 4])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="only the delivered function and SDPA per sequence")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for dtype in args.dtype:
        for kv_heads in args.kv_heads:
            for name in args.lengths:
                compare(name, 32, kv_heads, dtypes[dtype], args.repeats, args.quick)


if __name__ == "__main__":
    main()
