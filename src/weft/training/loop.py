"""The trainer: evaluates, saves and steps until every job has ended or someone asks it to stop."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from weft.core.adapters import Adapters
from weft.errors import UserError
from weft.files.run_folder import RunStore
from weft.machine import freed_memory_kept
from weft.objectives.passes import Evaluation, evaluate
from weft.training.continuing import go_on
from weft.training.forgetting import Forgetting, is_due, take_note
from weft.training.fullest import make_fullest_pass
from weft.training.job import Job
from weft.training.judged import evaluate_judged, falling
from weft.training.memory import peak_memory
from weft.training.rolled import Write
from weft.training.rollouts import Roller, end_values, roll_out
from weft.training.rungs import Rungs
from weft.training.settings import eval_key
from weft.training.splitting import Splitting
from weft.training.step import StepResult, train_step
from weft.training.verify import verify_packing
from weft.version import __version__

Event = Mapping[str, Any]
# The loss scale of jobs over a base in float16, before the first step.
_FIRST_LOSS_SCALE = 2.0**12
# After so many steps a job is asked whether it has had a gradient.
_EARLY = 3


@dataclass(frozen=True)
class TrainResult:
    """The end of a run.

    Attributes:
        completed: False if the run was asked to stop.
        jobs: the progress of each job: how it ``ended`` (``finished``, ``early_stop``, ``max_forgetting`` or
            ``failed``, these two with the ``reason``), the loss of the last evaluation (``eval_loss``) and of the best
            (``best_eval_loss``), both by name where sets have names. The adapter that is saved is the last; with early
            stopping, the best; of a job that forgot too much the last that had not. ``forgetting`` is that of the last
            measurement, and ``forgetting_kept`` that of the weights of step ``best_at``, where a job went back to them.
    """

    completed: bool
    steps: int
    seconds: float
    jobs: dict[str, dict[str, Any]]


class Trainer:
    """Trains many jobs over one base.

    Args:
        adapters: the base with every job's adapter added.
        jobs: in the order in which their rows stand in the stream.
        store: where checkpoints and metrics go; None keeps everything in memory.
        forgetting: measures what the jobs forget, and is asked wherever they are evaluated or saved.
        on_event: called with every logged event (``step``, ``eval``, ``forgetting``, ``left``, ``end``, ``warning``).
        verify_packing: before the first step, prove that the sequences of the first batch do not feel each other.
        fullest_pass_first: before the first step, see whether memory runs out in the fullest pass of them all.
        rollers: for the jobs that learn from answers of their own, what asks for these and rewards them.
        write: what writes them.
        rungs: where jobs are compared, and which of them leave.
        should_stop: asked after every step and before every evaluation; True saves and leaves.

    Attributes:
        over: whether it went back to a run that had ended, and that has no step to do.
    """

    def __init__(
        self,
        adapters: Adapters,
        jobs: Sequence[Job],
        *,
        store: RunStore | None = None,
        logging_steps: int = 10,
        save_steps: int | None = None,
        save_total_limit: int = 2,
        verify_packing: bool = True,
        fullest_pass_first: bool = False,
        rollers: Sequence[Roller] = (),
        write: Write | None = None,
        rungs: Rungs | None = None,
        forgetting: Forgetting | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.adapters, self.jobs, self.store = adapters, list(jobs), store
        self.logging_steps, self.save_steps, self.save_total_limit = logging_steps, save_steps, save_total_limit
        self.on_event, self.should_stop = on_event, should_stop
        self.verify_packing, self.fullest_pass_first = verify_packing, fullest_pass_first
        self.step, self.over = 0, False
        self.rungs = rungs
        for job in self.jobs:
            job.rungs = frozenset(rungs.steps if rungs is not None else ())
        self.rollers, self.write = {roller.job.name: roller for roller in rollers}, write
        self.forgetting = forgetting
        for roller in rollers:
            roller.tell = partial(self._warn, roller.job)
        self.splitting = Splitting(tell=lambda text: self._tell({"event": "warning", "message": text}))
        if adapters.dtype == torch.float16:
            for job in self.jobs:
                job.scale_losses(_FIRST_LOSS_SCALE)
        self._recent: dict[str, list[float]] = {job.name: [] for job in self.jobs}
        self._figures: dict[str, list[Mapping[str, float]]] = {job.name: [] for job in self.jobs}

    def resume(self) -> bool:
        """Go back to the newest intact checkpoint; False if there is none.

        Raises:
            UserError: the checkpoint was made from other data or another environment; the message says what changed.
        """
        assert self.store is not None
        found = self.store.latest()
        if found is None:
            self.store.rewind_metrics(0)
            return False
        state, tensors, warnings = found
        self._compare(state)
        ended = []
        for job in self.jobs:
            job.restore(tensors[job.name], state["jobs"][job.name]["progress"])
            ended.append(not job.active)
            self._recent[job.name] = list(state["jobs"][job.name]["recent"])
            self._figures[job.name] = list(state["jobs"][job.name].get("figures", ()))
            if (rolled := state["jobs"][job.name].get("rolled")) is not None:
                job.rolled.restore(rolled)
            warnings.append(go_on(job, state["jobs"][job.name].get("total_steps", job.total_steps)))
        self.over = all(ended) and not any(job.active for job in self.jobs)
        if self.over:
            warnings.append(
                f"this run has finished, with {max(job.progress.step for job in self.jobs)} steps. To go on give it "
                "more: steps=N, or epochs=N."
            )
        self.step = state["step"]
        self.splitting.limit = state.get("pass_tokens")
        self.store.rewind_metrics(state["metrics_bytes"])
        for text in filter(None, warnings):
            self._tell({"event": "warning", "message": text}, log=False)
        return True

    def run(self) -> TrainResult:
        """Train until all jobs have ended, or until ``should_stop``."""
        with freed_memory_kept(self.adapters.device.type):
            return self._run()

    def _run(self) -> TrainResult:
        started, saved_at = time.monotonic(), self.step
        if self.verify_packing:
            verify_packing(self.adapters, self.jobs)
        if self.fullest_pass_first:
            make_fullest_pass(self.adapters, self.jobs, self.splitting)
        while True:
            stopped = not (self._measure_forgetting() and self._evaluate_due() and self._compare_due())
            end_values(self.rollers.values())
            active = [job for job in self.jobs if job.active]
            if stopped or not active:
                break
            if self.save_steps and self.step % self.save_steps == 0 and self.step != saved_at:
                if not self._measure_forgetting(anywhere=True):
                    stopped = True
                    break
                self.save()
                saved_at = self.step
            if self.should_stop():
                stopped = True
                break
            self._step(active)
        completed = not stopped
        if completed:
            self._judge()
        self.save(last=True)
        seconds = time.monotonic() - started
        jobs = {job.name: {**job.state(), "total_steps": job.total_steps} for job in self.jobs}
        self._tell({"event": "end", "completed": completed, "step": self.step, "seconds": round(seconds, 3)}, log=False)
        return TrainResult(completed, self.step, seconds, jobs)

    def _judge(self) -> None:
        """Put back each job's best weights, and fail the jobs that have learned nothing."""
        for job in self.jobs:
            job.take_best()
            told = job.progress.ended == "failed"
            job.judge()
            skipped, steps = job.progress.skipped, job.progress.step
            if job.progress.ended == "failed" and not told:
                self._warn(job, f"{job.progress.reason}; the job has failed")
            elif job.progress.ended != "failed" and 2 * skipped >= steps > 0:
                self._warn(job, f"{skipped} of {steps} steps were skipped, for float16 overflowed; bfloat16 or float32 "
                           "would not")  # fmt: skip

    def _warn(self, job: Job, text: str) -> None:
        self._tell({"event": "warning", "job": job.name, "message": f"{job.name}: {text}"})

    def save(self, *, last: bool = False) -> None:
        """Write a checkpoint; ``last``: this process makes no step after it."""
        if self.store is None:
            return
        state = {
            "step": self.step,
            "last": last,
            "environment": environment(),
            "pass_tokens": self.splitting.limit,
            "jobs": {
                job.name: {
                    "progress": job.state(),
                    "total_steps": job.total_steps,
                    "data": job.fingerprint,
                    "recent": self._recent[job.name],
                    "figures": self._figures[job.name],
                    "rolled": job.rolled.state() if job.rolls else None,
                }
                for job in self.jobs
            },
        }
        self.store.save(self.step, state, {job.name: job.tensors() for job in self.jobs}, self.save_total_limit)

    def _step(self, active: list[Job]) -> None:
        begun = time.monotonic()
        if rolling := [self.rollers[job.name] for job in active if job.name in self.rollers]:
            assert self.write is not None
            roll_out(self.adapters, rolling, self.write)
            end_values(self.rollers.values())
            active = [job for job in active if job.active]
        results = train_step(self.adapters, active, self.splitting) if active else {}
        seconds = time.monotonic() - begun
        self.step += 1
        for job in active:
            job.spend(seconds)
            self._recent[job.name].append(results[job.name].loss)
            self._figures[job.name].append({**job.rolled.figures, **results[job.name].figures})
            if job.progress.step % self.logging_steps == 0 or job.progress.step == 1 or not job.active:
                self._log_step(job, results[job.name], seconds)
            if job.progress.ended == "failed":
                self._warn(job, f"{job.progress.reason}; the job ends here")
            elif job.progress.step == _EARLY and not job.progress.moved and not job.progress.skipped:
                self._warn(job, f"every gradient was zero in the first {_EARLY} steps: nothing is learned so far")

    def _log_step(self, job: Job, result: StepResult, seconds: float) -> None:
        recent, self._recent[job.name] = self._recent[job.name], []
        figures, self._figures[job.name] = self._figures[job.name], []
        progress = job.progress
        self._tell(
            {
                "event": "step",
                "job": job.name,
                "step": progress.step,
                "total_steps": job.total_steps,
                "epoch": round(job.epoch, 4),
                "loss": sum(recent) / len(recent),
                "grad_norm": result.grad_norm,
                "learning_rate": result.learning_rate,
                "tokens": progress.tokens,
                "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
                "eta_seconds": round(progress.seconds / progress.step * (job.total_steps - progress.step), 1),
                "memory_gb": round(peak_memory(self.adapters.device) / 1e9, 3),
                **_means(figures),
            }
        )

    def _measure_forgetting(self, *, anywhere: bool = False) -> bool:
        """Measure the jobs that are due, together, before they are evaluated; False if asked to stop in between."""
        due = [job for job in self.jobs if is_due(job, anywhere=anywhere)]
        if self.forgetting is None or not due:
            return True
        found = self.forgetting.measure([job.name for job in due], self.should_stop)
        for job in due if found is not None else ():
            assert found is not None
            told = found[job.name]
            take_note(job, told.forgetting)
            event: dict[str, Any] = {"event": "forgetting", "job": job.name, "step": job.progress.step, **told.event()}
            if job.config.max_forgetting is not None:
                event["max_forgetting"] = job.config.max_forgetting
            self._tell(event)
            if job.progress.ended == "max_forgetting":
                self._warn(job, f"{job.progress.reason}; it stops here")
            elif job.progress.ended == "failed":
                self._warn(job, f"{job.progress.reason}; the job has failed")
        return found is not None

    def _evaluate_due(self) -> bool:
        """Evaluate the jobs that are due; False if asked to stop in between."""
        for job in self.jobs:
            if not job.wants_evaluation():
                continue
            told: dict[str, object] = {"event": "eval", "job": job.name, "step": job.progress.step}
            losses: dict[str, float] = {}
            metrics: dict[str, float] = {}
            for name, samples in job.eval_sets.items():
                found: Evaluation | None
                if job.rolls:
                    assert self.write is not None
                    found = self.rollers[job.name].evaluate(self.write, samples)
                elif job.judged is not None:
                    found = evaluate_judged(self.adapters, job, samples, should_stop=self.should_stop)
                else:
                    found = evaluate(self.adapters, job.name, samples, should_stop=self.should_stop)
                if found is None:
                    return False
                losses[name] = found.loss
                metrics |= {f"{name}_{key}" if name else key: value for key, value in found.metrics.items()}
                told |= {eval_key(name, key): value for key, value in {"loss": found.loss, **found.metrics}.items()}
            if job.eval_sizes:
                if (base := self._of_the_base(job)) is None:
                    return False
                told |= base
                if job.config.early_stopping_patience is not None:
                    told["early_stopping_on"] = job.watched
            job.evaluated(losses, metrics)
            self._tell(told)
            if warning := falling(job, metrics):
                self._warn(job, warning)
        return True

    def _compare_due(self) -> bool:
        """Compare the jobs that have come to a rung, and let some leave; False if that cannot be said yet."""
        there = [job for job in self.jobs if job.active and job.progress.rung < job.progress.step in job.rungs]
        if self.rungs is None or not there:
            return True
        step = there[0].progress.step  # active jobs are all at one step
        leaving = self.rungs.judge(step, {job.name: self.rungs.figure(job) for job in there})
        if leaving is None:
            return False
        for job in there:
            job.progress.rung = step
            if job.name in leaving:
                job.leave(leaving[job.name])
                self._tell({"event": "left", "job": job.name, "step": step, "reason": leaving[job.name]})
        return True

    def _of_the_base(self, job: Job) -> dict[str, float] | None:
        """The plain base's loss on each named set, before the first step, for the forgetting; None if asked to stop.

        A fresh adapter would not do: prompts and prefixes begin elsewhere. A base has no classes, so no loss on those.
        """
        losses: dict[str, float] = {}
        asked = job.progress.step == 0 and job.adapter.head.writes and job.judged is None
        for name, samples in job.eval_sets.items() if asked else ():
            found = evaluate(self.adapters, None, samples, should_stop=self.should_stop)
            if found is None:
                return None
            losses[f"base_{name}_loss"] = found.loss
        return losses

    def _tell(self, event: dict[str, Any], *, log: bool = True) -> None:
        if self.store is not None and log:
            self.store.log(event)
        self.on_event(event)

    def _compare(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on with other jobs or other data; say when the machine's arithmetic may differ."""
        names, before = [job.name for job in self.jobs], list(state["jobs"])
        if names != before:
            raise UserError(f"cannot resume: the checkpoint's jobs are {before}, the configuration's are {names}.")
        for job in self.jobs:
            if job.fingerprint != state["jobs"][job.name]["data"]:
                raise UserError(
                    f"cannot resume: the data of job '{job.name}' (file, tokenizer, template or length) is not what "
                    "the checkpoint was made with. Put it back, or begin a new run in another output_dir."
                )
        for key, value in environment().items():
            old = state["environment"].get(key)
            if old != value:
                text = f"{key} was {old}, is {value}: the run goes on, but not bit for bit"
                self._tell({"event": "warning", "message": text}, log=False)


def _means(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure over the steps that have it."""
    names = dict.fromkeys(name for one in figures for name in one)
    values = {name: [one[name] for one in figures if name in one] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def environment() -> dict[str, str]:
    """The facts, beside its configuration, on which the bits of a run depend."""
    return {
        "weft": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
