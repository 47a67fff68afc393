"""How far a job has come."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field


@dataclass
class Progress:
    """The state of a job beside its tensors. It goes into every checkpoint as JSON."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    _: KW_ONLY
    evaluated_at: int = -1
    # By name, where the sets to evaluate on have names; what is not finite is None.
    eval_loss: float | dict[str, float | None] | None = None
    best_eval_loss: float | dict[str, float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # those of the last evaluation, without the loss
    evals_without_gain: int = 0
    rates: list[float] = field(default_factory=list)  # of the parameters, in order, before the schedule
    ended: str | None = None  # why it ended: finished, early_stop, max_forgetting, failed, left
    reason: str | None = None  # why it failed or left, or what it had forgotten
    rung: int = 0  # the last step at which it was compared with other jobs, and stayed
    forgetting: float | None = None  # at the last measurement, in nats per token; what is not finite is None
    forgetting_at: int = -1
    # Of the weights to go back to, where there are some: their step, and what they have forgotten.
    best_at: int | None = None
    forgetting_kept: float | None = None
    loss_scale: float = 1.0
    good_steps: int = 0
    skipped: int = 0  # steps that changed nothing, for the loss or a gradient was not finite
    overflows: int = 0  # how many of them are the last ones, in a row
    moved: int = 0  # steps with a gradient that was finite and not zero
    first_chosen: float | None = None  # the log-probability of chosen answers in the first evaluation
    kl_coef: float | None = None  # PPO's, once it has changed
    told_falling: bool = False  # whether a warning said that it falls
