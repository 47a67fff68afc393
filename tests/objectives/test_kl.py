"""Estimates of the KL, values and gradients, against the sum over all sequences of a vocabulary of eleven words."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.objectives.rollouts import FAR, clipped, kl_terms

WORDS = 11


def tables() -> tuple[Tensor, Tensor]:
    """Logits of the next word after each word, of a policy and of a reference."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(WORDS, WORDS, generator=generator, dtype=torch.float64, requires_grad=True)
    return policy, torch.randn(WORDS, WORDS, generator=generator, dtype=torch.float64)


def sequences(table: Tensor) -> Tensor:
    """[121, 2]: the log-probabilities of the words of every sequence of two, after the word 0."""
    logp = table.log_softmax(-1)
    first = logp[0, :, None].expand(WORDS, WORDS)
    return torch.stack([first, logp], -1).reshape(-1, 2)


def gradient(value: Tensor, policy: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, policy, retain_graph=True)
    return found


def next_word_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """The KL of the next word, summed over both places, after beginnings that the policy as it is now has drawn."""
    p, q = policy.log_softmax(-1), reference.log_softmax(-1)
    own = (p.exp() * (p - q)).sum(-1)
    return own[0] + (p[0].exp().detach() * own).sum()


def test_in_a_loss_k2_and_weighed_k3_have_the_gradient_of_the_kl() -> None:
    policy, reference = tables()
    logp, known = sequences(policy), sequences(reference)
    drawn = logp.detach().sum(1).exp()[:, None]
    exact = gradient(next_word_kl(policy, reference), policy)
    ratio = (logp - logp.detach()).exp()
    for kind in ("k2", "k3"):
        found = (drawn * kl_terms(logp, known, kind, ratio)).sum()
        assert torch.allclose(gradient(found, policy), exact, atol=1e-14), kind
    # k3 is also an unbiased value; k2 is not.
    k3 = (drawn * kl_terms(logp, known, "k3", ratio)).sum()
    assert torch.allclose(k3, next_word_kl(policy, reference), atol=1e-14)


def test_unweighed_k3_and_k1_have_another() -> None:
    """Why k3 is weighed by the ratio, and why k1 in a loss is refused: its gradient is zero whatever the reference."""
    policy, reference = tables()
    logp, known = sequences(policy), sequences(reference)
    drawn = logp.detach().sum(1).exp()[:, None]
    exact = gradient(next_word_kl(policy, reference), policy)
    plain = (drawn * kl_terms(logp, known, "k3", torch.ones_like(logp))).sum()
    assert (gradient(plain, policy) - exact).abs().max() > 0.05
    assert gradient((drawn * (logp - known)).sum(), policy).abs().max() < 1e-14


def test_k1_in_the_reward_has_the_gradient_of_the_whole_kl() -> None:
    """RLOO and PPO: the policy gradient with -k1 of the sequence as its reward goes down the KL of sequences."""
    policy, reference = tables()
    logp, known = sequences(policy).sum(1), sequences(reference).sum(1)
    drawn, distance = logp.detach().exp(), (logp - known).detach()
    exact = gradient((logp.exp() * (logp - known)).sum(), policy)
    baseline = (drawn * distance).sum()
    found, _ = clipped((logp - logp.detach()).exp(), -(distance - baseline), 0.2, 0.2)
    assert torch.allclose(gradient((drawn * found).sum(), policy), exact, atol=1e-14)


def test_a_reference_far_away_does_not_overflow() -> None:
    """The log-ratio is bounded before exp: after it a value can be bounded, and its gradient is not a number."""
    logp = torch.full((3,), -101.0, requires_grad=True)
    for kind in ("k2", "k3"):
        found = kl_terms(logp, torch.tensor([-1.0, -101.0, -250.0]), kind, torch.ones(3)).sum()
        (slope,) = torch.autograd.grad(found, logp)
        assert torch.isfinite(found)
        assert torch.isfinite(slope).all()
    assert FAR < 80  # exp of it is a float32


def test_dual_clip_bounds_bad_answers() -> None:
    ratio, advantages = torch.tensor([10.0, 10.0, 0.5]), torch.tensor([-1.0, 1.0, -1.0])
    plain, _ = clipped(ratio, advantages, 0.2, 0.2)
    bounded, _ = clipped(ratio, advantages, 0.2, 0.2, 3.0)
    assert plain.tolist() == [10.0, -1.2000000476837158, 0.800000011920929]
    assert bounded.tolist() == [3.0, -1.2000000476837158, 0.800000011920929]
