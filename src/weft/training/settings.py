"""The configuration's models: one job, and the run of many."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, PrivateAttr, field_validator, model_validator

from weft.base.offload import Place
from weft.complaints import Worded
from weft.core.adapter import MethodConfig
from weft.data import Renderer
from weft.data.rendering.drafts import RenderSettings
from weft.data.settings import FREE, DataPaths, DataSettings, EvalPaths, checked_paths, checked_sets, part
from weft.data.sources import parse_sets
from weft.errors import UserError, nearest
from weft.methods.trainable_tokens import with_token_rows
from weft.models import Base, load_base
from weft.models.hub import Hub
from weft.models.load import Shape, sketch_base
from weft.models.offload import Offload
from weft.objectives import Objective, class_metrics, make_objective
from weft.paths import with_home
from weft.patterns import check_name
from weft.training.method_settings import method_of
from weft.training.optimizers import OPTIMIZERS, OptimizerKind, OptimizerName
from weft.training.options import options_of, with_options
from weft.training.quantization import QuantizationSettings
from weft.training.schedules import SCHEDULES, Schedule, ScheduleName


def eval_key(name: str, figure: str) -> str:
    """The key of a figure of an evaluation, as in transformers: ``eval_loss``, of a named set ``eval_domain_loss``."""
    return f"eval_{name}_{figure}" if name else f"eval_{figure}"


class JobConfig(BaseModel):
    """One adapter and how it is trained. ``steps`` are optimizer steps and win over ``epochs``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(description="name of the adapter and of its folder")
    method: str = Field(description="one of the methods below; or several in one adapter, joined by `+` (above)")
    method_settings: dict[str, object] = {}
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
        description="the name of an extension's objective, instead of the likelihood of the answers "
        "([extending.md](extending.md)); evaluation stays the likelihood",
    )
    objective_settings: dict[str, object] = Field({}, description="settings of the objective")
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
    neftune_noise_alpha: float = Field(
        0.0, ge=0, description="NEFTune: strength of the noise on the embeddings in training; 5 is usual, 0: none"
    )

    _method: MethodConfig = PrivateAttr()
    _schedule: Schedule = PrivateAttr()
    _optimizer: OptimizerKind = PrivateAttr()
    _options = field_validator("optim_args", "lr_scheduler_kwargs", mode="before")(options_of)
    _paths = field_validator("data", mode="before")(checked_paths)
    _sets = field_validator("eval_data", mode="before")(checked_sets)

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
        """The method's configuration for ``base``, of whose added tokens it also trains the rows."""
        return with_token_rows(self._method, base.added_ids, base.model)

    def own_objective(self) -> Objective | None:
        """The objective that the job names; None: it minimises the likelihood, or the loss of its task.

        Raises:
            UserError: there is no such objective, or it has no such setting.
        """
        return None if self.objective is None else make_objective(self.objective, self.objective_settings)

    def planned_steps(self, samples: int) -> tuple[int, int]:
        """The optimizer steps per epoch and of the whole job, with so many samples in batches of ``batch_size``."""
        per_epoch = math.ceil(math.ceil(samples / self.batch_size) / self.gradient_accumulation_steps)
        return per_epoch, self.steps or max(1, math.ceil(self.epochs * per_epoch - 1e-9))


class RunConfig(Worded, QuantizationSettings, DataSettings):
    """A run: base, data, jobs, where it is written."""

    model: str = Field(
        description="the base: a Hugging Face folder, a hub id, or an embedded model (`tiny-llama`, `tiny-bloom`)"
    )
    jobs: tuple[JobConfig, ...] = Field(
        min_length=1,
        description="one mapping per job; or leave it out: `method: [lora, prefix_tuning]` makes one job each",
    )
    output_dir: Annotated[str, FREE] = Field("runs/weft", description="folder of the run")
    overwrite_output_dir: Annotated[bool, FREE] = Field(
        False, description="delete the run that is in `output_dir` (anything else there is never deleted)"
    )
    resume: Annotated[bool, FREE] = Field(
        False, description="go on from the newest intact checkpoint in `output_dir`; begins anew if the run never began"
    )
    hub: Hub = Field(
        "huggingface", description="where ids of models and data are looked up; `HF_ENDPOINT` names a mirror"
    )
    shape: Shape = Field(
        "full", description="`tiny`: the same architecture, two layers of width 64, random; to try a run in seconds"
    )
    dtype: str = Field(
        "auto",
        description="what it computes in: `auto` (as its config says), `float32`, `bfloat16`, `float16`, `float64`",
    )
    device: str = Field("auto", description="`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:0`")
    threads: Annotated[int | None, FREE] = Field(None, gt=0, description="CPU threads of torch")
    exact: bool = Field(
        False, description="one matrix product per job: bit for bit what each job alone would give, and slower"
    )
    verify_packing: Annotated[bool, FREE] = Field(
        True, description="before the first step, prove that no sequence depends on its neighbours ([data.md](data.md))"
    )
    gradient_checkpointing: bool | PositiveInt | Literal["cheap"] = Field(
        False,
        description="recompute in the backward pass what was not kept: less memory, more time. `true`: all blocks; a "
        "number k: every k-th one; `cheap`: of all blocks what costs little (norms, activations, products by element), "
        "while results of matrix products are kept",
    )
    offload_activations: Annotated[Place | None, FREE] = Field(
        None,
        description="where that goes which `gradient_checkpointing` keeps: `cpu` (memory, of a base on a GPU) or "
        "`disk` (files that the system writes out when it needs the room); the same numbers, to the bit",
    )
    offload_folder: Annotated[str | None, FREE] = Field(
        None, description="the folder for `disk`; default: that of temporary files, which saves nothing if in memory"
    )
    offload_param: Offload | None = Field(
        None,
        description="`disk`: the base's weights stay in their files and are read block by block, forward and back, so "
        "that a base larger than the memory trains (as they are, or as NF4; [design.md](design.md)); best with "
        "`gradient_checkpointing`: then all micro-batches of a step go through a block together",
    )
    logging_steps: Annotated[int, FREE] = Field(10, gt=0, description="a line of metrics every so many steps of a job")
    save_steps: Annotated[int | None, FREE] = Field(
        None, gt=0, description="a checkpoint every so many steps, besides one at the end and when the run is stopped"
    )
    save_total_limit: Annotated[int, FREE] = Field(2, gt=0, description="how many checkpoints to keep")
    check_disk_space: Annotated[bool, FREE] = Field(
        True, description="before the first step, refuse a disk without room for two checkpoints and the adapters"
    )
    check_memory: Annotated[bool | Literal["auto"], FREE] = Field(
        "auto",
        description="before weights are loaded, `weft train` plans the run and refuses one that does not fit into "
        "memory ([cli.md](cli.md)); `auto`: if the base has 100 million parameters or more",
    )
    callbacks: Annotated[list[str], FREE] = Field(
        [], description="names of callbacks, which hear every event of the run ([extending.md](extending.md))"
    )

    _own_home = field_validator("model", "output_dir")(with_home)
    _home_of_pages = field_validator("offload_folder")(lambda path: path and with_home(path))

    @model_validator(mode="after")
    def _names_differ(self) -> RunConfig:
        names = [job.name for job in self.jobs]
        if self.data is None and any(job.data is None for job in self.jobs):
            raise ValueError("'data' is missing.")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two jobs are named {', '.join(twice)}; give each its own name")
        if self.eval_split is not None and (
            self.eval_size or any(job.eval_data or self.eval_data for job in self.jobs)
        ):
            raise ValueError("eval_split, eval_size and eval_data exclude each other: what to evaluate on is said once")
        if self.bad_records_file is not None and self.on_bad_record != "report":
            raise ValueError("bad_records_file is for on_bad_record: report; nothing else writes it")
        if self.offload_activations is not None and not self.gradient_checkpointing:
            raise ValueError("offload_activations needs gradient_checkpointing: it is what that keeps that goes")
        classifies = any(job.classifies for job in self.jobs)
        for key in ("labels", "text_columns", "label_column"):
            if not classifies and any(getattr(job, key) is not None for job in self.jobs):
                raise ValueError(f"{key} is for classification; add task: sequence_classification")
        return self

    def data_settings(self, job: JobConfig) -> dict[str, object]:
        """The keys that decide how a job's data is read and rendered, as JSON holds them."""
        found = self.model_dump(mode="json", include=set(DataSettings.model_fields) - {"chat_template"})
        found |= {"data": job.data or self.data, "eval_data": job.eval_data or self.eval_data}
        own = {"text_columns": job.text_columns, "label_column": job.label_column}
        return found | own if job.classifies else found

    @model_validator(mode="after")
    def _figures_have_keys_of_their_own(self) -> RunConfig:
        for job in self.jobs:
            taken: dict[str, str] = {}
            for name in parse_sets(job.eval_data or self.eval_data):
                for figure in ("loss", *(class_metrics([0], [0]) if job.classifies else ())):
                    if (other := taken.setdefault(key := eval_key(name, figure), name)) != name:
                        raise ValueError(
                            f"eval_data: the sets '{other}' and '{name}' would both have the figure {key}; give one of "
                            "them another name"
                        )
        return self

    @model_validator(mode="after")
    def _early_stopping_watches_one(self) -> RunConfig:
        for job in self.jobs:
            names, watched = list(parse_sets(job.eval_data or self.eval_data)), job.early_stopping_on
            if watched is None and job.early_stopping_patience is not None and len(names) > 1:
                raise ValueError(
                    f"job '{job.name}': early_stopping_patience watches one set of eval_data; name it, "
                    f"early_stopping_on: {' or '.join(names)}"
                )
            if watched is not None and watched not in names:
                told = ", ".join(filter(None, names))
                raise ValueError(
                    f"job '{job.name}': early_stopping_on is '{watched}', and "
                    + (f"eval_data has the sets {told}.{nearest(watched, names)}" if told else "eval_data has no names")
                )
        if any(job.early_stopping_on for job in self.jobs) and not any(
            job.early_stopping_patience for job in self.jobs
        ):
            raise ValueError("early_stopping_on needs early_stopping_patience: without it nothing stops early")
        return self

    def sketch(self) -> Base:
        """The base's shapes and tokenizer. Raises UserError as ``load_base`` does."""
        return sketch_base(self.model, dtype=self.dtype, shape=self.shape, hub=self.hub, tokens=self.add_tokens)

    def base(self, tokenizer: Any = None) -> Base:
        """The base. Raises UserError as ``load_base`` does."""
        return load_base(
            self.model,
            dtype=self.dtype,
            device=self.device,
            tokenizer=tokenizer,
            shape=self.shape,
            quantization=self.kept,
            hub=self.hub,
            tokens=self.add_tokens,
            offload_param=self.offload_param,
        )

    def renderer(self, tokenizer: Any, positions: int | None = None) -> Renderer:
        """Make the renderer of the run's data, for a base that has ``positions`` (None: any number).

        Raises:
            UserError: a setting asks for what the base or the tokenizer does not have.
        """
        length = self.max_length or positions
        if positions is not None and length is not None and length > positions:
            raise UserError(f"max_length {length} is more than the {positions} positions that {self.model} has.")
        return Renderer(tokenizer, part(RenderSettings, self, max_length=length))
