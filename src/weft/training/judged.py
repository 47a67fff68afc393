"""Jobs that learn from judged answers: what a step of them must know before its passes, and their evaluation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from weft.core.adapter import Adapter
from weft.core.adapters import Adapters
from weft.data import Sample
from weft.data.rendering.judged import mismatched
from weft.errors import UserError
from weft.models import Base
from weft.objectives.judging import Judging, denominators_of, reference_logps
from weft.objectives.passes import EVALUATION_TOKENS, Evaluation, Work, forward_losses, passes
from weft.objectives.rollouts import RolloutObjective
from weft.training.job import Job
from weft.training.rollouts import settings_of
from weft.training.settings import JobConfig

_WRITES = "causal_lm"
# By this share the chosen answers' log-probability may fall before somebody is told.
_FALL = 0.05


def check_judged(config: JobConfig) -> None:
    """Refuse an objective that is not there, and settings beside it that it cannot have.

    Raises:
        UserError: It is not there, has no such setting, or its steps would have too few records.
    """
    config.own_objective()
    judged = config.judged
    if judged is None:
        return
    if config.neftune_noise_alpha:
        raise UserError(
            f"job '{config.name}': neftune_noise_alpha is for the likelihood; objective {config.objective} compares "
            "log-probabilities, which are those of evaluation. Leave it out."
        )
    if config.task != _WRITES:
        raise UserError(f"job '{config.name}': objective {config.objective} is for task: {_WRITES}, not {config.task}.")
    if isinstance(judged, RolloutObjective):
        settings_of(judged)
    records = config.batch_size * config.gradient_accumulation_steps
    if config.batch_tokens is None and records < judged.least_records:
        raise UserError(
            f"job '{config.name}': objective {config.objective} needs {judged.least_records} records a step or more, "
            f"for it compares a record with others; batch_size x gradient_accumulation_steps is {records}."
        )


def add_reference(
    adapters: Adapters, config: JobConfig, adapter: Adapter, base: Base, *, fresh: bool = True
) -> Adapter | None:
    """What the job's objective compares ``adapter`` with: a frozen copy of it as it is now, which ``adapters`` has
    too; None: the base, or nothing.

    No copy is needed where a ``fresh`` adapter is the base by its method's promise.
    """
    judged = config.judged
    if judged is None or not judged.uses_reference or config.reference == "base":
        return None
    if fresh and adapter.begins_as_identity:
        return None
    name = f"{config.name}.reference"
    copy = adapters.add(name, config.method_on(base), seed=config.seed, tokenizer=base.tokenizer)
    with torch.no_grad():
        for own, theirs in zip(
            itertools.chain(copy.parameters(), copy.buffers()),
            itertools.chain(adapter.parameters(), adapter.buffers()),
            strict=True,
        ):
            own.copy_(theirs)
    return copy.requires_grad_(False)


def _name(adapter: Adapter | None) -> str | None:
    return None if adapter is None else adapter.name


def judging_of(
    adapters: Adapters, job: Job, micros: Sequence[Sequence[Sample]], ordered: Sequence[Sample] = ()
) -> Judging:
    """How the records of a job's step are judged: all that depends on the whole step.

    ``ordered`` are all its records, in an order that does not depend on how they are packed; default: as in ``micros``.
    """
    assert job.judged is not None
    samples = [sample for micro in micros for sample in micro]
    point = reference_point(adapters, job, ordered or samples) if job.judged.mismatches else 0.0
    return Judging(job.judged, denominators_of(job.judged, samples), reference=_name(job.reference), point=point)


@torch.no_grad()
def reference_point(adapters: Adapters, job: Job, samples: Sequence[Sample]) -> float:
    """KTO's estimate of how far the policy is from its reference: the mean of log policy / reference over the records,
    each with the answer of the one before it."""
    if len(samples) == 1:  # its own answer would be no mismatch
        samples = [samples[0], next((one for one in job.samples if one != samples[0]), samples[0])]
    limit = adapters.architecture.max_length
    others = mismatched(samples, None if limit is None else limit - job.adapter.num_learned_tokens)
    total = 0.0
    for part in passes(others, max(EVALUATION_TOKENS, job.batches.capacity)):
        policy, reference = (reference_logps(adapters, [name], [part])[0] for name in (job.name, _name(job.reference)))
        total += float((policy - reference).sum())
    return total / max(len(others), 1)


@torch.no_grad()
def evaluate_judged(
    adapters: Adapters,
    job: Job,
    samples: Sequence[Sample],
    max_tokens: int = EVALUATION_TOKENS,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """The mean loss over judged records, and the means of all figures to watch; the accuracy has a standard error.

    None if ``should_stop``, asked before every pass, said yes.
    """
    assert job.judged is not None
    judging = judging_of(adapters, job, [list(one) for one in passes(samples, max_tokens)])
    loss = 0.0
    for records in passes(samples, max_tokens):
        if should_stop():
            return None
        loss += float(forward_losses(adapters, [Work(job.name, records, judging=judging)])[0])
    metrics, watched = judging.tally.means(), job.judged.watched
    if watched in metrics:
        count = judging.tally.count(watched)
        metrics["accuracy_stderr"] = math.sqrt(metrics[watched] * (1 - metrics[watched]) / count)
    return Evaluation(loss, metrics)


def falling(job: Job, metrics: Mapping[str, float]) -> str:
    """A warning, once, if an evaluation finds the chosen answers less likely than the first one did; else ""."""
    found = [value for key, value in metrics.items() if key.endswith("logps/chosen")]  # of named sets the first
    now, progress = found[0] if found else None, job.progress
    if now is None or job.judged is None or not job.judged.watches_chosen:
        return ""
    first = progress.first_chosen
    if first is None:
        progress.first_chosen = now
    if first is None or progress.told_falling or first - now <= _FALL * abs(first):
        return ""
    progress.told_falling = True
    return (
        f"the log-probability of the chosen answers has fallen from {first:.1f} to {now:.1f}: both answers become less "
        "likely while the margin grows. objective_settings: {sft_weight: 0.1} holds the chosen ones up; so do a lower "
        "learning_rate and a higher beta"
    )
