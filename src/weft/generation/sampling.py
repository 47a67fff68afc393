"""How the next token of every row is chosen.

A row's logits go through these steps, in this order (vLLM's and transformers', where the two agree):

1. ``logit_bias`` is added.
2. ``repetition_penalty`` divides positive and multiplies negative logits of all tokens of prompt and answer;
   ``frequency_penalty`` and ``presence_penalty`` are taken off for tokens of the answer.
3. A constraint takes out what its grammar does not allow.
4. Greedy rows take the likeliest token here. For the others the logits are divided by ``temperature``.
5. ``top_k``, then ``top_p`` of what is left, then ``min_p`` cut the less likely tokens. A cut is a threshold on the
   logits: tokens of one probability stay or go together, so the result does not depend on the order of ties.
6. One uniform number of the row's own generator chooses a token: the first in the order of ids at which the sum of
   the probabilities exceeds it. What a row draws depends neither on its neighbours nor on how many they are.

Log-probabilities are those of the whole vocabulary before step 1, at the row's temperature.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from weft.errors import UserError
from weft.ops.next_token import Cut, Told, draw, draw_ref, pick_rows, token_logprobs, token_logprobs_ref, wide

_NOT_FINITE = "the model's logits are not finite (NaN or infinite): the adapter or the base is damaged."
_NOTHING_LEFT = "the constraint allows no token here to which the model gives a probability."


@dataclass(frozen=True)
class Sampling:
    """How one row's tokens are chosen. Temperature 0 is greedy.

    Args:
        temperature: The logits are divided by it.
        top_k: So many of the likeliest tokens stay; 0 for all.
        top_p: A token stays if those likelier than it do not yet make up this share; 1 for all.
        seed: Of the row's own random numbers.
        min_p: A token stays if it has at least this share of the likeliest one's probability.
        repetition_penalty: Divides the logits (multiplies negative ones) of tokens of prompt and answer.
        presence_penalty: Is taken off the logits of tokens of the answer.
        frequency_penalty: Is taken off the logits of tokens of the answer, as often as they occur there.
        logit_bias: Token id -> what is added to its logit.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    _: KW_ONLY
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not _whole(self.seed) or not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} does not fit into 64 bits.")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if not _whole(self.top_k) or not self.top_k >= 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more, without a fraction.")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie between 0 and 1 (all tokens).")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; it must lie between 0 (all tokens) and 1.")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}; it must be more than 0 (1 does nothing)."
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie between -2 and 2 (0 does nothing).")
        if not isinstance(self.logit_bias, Mapping):
            raise UserError(f"logit_bias is {self.logit_bias!r}; expected token ids with a number each, as a mapping.")
        for token, bias in self.logit_bias.items():
            if not _whole(token) or token < 0:
                raise UserError(f"logit_bias has the key {token!r}; expected a token id, 0 or more.")
            if isinstance(bias, bool) or not isinstance(bias, numbers.Real) or not math.isfinite(bias):
                raise UserError(f"logit_bias of token {token} is {bias!r}; expected a finite number.")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # the caller may change its own

    def check_vocabulary(self, size: int) -> None:
        """Refuse a bias of a token that the model does not have.

        Raises:
            UserError: logit_bias names such a token.
        """
        wrong = sorted(token for token in self.logit_bias if token >= size)
        if wrong:
            raise UserError(f"logit_bias names token {wrong[0]}; the model's vocabulary has {size} tokens.")

    @property
    def cut(self) -> Cut:
        """What a row that is not greedy draws from."""
        return Cut(self.temperature, self.top_k, self.top_p, self.min_p)

    @property
    def logprob_temperature(self) -> float:
        """The temperature at which log-probabilities are told: a greedy row's counts as 1."""
        return self.temperature or 1.0

    @property
    def penalises(self) -> bool:
        """Whether tokens that have occurred are treated differently."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)


class Restriction(Protocol):
    """What a constraint allows next, for one row. ``ended``: nothing can follow but an end."""

    ended: bool

    def mask(self) -> Tensor:
        """[V] bool, on the CPU: True where a token may come next."""

    def accept(self, token: int) -> None:
        """Go on behind this token."""

    @property
    def failure(self) -> str | None:
        """Why nothing more can be said of this row; None as long as all is well."""


class Drawing:
    """The state of one row from which tokens are drawn: random numbers, tokens that have occurred, its restriction."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Iterable[int] = (),
        *,
        matcher: Restriction | None = None,
        logprobs: int | None = None,
    ) -> None:
        """``logprobs``: None for none, k for the chosen token's and those of the k likeliest.

        Raises:
            UserError: logprobs is negative.
        """
        if logprobs is not None and (not _whole(logprobs) or logprobs < 0):
            raise UserError(f"logprobs is {logprobs}; it must be 0 (the chosen token's alone) or more.")
        self.sampling, self.matcher, self.logprobs = sampling, matcher, logprobs
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.seen = _Seen(prompt) if sampling.penalises else None
        self.bias_ids = torch.tensor(list(sampling.logit_bias), dtype=torch.int64)
        self.biases = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float64)

    @property
    def plain(self) -> bool:
        """Whether the row takes the likeliest token of the logits as they are."""
        greedy = self.sampling.temperature == 0
        return greedy and self.matcher is None and self.seen is None and not len(self.bias_ids)

    def uniform(self) -> float:
        """The row's next random number, in [0, 1)."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def accept(self, token: int) -> None:
        """Count a token of the answer, and go on behind it."""
        if self.seen is not None:
            self.seen.add(token)
        if self.matcher is not None:
            self.matcher.accept(token)


class _Seen:
    """The tokens of a prompt and its answer, each once, and how often the answer has them."""

    def __init__(self, prompt: Iterable[int]) -> None:
        known = list(dict.fromkeys(prompt))
        self._places = {token: place for place, token in enumerate(known)}
        room = 2 * len(known) + 64
        self._ids = torch.zeros(room, dtype=torch.int64)
        self._ids[: len(known)] = torch.tensor(known, dtype=torch.int64)
        self._counts = torch.zeros(room, dtype=torch.float64)

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)])
            self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> Tensor:
        """[n] int64, each once."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Tensor:
        """[n] float64: how often each of ``ids`` stands in the answer."""
        return self._counts[: len(self._places)]


@dataclass(frozen=True)
class Choice:
    """What a step chose, per row. ``failures``: row -> why its token means nothing; such a row cannot go on."""

    tokens: list[int]
    logprobs: list[float | None]
    top: list[tuple[tuple[int, float], ...]]
    failures: dict[int, str] = field(default_factory=dict)


def choose(logits: Tensor, drawings: Sequence[Drawing]) -> Choice:
    """Choose the next token of every row, and let the rows' drawings go on behind it.

    Args:
        logits: [B, V], of any dtype and device.
        drawings: One per row.
    """
    peaks, tokens = logits.max(-1)
    finite, reachable = peaks.isfinite(), torch.ones_like(tokens, dtype=torch.bool)
    shaped = [row for row, drawing in enumerate(drawings) if not drawing.plain]
    if shaped:
        rows = torch.tensor(shaped, device=logits.device)
        tokens[rows], reachable[rows] = _choose_shaped(logits.index_select(0, rows), [drawings[row] for row in shaped])
    return _choice(logits, tokens, finite, reachable, drawings, token_logprobs)


def _choose_shaped(logits: Tensor, drawings: Sequence[Drawing]) -> tuple[Tensor, Tensor]:
    """The tokens [S] of rows that are not plain, and whether there is any; ``logits`` [S, V] are a copy of theirs."""
    x = wide(logits)
    _add_bias(x, drawings)
    _penalise(x, drawings)
    for row, drawing in enumerate(drawings):
        if drawing.matcher is not None:
            x[row].masked_fill_(~drawing.matcher.mask().to(x.device), -math.inf)
    peaks, tokens = x.max(-1)
    warm = [row for row, drawing in enumerate(drawings) if drawing.sampling.temperature > 0]
    if warm:
        drawn = [drawings[row] for row in warm]
        rows = torch.tensor(warm, device=x.device)
        tokens[rows] = draw(pick_rows(x, warm), [one.sampling.cut for one in drawn], [one.uniform() for one in drawn])
    return tokens, peaks.isfinite()


def _add_bias(x: Tensor, drawings: Sequence[Drawing]) -> None:
    biased = [(row, drawing) for row, drawing in enumerate(drawings) if len(drawing.bias_ids)]
    if biased:
        where = _places([(row, drawing.bias_ids) for row, drawing in biased], x)
        x[where] += torch.cat([drawing.biases for _, drawing in biased]).to(x)


def _penalise(x: Tensor, drawings: Sequence[Drawing]) -> None:
    known = [(row, drawing.sampling, drawing.seen) for row, drawing in enumerate(drawings) if drawing.seen is not None]
    if not known:
        return
    where = _places([(row, seen.ids) for row, _, seen in known], x)
    lengths = torch.tensor([len(seen.ids) for _, _, seen in known])
    counts = torch.cat([seen.counts for _, _, seen in known]).to(x)

    def spread(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(lengths).to(x)

    values, repetition = x[where], spread([sampling.repetition_penalty for _, sampling, _ in known])
    values = torch.where(values < 0, values * repetition, values / repetition)
    values -= spread([sampling.frequency_penalty for _, sampling, _ in known]) * counts
    values -= spread([sampling.presence_penalty for _, sampling, _ in known]) * (counts > 0)
    x[where] = values


def _places(ids: list[tuple[int, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns, each [n], of what stands at ``ids`` of each row."""
    rows = torch.cat([torch.full_like(columns, row) for row, columns in ids])
    return rows.to(x.device), torch.cat([columns for _, columns in ids]).to(x.device)


def _choice(
    logits: Tensor,
    tokens: Tensor,
    finite: Tensor,
    reachable: Tensor,
    drawings: Sequence[Drawing],
    told: Callable[[Tensor, Sequence[int], Sequence[float], Sequence[int]], list[Told]],
) -> Choice:
    """The choice of the tokens [B], with which the drawings go on; log-probabilities are of the logits [B, V]."""
    choice = Choice(tokens.tolist(), [None] * len(drawings), [()] * len(drawings))
    for row, (is_finite, is_reachable) in enumerate(zip(finite.tolist(), reachable.tolist(), strict=True)):
        matcher = drawings[row].matcher
        if not is_finite:
            choice.failures[row] = _NOT_FINITE
        elif matcher is not None and matcher.failure is not None:
            choice.failures[row] = matcher.failure
        elif not is_reachable:
            choice.failures[row] = _NOTHING_LEFT if matcher is not None else _NOT_FINITE
        else:
            drawings[row].accept(choice.tokens[row])
    asked = [(row, one) for row, one in enumerate(drawings) if one.logprobs is not None and row not in choice.failures]
    if asked:
        rows = [row for row, _ in asked]
        temperatures = [one.sampling.logprob_temperature for _, one in asked]
        counts = [min(one.logprobs or 0, logits.shape[-1]) for _, one in asked]
        found = told(pick_rows(logits, rows), [choice.tokens[row] for row in rows], temperatures, counts)
        for row, (chosen, top) in zip(rows, found, strict=True):
            choice.logprobs[row], choice.top[row] = chosen, top
    return choice


def choose_ref(logits: Tensor, drawings: Sequence[Drawing]) -> Choice:
    """What ``choose`` does with logits [B, V], row by row and token by token."""
    tokens, reachable = [], []
    for row, drawing in zip(wide(logits), drawings, strict=True):
        x, sampling = row.clone(), drawing.sampling
        for token, bias in sampling.logit_bias.items():
            x[token] += bias
        if drawing.seen is not None:
            for token, count in zip(drawing.seen.ids.tolist(), drawing.seen.counts.tolist(), strict=True):
                penalty = sampling.repetition_penalty
                x[token] = x[token] * penalty if x[token] < 0 else x[token] / penalty
                x[token] -= sampling.frequency_penalty * count
                x[token] -= sampling.presence_penalty if count else 0
        if drawing.matcher is not None:
            x[~drawing.matcher.mask()] = -math.inf
        reachable.append(bool(x.max().isfinite()))
        warm = sampling.temperature > 0 and reachable[-1]
        tokens.append(int(draw_ref(x[None], [sampling.cut], [drawing.uniform()]) if warm else x.argmax()))
    finite = torch.tensor([bool(row.max().isfinite()) for row in logits])
    return _choice(logits, torch.tensor(tokens), finite, torch.tensor(reachable), drawings, token_logprobs_ref)


def _whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
