"""A job: one adapter with its own data, optimizer, schedule and seed. It knows nothing of the jobs beside it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter
from weft.data import Mixture, Sample
from weft.errors import UserError
from weft.files.tensors import digest
from weft.objectives import AnswerObjective
from weft.ops.seeds import stable_seed
from weft.training.batches import Batches
from weft.training.fingerprint import data_fingerprint
from weft.training.optim import (
    decays,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from weft.training.optimizers import tensor_bytes
from weft.training.progress import Progress
from weft.training.rolled import RolledBatches
from weft.training.settings import JobConfig
from weft.training.updates import LayerwiseUpdates, Updates

# A forward pass that overflows does so at any scale of the loss; after so many steps in a row nothing will help.
_GIVE_UP = 50
# So many numbers of a larger tensor stand for all of it when we ask whether a job has changed it.
_WITNESSES = 2**20


class Job:
    """One adapter in training.

    Randomness has no state: the order of epoch ``e`` and the dropout of step ``s`` come from seeds made of the job's
    seed and these numbers, so that a resumed job draws what the unbroken one draws.
    """

    def __init__(
        self,
        config: JobConfig,
        adapter: Adapter,
        samples: Sequence[Sample],
        eval_samples: Sequence[Sample] = (),
        mixture: Mixture | None = None,
        *,
        eval_sizes: Mapping[str, int] = MappingProxyType({}),
        reference: Adapter | None = None,
        shares_rows: bool = False,
    ) -> None:
        """``eval_sizes``: how many of the ``eval_samples`` each named set has, in order; without names none.

        ``reference`` is the adapter (None: the base) that judged answers are compared with. ``shares_rows``: the layout
        lets answers to one prompt have its rows in common.
        """
        self.config, self.adapter, self.eval_sizes, self.reference = config, adapter, eval_sizes, reference
        self.samples, self.eval_samples = samples, eval_samples
        self.name = config.name
        named_objective = config.own_objective()
        self.judged = named_objective if isinstance(named_objective, AnswerObjective) else None
        self.objective = None if isinstance(named_objective, AnswerObjective) else named_objective
        self.figures: dict[str, float] = {}  # what there was to watch in the last step, beside the loss
        apart = self.judged is not None and not shares_rows
        self.batches = Batches(
            config, samples, virtual=adapter.num_virtual_tokens, mixture=mixture, apart=apart
        )
        self.total_steps = self.batches.total_steps
        self.warmup = config.warmup_steps or int(config.warmup_ratio * self.total_steps)
        named = {n: p for n, p in adapter.named_parameters() if p.requires_grad}
        self.rate = config.learning_rate or self._default_rate("")
        config.schedule.check(self.rate)
        self.parameters: list[nn.Parameter] = list(named.values())
        # A resumed job has the same ones, by its seed: the checkpoint's values are put back after this.
        self._began = {n: self._witness(p) for n, p in named.items()}
        self._pulled = [decays(adapter, n) for n in named]
        self.progress = Progress(rates=self._rates(self._default_rate))
        self.optimizer = self._make_optimizer()
        if not named:
            self.progress.ended = "finished"  # a hard prompt has nothing to train, and is there to be compared
        adapter.begin_training(self.total_steps)
        self.best: list[Tensor] | None = None
        self.rolled = RolledBatches()
        self.rungs: frozenset[int] = frozenset()  # steps at which it is evaluated besides
        self._scales = False

    def _rates(self, default: Callable[[str], float]) -> list[float]:
        """The learning rate of each parameter; of those without one in the configuration the ``default`` by name."""
        given, scaled = self.config.learning_rate, self.adapter.scaled_learning_rate
        return [scaled(name, given or default(name)) for name in self._began]

    def _make_optimizer(self) -> torch.optim.Optimizer | None:
        if not self.parameters:
            return None
        made = make_optimizer(self.config, self.parameters, self.progress.rates, self._pulled)
        self.updates: Updates = (
            LayerwiseUpdates(self.adapter, self.parameters, made)
            if self.config.layerwise_updates
            else Updates(self.parameters, made, self.config.max_grad_norm)
        )
        return made

    def _default_rate(self, parameter: str) -> float:
        share = 1.0 if self.judged is None else self.judged.rate_share
        return share * self.adapter.default_learning_rate(parameter, self.adapter.head.writes)

    def _earlier_rate(self, parameter: str) -> float:
        """The default of earlier versions, where a head and a method learned at one rate for every task."""
        parts = self.adapter.parts
        part = parts[int(parameter.split(".")[1])] if parameter.startswith("part_modules.") else parts[0]
        return part.config.learning_rate(self.adapter.hidden_size)

    def _witness(self, tensor: Tensor) -> str:
        """A digest that shows whether a tensor [...] has changed: of all its numbers, or of an even choice of them."""
        stride = max(1, tensor.numel() // _WITNESSES)
        return digest(tensor.detach().reshape(-1)[::stride])

    @property
    def eval_sets(self) -> dict[str, Sequence[Sample]]:
        """The samples to evaluate on by the name of their set; those of a job without names have the name ""."""
        ends = itertools.accumulate(self.eval_sizes.values())
        named = zip(self.eval_sizes.items(), ends, strict=True)
        return {name: self.eval_samples[end - size : end] for (name, size), end in named} or {"": self.eval_samples}

    @property
    def watched(self) -> str | None:
        """The name of the set whose loss decides about a gain; None: there are several, and none is chosen."""
        names = list(self.eval_sizes) or [""]
        return self.config.early_stopping_on or (names[0] if len(names) == 1 else None)

    @property
    def active(self) -> bool:
        """Whether there is still something to train."""
        return self.progress.ended is None

    @property
    def epoch(self) -> float:
        """How often the data has been seen."""
        epoch, within = self.batches.locate(self.progress.step // self.config.iterations)
        return epoch + within / self.batches.steps_in(epoch)

    def micro_batches(self) -> list[list[Sample]]:
        """The samples of the coming optimizer step, one list per forward pass."""
        return self.rolled.micro_batches(self.progress.step) if self.rolls else self.prompts()

    @property
    def rolls(self) -> bool:
        """Whether it learns from answers of its own, which are written before each step."""
        return self.config.rolls

    def prompts(self) -> list[list[Sample]]:
        """The samples of its data for the coming optimizer step."""
        step = self.progress.step // self.config.iterations
        return [[self.samples[i] for i in micro] for micro in self.batches[step]]

    def in_order(self) -> list[Sample]:
        """The samples of its data for the coming step, in an order that does not depend on how they are packed."""
        return [] if self.rolls else [self.samples[i] for i in self.batches.in_order(self.progress.step)]

    def dropout_seed(self, micro: int) -> int | None:
        """The seed of dropout in the ``micro``-th forward pass of the coming step; None: nothing is drawn, for judged
        answers are compared under the policy as evaluation has it."""
        if self.judged is not None:
            return None
        return stable_seed(self.config.seed, "dropout", self.progress.step, micro)

    def schedule_factor(self) -> float:
        """The factor of the learning rates in the coming step."""
        return self.config.schedule.factor(self.progress.step, self.total_steps, self.warmup, self.rate)

    def learning_rate(self) -> float:
        """The learning rate of the coming step."""
        return self.rate * self.schedule_factor()

    def scale_losses(self, factor: float) -> None:
        """Multiply every loss by this, for float16 cannot hold small gradients. Each overflow halves it.

        Raises:
            UserError: The job updates tensors before all gradients are known.
        """
        if self.config.layerwise_updates:
            raise UserError(
                f"job '{self.name}': layerwise_updates does not go with a base in float16, where a gradient that "
                "overflows undoes the whole step. Take dtype: bfloat16 or float32."
            )
        self.progress.loss_scale, self._scales = factor, True

    def begin_last_pass(self) -> None:
        """Take note that the coming backward pass completes the step's gradients."""
        self.updates.begin_last_pass(self.schedule_factor())

    def update(self, tokens: int) -> float:
        """Clip, step the optimizer, clear the gradients; returns the gradients' norm before clipping.

        ``tokens``: how many the step has seen.
        A norm that is not finite changes nothing but the loss scale (float16 bases) or ends the job.
        """
        progress = self.progress
        norm = self.updates.step(self.schedule_factor(), progress.loss_scale)
        if math.isfinite(norm):
            self.adapter.after_step(progress.step + 1)
            progress.moved += norm > 0
        else:
            progress.skipped += 1
        self.adapter.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += tokens
        self._rescale(math.isfinite(norm))
        if self.active and progress.step >= self.total_steps:
            progress.ended = "finished"
        return norm

    def spend(self, seconds: float) -> None:
        """Count the time of a step."""
        self.progress.seconds += seconds

    def _rescale(self, finite: bool) -> None:
        progress = self.progress
        if finite:
            progress.good_steps += 1
            progress.overflows = 0
            if self._scales and progress.good_steps % 200 == 0:
                progress.loss_scale *= 2
        elif self._scales:
            progress.loss_scale = max(1.0, progress.loss_scale / 2)
            progress.good_steps = 0
            progress.overflows += 1
            if progress.overflows >= _GIVE_UP:
                self.fail(f"the loss or a gradient overflowed in the last {_GIVE_UP} steps; take dtype bfloat16 or "
                           "float32 instead of float16")  # fmt: skip
        else:
            self.fail(f"loss or gradient is not finite at step {progress.step}")

    def fail(self, reason: str) -> None:
        """End the job, which has no result."""
        self.progress.ended, self.progress.reason = "failed", reason

    def leave(self, reason: str) -> None:
        """End the job before its last step, for others are better. It computes nothing from here on."""
        self.progress.ended, self.progress.reason = "left", reason

    def judge(self) -> None:
        """Fail a job that has ended without a result: a tensor is not finite, or all are what they began as.

        ``progress.reason`` says why.
        """
        progress = self.progress
        if progress.ended not in ("finished", "early_stop", "max_forgetting") or not self.parameters:
            return
        named = {n: p.detach() for n, p in self.adapter.named_parameters() if p.requires_grad}
        for name, value in named.items():
            if not bool(torch.isfinite(value).all()):
                self.fail(f"its tensor '{name}' holds numbers that are not finite; take a lower learning_rate")
                return
        count = f"all {progress.step} steps" if progress.step > 1 else "its one step"
        # Changed tensors alone prove nothing: weight decay moves them without any learning.
        if progress.skipped == progress.step > 0:
            self.fail(f"the loss or a gradient overflowed in {count}, which changed nothing; take dtype bfloat16 or "
                       "float32 instead of float16")  # fmt: skip
        elif not progress.moved:
            # Losses are scaled on float16 bases alone.
            why = ("in float16 small gradients are lost (take bfloat16 or float32)" if self._scales else
                   "the answers to each prompt were all worth the same; take other rewards, or more num_generations"
                   if self.rolls else
                   "no learned token sees what the adapter adds, as behind a sliding window that is shorter than the "
                   "text; take another method, or shorter texts")  # fmt: skip
            self.fail(f"every gradient was zero in {count}, so nothing was learned; {why}")
        elif all(self._witness(value) == self._began[name] for name, value in named.items()):
            if progress.ended == "max_forgetting":
                self.fail(f"{progress.reason}, and before that only the weights that it began with were below; take a "
                          "lower learning_rate or smaller eval_steps, or mix general text into the data")  # fmt: skip
                return
            early = progress.ended == "early_stop" or self.best is not None
            self.fail(
                "no evaluation was better than the one before the first step, so what would be kept is what it began "
                "as; take a lower learning_rate"
                if early
                else f"its tensors are what they began as after {count}; the learning_rate ({self.rate:g}) is too low"
            )

    def wants_evaluation(self) -> bool:
        """Whether an evaluation is due: before the first step, every ``eval_steps``, at the end; once a step."""
        progress = self.progress
        given_up = progress.ended in ("failed", "early_stop", "left")
        if not self.eval_samples or given_up or progress.evaluated_at == progress.step:
            return False
        return self.at_evaluation

    @property
    def at_evaluation(self) -> bool:
        """Whether evaluations belong here: before the first step, every ``eval_steps``, at a rung, after the last."""
        progress, every = self.progress, self.config.eval_steps
        last = progress.ended in ("finished", "max_forgetting")
        due = progress.step in self.rungs or bool(every and progress.step % every == 0)
        return due or progress.step == 0 or last

    @property
    def keeps_best(self) -> bool:
        """Whether the weights that evaluate best are kept."""
        return self.config.early_stopping_patience is not None and bool(self.eval_samples)

    def keep(self) -> None:
        """Keep the present weights, to go back to."""
        progress = self.progress
        self.best = [p.detach().clone() for p in self.parameters]
        progress.best_at = progress.step
        progress.forgetting_kept = progress.forgetting if progress.forgetting_at == progress.step else None

    def evaluated(self, losses: Mapping[str, float], metrics: Mapping[str, float]) -> None:
        """Take note of an evaluation: the loss of each of ``eval_sets``, and the other figures.

        Ends the job if ``early_stopping_patience`` evaluations brought no gain on the set that is watched.
        """
        progress, patience, watched = self.progress, self.config.early_stopping_patience, self.watched
        progress.evaluated_at, progress.metrics = progress.step, dict(metrics)
        told = {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}
        progress.eval_loss = told if self.eval_sizes else told[""]
        known = progress.best_eval_loss
        best = dict(known) if isinstance(known, dict) else {} if known is None else {"": known}
        # What is evaluated where the job has forgotten too much will not be kept, so it is no gain.
        keepable = losses if progress.ended != "max_forgetting" else {}
        gains = {name: loss for name, loss in keepable.items() if self._is_gain(loss, best.get(name), name == watched)}
        if best := {**best, **gains}:
            progress.best_eval_loss = best if self.eval_sizes else best[""]
        if watched is None:
            return
        if watched in gains:
            progress.evals_without_gain = 0
            if patience is not None:
                self.keep()
            return
        progress.evals_without_gain += 1
        if patience is not None and progress.evals_without_gain >= patience and self.active:
            progress.ended = "early_stop"

    def _is_gain(self, loss: float, best: float | None, watched: bool) -> bool:
        # Nothing is below NaN, so a NaN would stay the best.
        delta = self.config.early_stopping_min_delta if watched else 0.0
        return math.isfinite(loss) and (best is None or loss < best - delta)

    @torch.no_grad()
    def take_best(self) -> None:
        """Go back to the weights that were kept: those that evaluated best, or that had not forgotten too much."""
        if self.best is not None:
            for parameter, value in zip(self.parameters, self.best, strict=True):
                parameter.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that an exact resumption needs, in their own shapes: the adapter's, the optimizer's, the best."""
        named = {f"parameter.{name}": p.detach() for name, p in self.adapter.named_parameters()}
        named |= {f"buffer.{name}": b.detach() for name, b in self.adapter.named_buffers()}
        if self.optimizer is not None:
            named |= {f"optimizer.{key}": value for key, value in optimizer_tensors(self.optimizer).items()}
        named |= {f"best.{i}": value for i, value in enumerate(self.best or ())}
        if self.reference is not None:  # what it was made from may have changed
            named |= {f"reference.{name}": value for name, value in self.reference.state_dict().items()}
        return {key: value.cpu().contiguous() for key, value in named.items()}

    def checkpoint_bytes(self) -> int:
        """The bytes of ``tensors()`` once the optimizer has a state and, where weights are kept, there is a best."""
        tensors = (*self.adapter.parameters(), *self.adapter.buffers())
        keeps = self.config.early_stopping_patience is not None or self.config.max_forgetting is not None
        best = tensor_bytes(self.parameters) if keeps else 0
        state = self.config.optimizer_kind.state_bytes(self.config, self.parameters)
        return tensor_bytes(tensors) + best + state

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Put back ``tensors``, of the shapes that ``tensors()`` gave, and ``progress``."""
        for name, parameter in self.adapter.named_parameters():
            parameter.copy_(tensors[f"parameter.{name}"])
        for name, buffer in self.adapter.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])
        optimizer = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
        now, self.progress = self.progress.rates, Progress(**progress)
        if self.parameters and not self.progress.rates:
            self.progress.rates = self._rates(self._earlier_rate)
        if now:
            self.rate *= self.progress.rates[0] / now[0]
        # With the rates of its beginning, whatever the defaults are now: the checkpoint also counts by them.
        self.optimizer = self._make_optimizer()
        if self.optimizer is not None:
            restore_optimizer(self.optimizer, optimizer)
        if self.reference is not None:
            for name, value in self.reference.state_dict().items():
                value.copy_(tensors[f"reference.{name}"])
        best = sorted((int(k.removeprefix("best.")), v) for k, v in tensors.items() if k.startswith("best."))
        self.best = [value.to(p.device) for (_, value), p in zip(best, self.parameters, strict=True)] if best else None

    def state(self) -> dict[str, Any]:
        """The progress as JSON values."""
        return asdict(self.progress)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the tokenized training and evaluation data, in order."""
        samples = itertools.chain(self.samples, self.eval_samples)
        return data_fingerprint(samples, self.adapter.head.labels, self.eval_sizes)
