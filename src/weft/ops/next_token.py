"""From logits to a next token: the draw, and the log-probabilities that are told of it.

A cut is a threshold on the logits, so tokens of one probability stay or go together, and neither a draw nor a list of
the likeliest depends on the order in which a sort leaves ties. Each row's result depends on that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# As many of the likeliest tokens are looked at for top_p before all are sorted.
_LIKELY = 256
# A token is found in two steps: first its block of so many ids, then its place in the block.
_BLOCK = 256
# fp32 cannot divide by less. Logits that differ are infinitely far apart long before.
_COLDEST = 1e-30

# The log-probability of the chosen token, and (id, log-probability) of the likeliest.
Told = tuple[float, tuple[tuple[int, float], ...]]


class Cut(NamedTuple):
    """What is drawn from: softmax(logits / temperature), cut to top_k (0: all), top_p of what is left, and min_p."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def wide(logits: Tensor) -> Tensor:
    """The logits [...] in fp32, or as they are in fp64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def pick_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows of ``x`` [B, V], as [n, V]; the same tensor where they are all."""
    if len(rows) == len(x):
        return x
    return x.index_select(0, torch.tensor(rows, device=x.device))  # several times as fast as x[rows]


def draw(logits: Tensor, cuts: Sequence[Cut], uniforms: Sequence[float]) -> Tensor:
    """One token per row, [S] int64: the first, in the order of ids, at which the sum of probabilities exceeds u.

    Args:
        logits: [S, V]; -inf for tokens that may not come.
        cuts: One per row.
        uniforms: The row's random number u in [0, 1), one per row.
    """
    scaled = _scaled(wide(logits), [cut.temperature for cut in cuts])
    thresholds = _thresholds(scaled, cuts)
    count, vocabulary = scaled.shape
    blocks = -(-vocabulary // _BLOCK)
    weights = scaled.new_empty(count, blocks * _BLOCK)
    torch.exp(scaled, out=weights[:, :vocabulary])
    weights[:, vocabulary:] = 0
    if thresholds is not None:
        weights[:, :vocabulary].masked_fill_(scaled < thresholds[:, None], 0)
    weights = weights.view(count, blocks, _BLOCK)
    sums = weights.sum(-1, dtype=torch.float64).cumsum(-1)
    target = torch.tensor(list(uniforms), dtype=torch.float64).to(sums.device) * sums[:, -1]
    block = _first_above(sums, target)
    rows = torch.arange(count, device=sums.device)
    rest = target - torch.where(block > 0, sums[rows, (block - 1).clamp(min=0)], 0)
    inside = weights[rows, block].double().cumsum(-1)
    return block * _BLOCK + _first_above(inside, rest)


def _scaled(x: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Logits [S, V] divided by the temperatures [S], moved so that each row's largest is 0."""
    divisors = torch.tensor([max(one, _COLDEST) for one in temperatures], dtype=torch.float64).to(x)
    return (x - x.amax(-1, keepdim=True)).div_(divisors[:, None])


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """The first place [S] at which rising ``sums`` [S, n] exceed ``target`` [S].

    Where rounding lets none of them do so, it is the last place that has a share.
    """
    place = (sums <= target[:, None]).sum(-1)
    return torch.minimum(place, sums.argmax(-1))


def _thresholds(scaled: Tensor, cuts: Sequence[Cut]) -> Tensor | None:
    """The least scaled logit [S] that stays, of ``scaled`` [S, V]; None where all stay."""
    vocabulary = scaled.shape[-1]
    floor = [math.log(cut.min_p) if cut.min_p > 0 else -math.inf for cut in cuts]
    cut_k = [row for row, cut in enumerate(cuts) if 0 < cut.top_k < vocabulary]
    cut_p = [row for row, cut in enumerate(cuts) if cut.top_p < 1]
    if not cut_k and not cut_p and max(floor) == -math.inf:
        return None
    least = torch.full((len(cuts),), -math.inf, dtype=scaled.dtype, device=scaled.device)
    # Small and large k apart, so that a row with a large one slows no other.
    for small in (True, False):
        rows = [row for row in cut_k if (cuts[row].top_k <= _LIKELY) == small]
        if rows:
            ks = torch.tensor([cuts[row].top_k for row in rows], device=scaled.device)
            likely = pick_rows(scaled, rows).topk(int(ks.max())).values
            least[rows] = likely.gather(-1, ks[:, None] - 1)[:, 0]
    if cut_p:
        shares = torch.tensor([cuts[row].top_p for row in cut_p], dtype=torch.float64).to(scaled.device)
        kept = pick_rows(scaled, cut_p)
        kept = kept.masked_fill(kept < least[cut_p][:, None], -math.inf)
        least[cut_p] = _nucleus(kept, shares)
    return torch.maximum(least, torch.tensor(floor, dtype=torch.float64).to(scaled))


def _nucleus(scaled: Tensor, shares: Tensor) -> Tensor:
    """The least scaled logit [S] over which there is not yet the share [S] of all probability of ``scaled`` [S, V]."""
    wanted = shares * scaled.exp().sum(-1, dtype=torch.float64)
    likely = scaled.topk(min(_LIKELY, scaled.shape[-1])).values
    least, sure = _last_below(likely, wanted)
    if likely.shape[-1] < scaled.shape[-1] and not bool(sure.all()):
        flat = (~sure).nonzero()[:, 0]
        least[flat] = _last_below(scaled[flat].sort(descending=True).values, wanted[flat])[0]
    return least


def _last_below(falling: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The last of ``falling`` [S, n] over which there is less than ``wanted`` [S]; whether another follows it, [S]."""
    sums = falling.exp().double().cumsum(-1)
    above = torch.nn.functional.pad(sums[:, :-1], (1, 0))
    count = (above < wanted[:, None]).sum(-1).clamp(min=1)  # the likeliest stays also with top_p 0
    return falling.gather(-1, count[:, None] - 1)[:, 0], count < falling.shape[-1]


def draw_ref(logits: Tensor, cuts: Sequence[Cut], uniforms: Sequence[float]) -> Tensor:
    """What ``draw`` does with logits [S, V], token by token."""
    scaled = _scaled(wide(logits), [cut.temperature for cut in cuts])
    floors = torch.tensor([math.log(max(cut.min_p, 5e-324)) for cut in cuts], dtype=torch.float64).to(scaled)
    rows = zip(scaled.tolist(), scaled.exp().tolist(), floors.tolist(), cuts, uniforms, strict=True)
    return torch.tensor([_draw_row_ref(*row) for row in rows], dtype=torch.int64)


def _draw_row_ref(values: list[float], weights: list[float], floor: float, cut: Cut, uniform: float) -> int:
    kept = list(range(len(values)))
    if cut.top_k > 0:
        least = sorted(values, reverse=True)[min(cut.top_k, len(values)) - 1]
        kept = [token for token in kept if values[token] >= least]
    if cut.top_p < 1:
        wanted = cut.top_p * math.fsum(weights[token] for token in kept)
        above = [math.fsum(weights[one] for one in kept if values[one] > values[token]) for token in kept]
        kept = [token for token, sum_ in zip(kept, above, strict=True) if sum_ < wanted or values[token] == 0]
    if cut.min_p > 0:
        kept = [token for token in kept if values[token] >= floor]
    wanted, reached = uniform * math.fsum(weights[token] for token in kept), 0.0
    for token in kept:
        reached += weights[token]
        if reached > wanted:
            return token
    return [token for token in kept if weights[token] > 0][-1]


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], temperatures: Sequence[float], counts: Sequence[int]
) -> list[Told]:
    """Log-probabilities under softmax(logits / temperature), over the whole vocabulary.

    Args:
        logits: [R, V].
        tokens: The chosen token of each row.
        temperatures: One per row, each more than 0.
        counts: How many of the likeliest tokens are told, one per row. Of equally likely ones those with smaller ids.
    """
    scaled = _scaled(wide(logits), temperatures)
    normalisers = scaled.exp().sum(-1).log()
    width = min(max(counts) + 1, scaled.shape[-1])  # one more, to see whether the last has equals that are left out
    values, ids = scaled.topk(width)
    chosen = scaled.gather(-1, torch.tensor(tokens, device=scaled.device)[:, None])[:, 0] - normalisers
    tied = [0 < n < width for n in counts]
    told: list[Told] = []
    rows = zip(values.tolist(), ids.tolist(), normalisers.tolist(), chosen.tolist(), counts, strict=True)
    for row, (likely, names, normaliser, own, count) in enumerate(rows):
        pairs = list(zip(likely, names, strict=True))
        if tied[row] and likely[count - 1] == likely[count]:
            equal = (scaled[row] == values[row, count]).nonzero()[:, 0].tolist()
            pairs = [pair for pair in pairs if pair[0] > likely[count]] + [(likely[count], name) for name in equal]
        pairs = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:count]
        told.append((own, tuple((name, value - normaliser) for value, name in pairs)))
    return told


def token_logprobs_ref(
    logits: Tensor, tokens: Sequence[int], temperatures: Sequence[float], counts: Sequence[int]
) -> list[Told]:
    """What ``token_logprobs`` does with logits [R, V], by a sort of the whole vocabulary."""
    told: list[Told] = []
    for row, token, temperature, count in zip(wide(logits), tokens, temperatures, counts, strict=True):
        found = (row.double() / max(temperature, _COLDEST)).log_softmax(-1).tolist()
        order = sorted(range(len(found)), key=lambda one: (-found[one], one))
        told.append((found[token], tuple((one, found[one]) for one in order[:count])))
    return told
