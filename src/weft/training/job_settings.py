"""The configuration's model of one job."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from weft.core.adapter import MethodConfig
from weft.data.settings import FREE, DataPaths, EvalPaths, checked_paths, checked_sets
from weft.methods.trainable_tokens import with_token_rows
from weft.models import Base
from weft.objectives import AnswerObjective, Objective, make_objective
from weft.paths import with_home
from weft.patterns import check_name
from weft.training.method_settings import method_of, start_config
from weft.training.optimizers import OPTIMIZERS, OptimizerKind, OptimizerName
from weft.training.options import options_of, with_options
from weft.training.schedules import SCHEDULES, Schedule, ScheduleName


class JobConfig(BaseModel):
    """One adapter and how it is trained. ``steps`` are optimizer steps and win over ``epochs``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(description="name of the adapter and of its folder")
    method: str = Field(description="one of the methods below; or several in one adapter, joined by `+` (above)")
    method_settings: dict[str, object] = {}
    start_from: str | None = Field(
        None,
        description="folder of a trained adapter, whose values the job begins with; the method's settings are those of "
        "the folder ([preferences.md](preferences.md))",
    )
    data: DataPaths | None = Field(None, description="training data of this job")
    eval_data: EvalPaths | None = Field(None, description="evaluation data of this job, also by name")
    task: Literal["causal_lm", "seq2seq", "sequence_classification"] = Field(
        "causal_lm",
        description="`causal_lm` writes text, as the base does it (`seq2seq`: only on an encoder-decoder, T5 or mT5); "
        "`sequence_classification` names the class of a text, through a head of the job's own (on a base that writes "
        "or on an encoder)",
    )
    labels: list[str] | None = Field(
        None, description="classification: names of the classes in order; default: those in the training data"
    )
    text_columns: list[str] | None = Field(
        None, description="classification: the columns with the text or the pair of texts, if not the usual ones"
    )
    label_column: str | None = Field(None, description="classification: the column with the label, likewise")
    steps: Annotated[int | None, FREE] = Field(None, gt=0, description="optimizer steps; wins over `epochs`")
    epochs: Annotated[float, FREE] = Field(
        3, gt=0, description="passes over the data; part of one is rounded up to whole steps"
    )
    batch_size: int = Field(8, gt=0, description="records per optimizer step, times `gradient_accumulation_steps`")
    batch_tokens: int | None = Field(
        None,
        gt=0,
        description="instead of `batch_size`: so many tokens a step; `auto`: `batch_size` times `max_length`",
    )
    pack_tokens: int | None = Field(
        None, gt=0, description="the most tokens in one pass; default: those of the first epoch's fullest batch"
    )
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="makes a step of that many batches; a pass stays as large as one of them"
    )
    objective: str | None = Field(
        None,
        description="what is learned instead of the likelihood of the answers: `dpo`, `kto`, `orpo`, `simpo`, "
        "`reward` and `regression` learn from judged answers ([preferences.md](preferences.md)); or the name of an "
        "extension's ([extending.md](extending.md)), where evaluation stays the likelihood",
    )
    objective_settings: dict[str, object] = Field({}, description="settings of the objective")
    reference: Literal["start", "base"] = Field(
        "start",
        description="what an objective with a reference is held to: the adapter as it began (which is the base, where "
        "the method begins as the identity), or the base",
    )
    optimizer: OptimizerName = Field(
        "adamw", description="; ".join(f"`{name}`: {one.about}" for name, one in OPTIMIZERS.items())
    )
    optim_args: dict[str, object] = Field(
        {}, description="options of the optimizer, by their names above; also as `rank=64,scale=2`"
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="default: the method's usual one (below); of several methods in one job each its own, "
        "and of a classification's head its own (LoRA's)",
    )
    adam_betas: tuple[float, float] = Field(
        (0.9, 0.999), description="AdamW's decay rates; `adam_beta1` and `adam_beta2` set one"
    )
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's ε")
    momentum: float = Field(0.9, ge=0, lt=1, description="of `sgd`")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="decoupled for `adamw`; not for what is stored whole: norms, biases and scales of their own",
    )
    lr_scheduler_type: ScheduleName = Field(
        "cosine",
        description="after the warm-up: " + "; ".join(f"`{name}` {one.about}" for name, one in SCHEDULES.items()),
    )
    lr_scheduler_kwargs: dict[str, object] = Field({}, description="options of the schedule, by their names above")
    warmup_steps: int = Field(0, ge=0, description="wins over `warmup_ratio`")
    warmup_ratio: float = Field(
        0.03,
        ge=0,
        le=1,
        description="share of the steps in which the rate rises; the k-th of w "
        "has k/w of it (transformers': (k-1)/w, so that its first step changes nothing)",
    )
    max_grad_norm: float = Field(1.0, ge=0, description="clip the job's gradients to this norm; 0: do not")
    layerwise_updates: bool = Field(
        False,
        description="update each tensor within the backward pass, and free its gradient at once: the same numbers with "
        "one gradient in memory, for `full`; needs `max_grad_norm: 0`, one pass a step, and no float16",
    )
    seed: int = Field(0, description="of the job's initial values, order and dropout")
    eval_steps: int | None = Field(
        None, gt=0, description="evaluate every so many steps, besides before the first and after the last"
    )
    early_stopping_patience: int | None = Field(
        None, gt=0, description="end after so many evaluations without gain, with the best weights; needs `eval_steps`"
    )
    early_stopping_min_delta: float = Field(0.0, ge=0, description="how much lower a loss must be to count as gain")
    early_stopping_on: str | None = Field(
        None, description="the name of the set of `eval_data` that early stopping watches, where several have names"
    )
    max_forgetting: float | None = Field(
        None,
        gt=0,
        description="end at the first evaluation where the loss of `forgetting_eval` is more than this above the "
        "base's, in nats per token, with the last weights that were not; needs `eval_steps` "
        "([forgetting.md](forgetting.md))",
    )
    neftune_noise_alpha: float = Field(
        0.0, ge=0, description="NEFTune: strength of the noise on the embeddings in training; 5 is usual, 0: none"
    )

    _method: MethodConfig = PrivateAttr()
    _schedule: Schedule = PrivateAttr()
    _optimizer: OptimizerKind = PrivateAttr()
    _options = field_validator("optim_args", "lr_scheduler_kwargs", mode="before")(options_of)
    _paths = field_validator("data", mode="before")(checked_paths)
    _sets = field_validator("eval_data", mode="before")(checked_sets)
    _home = field_validator("start_from")(lambda path: path and with_home(path))

    @field_validator("labels", mode="before")
    @classmethod
    def _names_of_labels(cls, value: object) -> object:
        if isinstance(value, (list, tuple)):
            if any(isinstance(name, bool) for name in value):
                raise ValueError("true and false are switches; put the labels in quotes")
            return [str(name) if isinstance(name, (int, float)) else name for name in value]
        return value

    @model_validator(mode="after")
    def _check(self) -> JobConfig:
        check_name(self.name)
        if self.name == "base":
            raise ValueError("'base' is no name for a job: in chat and generate it is the base itself")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} does not fit into 64 bits")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas {self.adam_betas}: both must lie in [0, 1)")
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ValueError("early_stopping_patience needs eval_steps: without evaluation nothing can stop early")
        if self.max_forgetting is not None and self.eval_steps is None:
            raise ValueError("max_forgetting needs eval_steps: what is measured at the end alone can stop nothing")
        if self.max_forgetting is not None and self.classifies:
            raise ValueError("max_forgetting is for tasks that write: what names classes has no loss of a text")
        if self.batch_tokens is not None and self.pack_tokens is not None:
            raise ValueError("batch_tokens and pack_tokens exclude each other: what goes through the model at once "
                             "is already limited by batch_tokens")  # fmt: skip
        if self.objective is not None and self.classifies:
            raise ValueError("objective is for tasks that write; a classification has its own")
        if self.objective_settings and self.objective is None:
            raise ValueError("objective_settings need an objective")
        if self.layerwise_updates and self.max_grad_norm:
            raise ValueError("layerwise_updates cannot clip: the norm of all gradients is known when the last has "
                             "come, and the first is gone by then. Set max_grad_norm: 0")  # fmt: skip
        if self.layerwise_updates and self.gradient_accumulation_steps > 1:
            raise ValueError("layerwise_updates saves nothing with gradient_accumulation_steps: the gradients of the "
                             "first pass must wait for the last. Leave one of them out")  # fmt: skip
        kind = SCHEDULES[self.lr_scheduler_type]
        self._schedule = with_options(kind, self.lr_scheduler_type, self.lr_scheduler_kwargs, "lr_scheduler_kwargs")
        self._optimizer = with_options(OPTIMIZERS[self.optimizer], self.optimizer, self.optim_args, "optim_args")
        self._optimizer.check_packages()
        self._method = method = method_of(self.method, self.method_settings)
        for one in method.methods():
            if self.task not in one.tasks:
                fitting = ", ".join(sorted(one.tasks))
                raise ValueError(f"task {self.task}: method {one.method} is not for that; it is for {fitting}")
        return self

    @property
    def classifies(self) -> bool:
        """Whether the job names the class of a text, by a head of its own."""
        return self.task == "sequence_classification"

    def method_config(self) -> MethodConfig:
        """The method's own configuration."""
        return self._method

    @property
    def optimizer_kind(self) -> OptimizerKind:
        """The optimizer with its options."""
        return self._optimizer

    @property
    def schedule(self) -> Schedule:
        """How the learning rate changes."""
        return self._schedule

    def method_on(self, base: Base) -> MethodConfig:
        """The method's configuration for ``base``, of whose added tokens it also trains the rows.

        Raises:
            UserError: The adapter to begin with is not there, or has other settings.
        """
        method = self._method
        if self.start_from is not None:
            method = start_config(self.start_from, self.method, method if self.method_settings else None, base.model)
        return with_token_rows(method, base.added_ids, base.model)

    def own_objective(self) -> Objective | AnswerObjective | None:
        """The objective that the job names; None: it minimises the likelihood, or the loss of its task.

        Raises:
            UserError: there is no such objective, or it has no such setting.
        """
        return None if self.objective is None else make_objective(self.objective, self.objective_settings)

    @property
    def judged(self) -> AnswerObjective | None:
        """The objective, if it learns from judged answers. Raises UserError as ``own_objective``."""
        found = self.own_objective()
        return found if isinstance(found, AnswerObjective) else None

    @property
    def rolls(self) -> bool:
        """Whether it learns from answers of its own."""
        return (judged := self.judged) is not None and judged.judgement == "prompts"

    @property
    def iterations(self) -> int:
        """How many optimizer steps learn from the same prompts."""
        return int(getattr(self.judged, "num_iterations", 1)) if self.rolls else 1

    def planned_steps(self, samples: int) -> tuple[int, int]:
        """The optimizer steps per epoch and of the whole job, with so many samples in batches of ``batch_size``."""
        per_epoch = math.ceil(math.ceil(samples / self.batch_size) / self.gradient_accumulation_steps)
        return per_epoch, self.steps or max(1, math.ceil(self.epochs * per_epoch - 1e-9))
