"""``length_controlled_minimal``: AlpacaEval's win rate under the condition that both answers are of one length.

AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) fits a logistic regression to the verdicts. This is its smallest
form: no term for how hard a question is, and none of the rows that it adds against gaming. With d the characters that
the answer of A has more, s the standard deviation of d, and y in {0, ½, 1} the verdict for A,

    P(y) = σ(b + w·tanh(d/s)),        LC = σ(b),

where b and w minimise -Σ[y·log p + (1-y)·log(1-p)] + (b² + w²)/(2·100). The last term (a normal prior with standard
deviation 10) only keeps them finite where the verdicts are all alike or follow the length exactly. Newton's method
solves it. Since y may be ½, the error is the robust one: with H the Hessian and M = Σ(y-p)²·xxᵀ, V = n/(n-2)·H⁻¹MH⁻¹,
and by the delta method se(LC) = LC·(1-LC)·√V_bb.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_PRIOR = 100.0
_STEPS, _ENOUGH = 50, 1e-10


@dataclass(frozen=True)
class LengthControlled:
    """A win rate at equal length, and what a length counts.

    Attributes:
        value, stderr: of the rate; None with fewer than three items, or where all differ by the same length;
            no error where the verdicts are all alike.
        weight, weight_stderr: w, in logits per tanh(d/s): above 0 the judge takes the longer answer for better.
    """

    value: float | None
    stderr: float | None
    weight: float | None = None
    weight_stderr: float | None = None

    def entries(self) -> dict[str, object]:
        """It as JSON holds it."""
        return {"value": self.value, "stderr": self.stderr, "weight": self.weight, "weight_stderr": self.weight_stderr}


def length_controlled_minimal(values: Sequence[float], gaps: Sequence[float]) -> LengthControlled:
    """The win rate of A at equal length.

    Args:
        values: [items], 1 where A wins, ½ for a tie, 0 where B wins.
        gaps: [items], by how many characters the answer of A is longer.
    """
    y, d = np.asarray(values, dtype=float), np.asarray(gaps, dtype=float)
    if len(y) < 3:
        return LengthControlled(None, None)
    spread = float(d.std())
    if not spread and d[0]:
        return LengthControlled(None, None)  # always the same difference: its effect and that of A are one
    if not spread:
        x = np.ones((len(y), 1))
    else:
        x = np.stack([np.ones(len(y)), np.tanh(d / spread)], axis=1)
    beta = _fit(x, y)
    p = _sigmoid(x @ beta)
    inverse = np.linalg.inv(_hessian(x, p))
    middle = (x * ((y - p) ** 2)[:, None]).T @ x
    errors = np.sqrt(np.diag(inverse @ middle @ inverse) * len(y) / (len(y) - 2))
    rate = float(_sigmoid(beta[:1])[0])
    alike = bool((y == y[0]).all())
    weight = (float(beta[1]), float(errors[1])) if len(beta) > 1 else (None, None)
    return LengthControlled(rate, None if alike else float(rate * (1 - rate) * errors[0]), *weight)


def _fit(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """b and w [2] (or b alone) by Newton's method; a step that makes the loss larger is halved."""
    beta = np.zeros(x.shape[1])
    for _ in range(_STEPS):
        p = _sigmoid(x @ beta)
        step = np.linalg.solve(_hessian(x, p), x.T @ (y - p) - beta / _PRIOR)
        before = _loss(x, y, beta)
        while _loss(x, y, beta + step) > before and np.abs(step).max() > _ENOUGH:
            step = step / 2
        beta = beta + step
        if np.abs(step).max() <= _ENOUGH:
            break
    return beta


def _hessian(x: NDArray[np.float64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = (x * (p * (1 - p))[:, None]).T @ x + np.eye(x.shape[1]) / _PRIOR
    return found


def _loss(x: NDArray[np.float64], y: NDArray[np.float64], beta: NDArray[np.float64]) -> float:
    z = x @ beta
    return float((np.logaddexp(0, z) - y * z).sum() + (beta @ beta) / (2 * _PRIOR))


def _sigmoid(z: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.exp(-np.logaddexp(0, -z))
    return found
