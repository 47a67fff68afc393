"""Rollouts: the jobs' prompts are answered by their own adapters, all in one batch, and the answers are rewarded.

Randomness has no state: what an answer draws is fixed by the job's seed, the step, the prompt's place in it and the
answer's number. So a run that goes on writes what the unbroken one would have written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import weft.adapters
from weft.core.adapters import Adapters
from weft.data import Sample
from weft.data.pack import pack
from weft.errors import UserError
from weft.files.adapter_folder import labels_of, trained_on
from weft.files.whole import make_folder, write_text
from weft.foreign import parse_json
from weft.heads.reward import SCORE
from weft.models import Base
from weft.objectives.judging import expected_values, part_of, reference_logps
from weft.objectives.passes import EVALUATION_TOKENS, Evaluation, logits_of, passes
from weft.objectives.ppo import Value
from weft.objectives.rollouts import RolloutObjective
from weft.ops.seeds import stable_seed
from weft.rewards import Rewarder, RewardSettings
from weft.training.batches import rows_of
from weft.training.job import Job
from weft.training.rolled import Ask, Rolled, Write, Written
from weft.training.same_run import other_base
from weft.training.start import check_trained_on

# A job whose rewards all failed in so many steps in a row ends.
_GIVE_UP = 3
# What rewards are given besides the fields of records; a field of such a name has another meaning, and is left out.
_OURS = {"prompts", "completions", "prompt_ids", "completion_ids"}


@dataclass
class Roller:
    """Writes and rewards the answers of one job.

    ``tell`` hears of rewards that failed; ``folder``: where every answer is kept with its reward; None: nowhere.
    ``values``: the job beside it that learns what to expect, if there is one.
    """

    job: Job
    rewarder: Rewarder
    decode: Callable[[Sequence[int]], str]
    _: KW_ONLY
    tell: Callable[[str], None] = lambda text: None
    folder: Path | None = None
    failed: int = 0
    values: Job | None = None

    @property
    def objective(self) -> RolloutObjective:
        """The job's objective."""
        assert isinstance(self.job.judged, RolloutObjective)
        return self.job.judged

    def due(self) -> bool:
        """Whether the coming step needs new answers."""
        rolled, step = self.job.rolled, self.job.progress.step
        return rolled.written_at is None or step >= rolled.written_at + self.objective.num_iterations

    def asks(self, prompts: Sequence[Sample], *, greedy: bool = False) -> list[Ask]:
        """What to write for these prompts: ``num_generations`` answers each, or one that is the likeliest."""
        own, seed, step = self.objective, self.job.config.seed, self.job.progress.step
        return [
            Ask(
                self.job.name,
                prompt.input_ids,
                slots=prompt.slots,
                max_new_tokens=own.max_completion_length,
                temperature=0.0 if greedy else own.temperature,
                top_p=1.0 if greedy else own.top_p,
                top_k=0 if greedy else own.top_k,
                seed=stable_seed(seed, "rollout", step, place, number) >> 1,
            )
            for place, prompt in enumerate(prompts)
            for number in range(1 if greedy else own.num_generations)
        ]

    def rewards(self, prompts: Sequence[Sample], written: Sequence[Written]) -> list[dict[str, Any]]:
        """A row for each answer: its prompt, text, and every reward. ``prompts`` has an entry for each answer too."""
        facts = [parse_json(prompt.facts or "{}", prompt.source) for prompt in prompts]
        names = {key for fact in facts for key in fact} - _OURS
        columns = {name: [fact.get(name) for fact in facts] for name in sorted(names)}
        texts = [self.decode(prompt.input_ids) for prompt in prompts]
        columns |= {
            "prompt_ids": [list(prompt.input_ids) for prompt in prompts],
            "completion_ids": [list(one.ids) for one in written],
        }
        found = self.rewarder(texts, [one.text for one in written], **columns)
        for name, why in found.failures.items():
            self.tell(f"the reward {name} has no say at step {self.job.progress.step}: {why}")
        return [
            {
                "source": prompt.source,
                "prompt": text,
                "completion": one.text,
                "tokens": len(one.ids),
                "ended": one.ended,
                "reward": found.totals[index],
                "rewards": {name: values[index] for name, values in found.parts.items()},
            }
            for index, (prompt, text, one) in enumerate(zip(prompts, texts, written, strict=True))
        ]

    def take(self, adapters: Adapters, prompts: Sequence[Sample], written: Sequence[Written]) -> None:
        """Reward the answers, find how much better each was than expected, and give them to the job."""
        own, count, job = self.objective, self.objective.num_generations, self.job
        rows = self.rewards([prompt for prompt in prompts for _ in range(count)], written)
        groups = [group_of(p, written[place * count : (place + 1) * count]) for place, p in enumerate(prompts)]
        reward = [float("nan") if row["reward"] is None else row["reward"] for row in rows]
        rewards = torch.tensor(reward, dtype=torch.float64).view(len(prompts), count)
        kl, values = self._kl(adapters, groups, written), self._values(adapters, groups)
        coefficient = self._kl_coef()
        credit = own.credit(rewards, kl, values, coefficient)
        distances = torch.stack([one.sum() for one in kl])
        for row, advantage, distance in zip(rows, credit.advantages, distances.tolist(), strict=True):
            row |= {"advantage": float(advantage.mean()), "kl": distance}
        if coefficient is not None:
            job.progress.kl_coef = own.next_kl_coef(coefficient, distances)
        counted = [
            row["reward"] is not None and (row["ended"] or not own.mask_truncated_completions) for row in rows
        ]
        self._keep(rows)
        figures = figures_of(rows, rewards) | ({} if coefficient is None else {"kl_coef": coefficient})
        told = {"advantages": credit.advantages, "old": [torch.tensor(one.logprobs) for one in written]}
        if own.num_iterations == 1:
            del told["old"]
        job.rolled.put(job.progress.step, self._packed(adapters, credited(groups, counted, told)), figures)
        if self.values is not None and credit.returns is not None:
            learned = credited(groups, counted, {"values": values, "returns": credit.returns})
            self.values.rolled.put(job.progress.step, self._packed(adapters, learned), {})
        self.failed = self.failed + 1 if bool(rewards.isnan().all()) else 0
        if self.failed >= _GIVE_UP:
            job.fail(f"no reward had a say in {_GIVE_UP} steps in a row")

    def _kl_coef(self) -> float | None:
        """What the KL counts now, if that changes as the job goes on."""
        first = getattr(self.objective, "kl_coef", None)
        return first if self.job.progress.kl_coef is None else self.job.progress.kl_coef

    def _kl(self, adapters: Adapters, groups: Sequence[Rolled], written: Sequence[Written]) -> list[Tensor]:
        """log policy / reference of each answer's tokens [n], as it was written."""
        name = None if self.job.reference is None else self.job.reference.name
        soft = [self.objective.softness]
        found = _by_answer(groups, lambda part: reference_logps(adapters, [name], [part], soft)[0])
        return [torch.tensor(w.logprobs, dtype=torch.float64) - one for w, one in zip(written, found, strict=True)]

    def _values(self, adapters: Adapters, groups: Sequence[Rolled]) -> list[Tensor]:
        """What was expected before each answer's tokens [n]; nothing without a value function."""
        if self.values is None:
            return []
        name = self.values.name
        return _by_answer(groups, lambda part: expected_values(adapters, name, part))

    def _packed(self, adapters: Adapters, rolled: Sequence[Rolled]) -> list[list[Rolled]]:
        """The passes of the step."""
        job = self.job
        apart = not adapters.layout.can_share(part_of(job.name, []))
        sizes = [rows_of(one, job.adapter.num_virtual_tokens, apart=apart) for one in rolled]
        return packed(rolled, sizes, job.config.pack_tokens)

    def _keep(self, rows: Sequence[dict[str, Any]]) -> None:
        if self.folder is not None:
            make_folder(self.folder)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(self.folder / f"step-{self.job.progress.step + 1:08d}.jsonl", lines)

    def evaluate(self, write: Write, prompts: Sequence[Sample]) -> Evaluation:
        """The mean reward of the likeliest answers; the loss is the same with its sign turned."""
        means = mean_rewards(self.rewards(prompts, write(self.asks(prompts, greedy=True))))
        return Evaluation(-means.get("reward", float("nan")), means)


def end_values(rollers: Iterable[Roller]) -> None:
    """End the jobs that learn what to expect of a policy that has ended."""
    for roller in rollers:
        if roller.values is not None and roller.values.active and not roller.job.active:
            if roller.job.progress.ended == "failed":
                roller.values.fail(f"job '{roller.job.name}', whose values it learns, has failed")
            else:
                roller.values.progress.ended = "finished"


def roll_out(adapters: Adapters, rollers: Sequence[Roller], write: Write) -> None:
    """Write the answers that the coming step of these jobs needs, all in one batch."""
    due = [roller for roller in rollers if roller.due()]
    prompts = [[prompt for micro in roller.job.prompts() for prompt in micro] for roller in due]
    asks = [roller.asks(own) for roller, own in zip(due, prompts, strict=True)]
    written = write([ask for own in asks for ask in own]) if due else []
    at = 0
    for roller, own, asked in zip(due, prompts, asks, strict=True):
        roller.take(adapters, own, written[at : at + len(asked)])
        at += len(asked)


def packed(rolled: Sequence[Rolled], sizes: Sequence[int], pack_tokens: int | None) -> list[list[Rolled]]:
    """Prompts with their answers in passes of so many rows; ``sizes`` are the rows of each."""
    most = max(pack_tokens or EVALUATION_TOKENS, max(sizes))
    return [[rolled[i] for i in sorted(one)] for one in pack(sizes, most)]


def group_of(prompt: Sample, answers: Sequence[Written]) -> Rolled:
    """A prompt with its answers, all of whose tokens are learned."""
    ids, weights = list(prompt.input_ids), [0.0] * len(prompt.input_ids)
    branches: list[int] = []
    for answer in answers:
        branches.append(len(ids))
        ids += answer.ids
        weights += [1.0] * len(answer.ids)
    return Rolled(
        ids, weights, prompt.source, slots=prompt.slots, answer=len(prompt.input_ids), branches=tuple(branches)
    )


def credited(groups: Sequence[Rolled], counted: Sequence[bool], told: Mapping[str, Sequence[Tensor]]) -> list[Rolled]:
    """The groups with what is ``told`` of each answer's tokens [n]; of answers that do not count nothing is learned."""
    found, at = [], 0
    for group in groups:
        ends, weights = (*group.branches[1:], len(group.input_ids)), list(group.weights)
        learned = [at + number for number in range(len(ends)) if counted[at + number]]
        for number, (begin, end) in enumerate(zip(group.branches, ends, strict=True)):
            if not counted[at + number]:
                weights[begin:end] = [0.0] * (end - begin)
        facts = {name: tuple(float(v) for i in learned for v in values[i]) for name, values in told.items()}
        found.append(replace(group, weights=weights, **facts))  # type: ignore[arg-type]
        at += len(ends)
    return found


def _by_answer(groups: Sequence[Rolled], ask: Callable[[Sequence[Rolled]], Tensor]) -> list[Tensor]:
    """What ``ask`` tells of the groups' learned tokens, in passes, for each answer its own [n], in float64."""
    found: list[Tensor] = []
    for part in passes(list(groups), EVALUATION_TOKENS):
        sizes = [sum(map(bool, one.weights)) for group in part for one in group.each]
        found += [one.double().cpu() for one in ask(part).split(sizes)]
    return found


def figures_of(rows: Sequence[dict[str, Any]], rewards: Tensor) -> dict[str, float]:
    """What there is to watch of a step's answers with these rewards [P, K]."""
    known = rewards[~rewards.isnan()]
    several = {"reward_std": float(known.std())} if len(known) > 1 else {}
    if rewards.shape[1] > 1:
        alike = [len(set(group[~group.isnan()].tolist())) < 2 for group in rewards]
        several["frac_reward_zero_std"] = sum(alike) / len(alike)
    return mean_rewards(rows) | several | {
        "truncated": sum(not row["ended"] for row in rows) / len(rows),
        "kl_of_answers": sum(row["kl"] for row in rows) / len(rows),
    }


def mean_rewards(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of all rewards together and of each, over the answers for which it had a say, and of the lengths."""
    found: dict[str, list[float]] = {"completion_length": [row["tokens"] for row in rows]}
    for row in rows:
        for name, value in {"reward": row["reward"], **{f"rewards/{k}": v for k, v in row["rewards"].items()}}.items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def settings_of(objective: RolloutObjective) -> list[RewardSettings]:
    """The rewards that an objective names.

    Raises:
        UserError: One is none.
    """
    found = [RewardSettings.of(one) for one in objective.rewards]
    for one in found:
        if one.adapter is None:
            one.function()
    if not any(one.weight for one in found):
        raise UserError("rewards: every weight is 0, so there is nothing to learn.")
    return found


def check_reward_adapters(objective: RolloutObjective, sketch: Base, *, unknown: bool) -> None:
    """Refuse adapters that cannot give an objective's rewards, before weights are loaded (``check_trained_on``).

    Raises:
        UserError: One is no adapter, is one of another base, or gives no score.
    """
    for folder in (one.adapter for one in settings_of(objective) if one.adapter is not None):
        check_trained_on("rewards", folder, sketch, unknown=unknown)
        if labels_of(Path(folder)) != SCORE:
            raise UserError(_no_score(folder))


def _no_score(folder: str) -> str:
    return f"rewards: {folder} gives no score; a reward adapter comes of objective: reward."


def rollers_of(jobs: Sequence[Job], adapters: weft.adapters.Adapters, base: Base) -> list[Roller]:
    """What writes and rewards the jobs' answers. Raises UserError as ``roller_of``."""
    found = [roller_of(job, adapters, base) for job in jobs if isinstance(job.judged, RolloutObjective)]
    for roller in found:
        beside = [job for job in jobs if isinstance(job.judged, Value) and job.judged.of == roller.job.name]
        roller.values = beside[0] if beside else None
    return found


def roller_of(job: Job, adapters: weft.adapters.Adapters, base: Base) -> Roller:
    """What writes and rewards a job's answers. The adapters that give rewards join those of the jobs.

    Raises:
        UserError: A reward is none, or an adapter that is to give one is of another base or gives no score.
    """
    assert isinstance(job.judged, RolloutObjective)
    settings, scorers = settings_of(job.judged), {}
    for number, one in enumerate(one for one in settings if one.adapter is not None):
        folder = str(one.adapter)
        if (difference := other_base(base, trained_on(Path(folder)) or {})) is not None:
            raise UserError(f"rewards: {folder} was trained on another base ({difference}).")
        name = f"{job.name}.reward{number + 1}"
        adapter = adapters.load(name, folder, tokenizer=base.tokenizer).requires_grad_(False)
        if adapter.head.labels != SCORE:
            raise UserError(_no_score(folder))
        scorers[folder] = scorer(adapters, name)

    def decode(ids: Sequence[int]) -> str:
        return str(base.tokenizer.decode(list(ids)))

    return Roller(job, Rewarder(settings, scorers), decode)


def scorer(adapters: Adapters, name: str) -> Callable[..., list[float]]:
    """The reward that the adapter ``name`` gives: its score at the last token of each answer."""

    def score(
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        prompt_ids: Sequence[list[int]],
        completion_ids: Sequence[list[int]],
        **columns: object,
    ) -> list[float]:
        whole = [[*prompt, *answer] for prompt, answer in zip(prompt_ids, completion_ids, strict=True)]
        samples = [Sample(ids, [0.0] * len(ids), "an answer") for ids in whole]
        found: list[float] = []
        for part in passes(samples, EVALUATION_TOKENS):
            found += logits_of(adapters, name, part)[:, 0].tolist()
        return found

    return torch.no_grad()(score)
