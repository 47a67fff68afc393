"""Losses and gradients of objectives over judged answers are TRL's, whose batches are padded and whose prompts are
computed for each answer (tools/golden.py made the numbers)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kit import golden
from torch import Tensor

from weft.api import Adapters
from weft.core.head import supervised
from weft.data import Sample
from weft.heads.reward import RewardHead, RewardTask
from weft.methods import METHODS
from weft.models import describe
from weft.objectives.answers import AnswerObjective, Answers
from weft.objectives.dpo import DPO
from weft.objectives.orpo import log_odds
from weft.objectives.passes import Work, forward_losses
from weft.objectives.ppo import PPO, Value
from weft.objectives.registry import make_objective
from weft.objectives.simpo import SimPO
from weft.training import Job, JobConfig
from weft.training.judged import judging_of
from weft.training.rolled import Rolled

KNOWN = json.loads((Path(__file__).parent / "golden.json").read_text())
# TRL's logits are float32, whatever the model is.
_LOSS, _GRADIENT = 1e-6, 3e-6


def record(prompt: str, answers: list[str], *, margin: float = 0.0, label: int | None = None) -> Sample:
    ids, weights, branches = golden.ids(prompt), [0.0] * len(golden.ids(prompt)), []
    for answer in answers:
        branches.append(len(ids))
        own = [*golden.ids(answer), 1]
        ids, weights = [*ids, *own], [*weights, *[1.0] * len(own)]
    return Sample(ids, weights, "x", answer=branches[0], branches=tuple(branches), given=margin, label=label)


def pairs() -> list[Sample]:
    rows = zip(golden.PROMPTS, golden.CHOSEN, golden.REJECTED, golden.MARGINS, strict=True)
    return [record(prompt, [good, bad], margin=margin) for prompt, good, bad, margin in rows]


def found(objective: str, settings: dict[str, Any], samples: list[Sample]) -> dict[str, Any]:
    """The loss, and the digest of the gradients, of a policy that trains every weight over a base as its reference."""
    scores = objective in ("reward", "regression")
    base, policy = golden.model(2), golden.model(1, scores=scores)
    adapters = Adapters(base, describe(base))
    adapter = adapters.add("policy", METHODS["full"](), head=RewardTask() if scores else None)
    own, before = dict(policy.named_parameters()), dict(base.named_parameters())
    changes = {key.removeprefix("base_model.model.").removesuffix("_delta"): p for key, p in adapter.tensors().items()}
    with torch.no_grad():
        for name, change in changes.items():
            if name in own:
                change.copy_(own[name] - before[name])
        if isinstance(adapter.head, RewardHead):
            adapter.head.weight.copy_(own["score.weight"])
            changes["score.weight"] = adapter.head.weight
    config = JobConfig(name="policy", method="full", objective=objective, objective_settings=settings, batch_size=3)
    job = Job(config, adapter, samples, shares_rows=True)
    (loss,) = forward_losses(adapters, [Work("policy", samples, judging=judging_of(adapters, job, [samples]))])
    loss.backward()
    gradients = {name: p.grad for name, p in changes.items() if p.grad is not None}
    return {"loss": float(loss.detach()), "gradients": golden.digest(gradients)}


def compare(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=_LOSS, abs=_LOSS), name
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    largest = max(norm for norm, _ in theirs["gradients"].values())
    for key, values in theirs["gradients"].items():
        assert ours["gradients"][key] == pytest.approx(values, abs=_GRADIENT * largest), (name, key)
    assert largest > 1e-4


@pytest.mark.parametrize("case", list(golden.DPO))
def test_dpo(case: str) -> None:
    compare(case, found("dpo", golden.DPO[case][1], pairs()), KNOWN["dpo"][case])


def test_kto() -> None:
    rows = zip(golden.PROMPTS, golden.CHOSEN, golden.VERDICTS, strict=True)
    samples = [record(prompt, [answer], label=int(good)) for prompt, answer, good in rows]
    compare("kto", found("kto", {"desirable_weight": 1.3}, samples), KNOWN["kto"])


def test_reward() -> None:
    compare("reward", found("reward", {"center_rewards_coefficient": 0.01}, pairs()), KNOWN["reward"])


def test_regression() -> None:
    """As transformers' model with one label learns numbers, record by record."""
    rows = zip(golden.PROMPTS, golden.CHOSEN, golden.MARGINS, strict=True)
    samples = [record(prompt, [answer], margin=3 * score - 1) for prompt, answer, score in rows]
    policy = golden.model(1, scores=True)
    loss = torch.zeros(())
    for sample in samples:
        wanted = torch.tensor([(sample.given - 0.5) / 2])
        loss = loss + policy(torch.tensor([sample.input_ids]), labels=wanted).loss / len(samples)
    loss.backward()
    gradients = golden.digest({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    theirs = {"loss": float(loss.detach()), "gradients": gradients}
    compare("regression", found("regression", {"mean": 0.5, "scale": 2.0}, samples), theirs)


def group(old: bool = True) -> Rolled:
    """The golden answers to one prompt, as the policy of another day wrote them."""
    whole = record(golden.GROUP_PROMPT, golden.GROUP)
    base = golden.model(1)
    advantages, logps = [], []
    for number, one in enumerate(whole.each):
        begin = whole.branches[0]
        with torch.no_grad():
            found = base(torch.tensor([one.input_ids])).logits[0].log_softmax(-1)
        own = one.input_ids[begin:]
        logps += [float(found[begin - 1 + t, token]) + golden.offset(number, t) for t, token in enumerate(own)]
        advantages += [golden.ADVANTAGES[number]] * len(own)
    return Rolled(
        whole.input_ids, whole.weights, whole.source, branches=whole.branches, advantages=tuple(advantages),
        old=tuple(logps) if old else (),
    )  # fmt: skip


@pytest.mark.parametrize("case", [*golden.GRPO, "rloo"])
def test_rollouts(case: str) -> None:
    settings = {"rewards": ["regex"], "max_completion_length": golden.LONGEST}
    name, own = ("rloo", {"beta": 0.0}) if case == "rloo" else ("grpo", golden.GRPO[case][1])
    compare(case, found(name, settings | own, [group()]), KNOWN["rollouts"][case])


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_at_the_first_update_every_ratio_is_1(name: str) -> None:
    """Then the loss is minus the mean advantage, to the last bit, and nothing is clipped."""
    objective = make_objective(name, {"rewards": ["regex"], **({"loss_type": "grpo"} if name == "grpo" else {})})
    assert isinstance(objective, AnswerObjective)
    logp = torch.randn(5, dtype=torch.float64, requires_grad=True)
    tokens = supervised([0] * 5, [0] * 5, [1.0] * 5, owner=[0, 0, 0, 1, 1], count=2, device=logp.device)
    advantages = torch.tensor([0.75] * 3 + [-0.25] * 2, dtype=torch.float64)
    terms = objective.terms(Answers(logp, tokens, [2], reference=logp.detach(), advantages=advantages))
    assert float(terms.losses["policy"].detach()) == -0.5
    assert terms.metrics["clip_ratio"][0] == 0.0 == terms.metrics["kl"][0]


@pytest.mark.parametrize("case", ["plain", "whitened rewards"])
def test_ppo(case: str) -> None:
    """Advantages, returns, both losses and their gradients, of answers without pads, are those of trl 0.11.4."""
    known = json.loads((Path(__file__).parent / "golden_ppo.json").read_text())[case]
    given = golden.ppo_case(whole=case != "plain")
    real, lengths = given["mask"].bool(), given["mask"].sum(1).int().tolist()
    values = given["values"][real].split(lengths)
    kl = (given["old"] - given["reference"])[real].split(lengths)
    own = PPO(rewards=("regex",), kl_coef=0.2, gamma=0.98, lam=0.95, whiten_rewards=case != "plain")
    credit = own.credit(given["scores"][:, None], list(kl), list(values))
    assert torch.cat(credit.advantages).tolist() == pytest.approx(known["advantages"], abs=1e-9)
    assert credit.returns is not None
    assert torch.cat(credit.returns).tolist() == pytest.approx(known["returns"], abs=1e-9)
    owner = [number for number, length in enumerate(lengths) for _ in range(length)]
    count = len(owner)
    tokens = supervised([0] * count, [0] * count, [1.0] * count, owner=owner, count=4, device=real.device)
    logp, predicted = (given[key][real].requires_grad_() for key in ("logp", "predicted"))
    policy = own.terms(
        Answers(logp, tokens, [1] * 4, old=given["old"][real], advantages=torch.cat(credit.advantages))
    ).losses["policy"] / count
    value = Value(of="x").terms(
        Answers(predicted, tokens, [1] * 4, scores=predicted, values=given["values"][real],
                returns=torch.cat(credit.returns))
    ).losses["value"] / count  # fmt: skip
    (policy + value).backward()
    assert float(policy.detach()) == pytest.approx(known["policy"], abs=1e-9)
    assert float(value.detach()) == pytest.approx(known["value"], abs=1e-9)
    assert logp.grad is not None
    assert predicted.grad is not None
    assert logp.grad.tolist() == pytest.approx(known["d_logp"], abs=1e-9)
    assert predicted.grad.tolist() == pytest.approx(known["d_value"], abs=1e-9)


@pytest.mark.parametrize("name", ["orpo", "simpo"])
def test_losses_of_pairs(name: str) -> None:
    known = KNOWN["odds"]
    good, bad = (torch.tensor(known[k], dtype=torch.float64, requires_grad=True) for k in ("chosen", "rejected"))
    losses: Tensor
    if name == "orpo":
        losses = -0.1 * torch.nn.functional.logsigmoid(log_odds(good) - log_odds(bad))
    else:
        losses = SimPO(beta=2.0, simpo_gamma=0.5).losses(good, bad)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx(known[name]["losses"], rel=1e-6)
    assert good.grad is not None
    assert bad.grad is not None
    assert good.grad.tolist() == pytest.approx(known[name]["d_chosen"], rel=1e-6)
    assert bad.grad.tolist() == pytest.approx(known[name]["d_rejected"], rel=1e-6)


def test_odds_lose_no_digits() -> None:
    """Near 0 and far from it, in float32 against float64; and a probability that rounds to 1."""
    logp = torch.tensor([-1e-6, -1e-3, -0.5, -0.7, -5.0, -50.0], dtype=torch.float64)
    assert log_odds(logp.float()).tolist() == pytest.approx(log_odds(logp).tolist(), rel=1e-5)
    sure = torch.zeros(1, requires_grad=True)
    log_odds(sure).sum().backward()
    assert torch.isfinite(log_odds(sure)).all()
    assert sure.grad is not None
    assert torch.isfinite(sure.grad).all()


def test_cautious_dpo_lies_between_both_verdicts() -> None:
    """With label smoothing e the loss is (1 - e) of the one and e of the other."""
    good, bad = torch.tensor([0.3, -2.0]), torch.tensor([-1.0, 0.5])
    plain, turned = DPO().losses(good, bad), DPO().losses(bad, good)
    assert torch.allclose(DPO(label_smoothing=0.2).losses(good, bad), 0.8 * plain + 0.2 * turned)


@pytest.mark.slow
def test_the_numbers_are_still_those_of_trl() -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed: pip install 'trl>=1.16,<1.17'")
    tool = Path(__file__).parents[2] / "tools" / "golden.py"
    done = subprocess.run([sys.executable, str(tool), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
