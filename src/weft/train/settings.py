"""The configuration's models: one job, and the run of many."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from weft.core.combined import CombinedConfig
from weft.core.config import MethodConfig
from weft.core.files import check_name, method_config
from weft.data.settings import DataPaths, DataSettings, checked_paths
from weft.errors import UserError
from weft.models.hub import Hub
from weft.models.load import Shape
from weft.models.quantize import Quantization
from weft.train.aliases import translate


class JobConfig(BaseModel):
    """One adapter and how it is trained. ``steps`` are optimizer steps and win over ``epochs``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    method: str
    method_settings: dict[str, object] = {}
    data: DataPaths | None = None
    eval_data: DataPaths | None = None
    task: Literal["causal_lm", "seq2seq", "sequence_classification"] = "causal_lm"
    labels: list[str] | None = None
    text_columns: list[str] | None = None
    label_column: str | None = None
    steps: int | None = Field(default=None, gt=0)
    epochs: float = Field(default=3, gt=0)
    batch_size: int = Field(default=8, gt=0)
    batch_tokens: int | None = Field(default=None, gt=0)
    pack_tokens: int | None = Field(default=None, gt=0)
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float | None = Field(default=None, gt=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, ge=0)
    seed: int = 0
    eval_steps: int | None = Field(default=None, gt=0)
    early_stopping_patience: int | None = Field(default=None, gt=0)
    early_stopping_min_delta: float = Field(default=0.0, ge=0)
    neftune_noise_alpha: float = Field(default=0.0, ge=0)

    _paths = field_validator("data", "eval_data", mode="before")(checked_paths)

    @field_validator("labels", mode="before")
    @classmethod
    def _names_of_labels(cls, value: object) -> object:
        if isinstance(value, (list, tuple)):
            if any(isinstance(name, bool) for name in value):
                raise ValueError("YAML reads no and yes as switches; put the labels in quotes")
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
        if self.batch_tokens is not None and self.pack_tokens is not None:
            raise ValueError("batch_tokens and pack_tokens exclude each other: what goes through the model at once "
                             "is already limited by batch_tokens")  # fmt: skip
        method = self.method_config()
        for part in method.parts if isinstance(method, CombinedConfig) else (method,):
            if self.task not in part.tasks:
                fitting = ", ".join(sorted(part.tasks))
                raise ValueError(f"task {self.task}: method {part.method} is not for that; it is for {fitting}")
        return self

    def method_config(self) -> MethodConfig:
        """The method's own configuration."""
        return method_of(self.method, self.method_settings)

    def planned_steps(self, samples: int) -> tuple[int, int]:
        """(optimizer steps per epoch, of the whole job) with that many samples in batches of ``batch_size``."""
        per_epoch = math.ceil(math.ceil(samples / self.batch_size) / self.gradient_accumulation_steps)
        return per_epoch, self.steps or max(1, round(self.epochs * per_epoch))


class RunConfig(DataSettings):
    """A run: base, data, jobs, where it is written."""

    model: str
    jobs: tuple[JobConfig, ...] = Field(min_length=1)
    output_dir: str = "runs/weft"
    overwrite_output_dir: bool = False
    resume: bool = False
    hub: Hub = "huggingface"
    shape: Shape = "full"
    quantization: Quantization | None = None
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = Field(default=None, gt=0)
    exact: bool = False
    verify_packing: bool = True
    gradient_checkpointing: bool = False
    logging_steps: int = Field(default=10, gt=0)
    save_steps: int | None = Field(default=None, gt=0)
    save_total_limit: int = Field(default=2, gt=0)

    @model_validator(mode="after")
    def _names_differ(self) -> RunConfig:
        names = [job.name for job in self.jobs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two jobs are named {', '.join(twice)}; give each its own name")
        if self.eval_split is not None and (
            self.eval_size or any(job.eval_data or self.eval_data for job in self.jobs)
        ):
            raise ValueError("eval_split, eval_size and eval_data exclude each other: what to evaluate on is said once")
        if self.bad_records_file is not None and self.on_bad_record != "report":
            raise ValueError("bad_records_file is for on_bad_record: report; nothing else writes it")
        classifies = any(job.task == "sequence_classification" for job in self.jobs)
        for key in ("labels", "text_columns", "label_column"):
            if not classifies and any(getattr(job, key) is not None for job in self.jobs):
                raise ValueError(f"{key} is for classification; add task: sequence_classification")
        return self


def settings_of(
    part: str, cls: type[MethodConfig], settings: Mapping[str, object], where: str = "configuration"
) -> dict[str, object]:
    """Of the settings of a job with several methods, those of one: what stands under its name wins."""
    own = own_settings(part, settings.get(part, {}), where)
    return {**{key: value for key, value in settings.items() if key in cls.model_fields}, **own}


def own_settings(part: str, own: object, where: str) -> dict[str, object]:
    """The settings under a method's name, in our words.

    Raises:
        UserError: They are no mapping.
    """
    if not isinstance(own, Mapping):
        raise UserError(f"{where}: {part}: expected this method's settings (key: value), not {own!r}.")
    return translate(own, f"{where}: {part}")


def method_names(method: str) -> list[str]:
    return [name.strip() for name in method.split("+")]


def method_of(method: str, settings: Mapping[str, Any]) -> MethodConfig:
    """The configuration of a method, or of several joined by ``+``."""
    classes = [(name, method_config(name)) for name in method_names(method)]
    if len(classes) == 1:
        name, cls = classes[0]
        return cls(**{key: value for key, value in settings.items() if key != name} | settings.get(name, {}))
    return CombinedConfig(parts=tuple(cls(**settings_of(name, cls, settings)) for name, cls in classes))
