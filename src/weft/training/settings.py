"""The configuration's model of a run of many jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from weft.base.offload import Place
from weft.complaints import Worded
from weft.data import Renderer
from weft.data.rendering.drafts import RenderSettings
from weft.data.settings import FREE, DataPaths, DataSettings, checked_paths, part
from weft.data.sources import parse_sets, parse_sources
from weft.errors import UserError, nearest
from weft.models import Base, load_base
from weft.models.hub import Hub
from weft.models.load import Shape, sketch_base
from weft.models.offload import Offload
from weft.objectives import class_metrics
from weft.paths import with_home
from weft.training.job_settings import JobConfig
from weft.training.quantization import QuantizationSettings
from weft.training.trackers.names import TRACKERS, tracker_names

OWN_TEXT = "base"  # in the place of a path of general text: what the base itself writes


def eval_key(name: str, figure: str) -> str:
    """The key of a figure of an evaluation, as in transformers: ``eval_loss``, of a named set ``eval_domain_loss``."""
    return f"eval_{name}_{figure}" if name else f"eval_{figure}"


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
    forgetting_eval: DataPaths | None = Field(
        None,
        description="general text to measure forgetting on: a file (or whatever `data` may be, without weights), or "
        "`base`: texts that the base itself writes before training. It is measured before the first step, every "
        "`eval_steps`, at every checkpoint of `save_steps` and at the end ([forgetting.md](forgetting.md))",
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

    report_to: Annotated[list[str], FREE] = Field(
        [],
        description="trackers that hear what is logged, beside `metrics.jsonl`: "
        + ", ".join(f"`{name}`" for name in TRACKERS)
        + ", in a list or as one word; `none`. Each writes to the disk alone, unless its own settings say otherwise "
        "([sweep.md](sweep.md))",
    )

    _trackers = field_validator("report_to", mode="before")(tracker_names)
    _own_home = field_validator("model", "output_dir")(with_home)
    _general = field_validator("forgetting_eval", mode="before")(checked_paths)
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

    @model_validator(mode="after")
    def _forgetting_is_measured(self) -> RunConfig:
        if self.forgetting_eval is None:
            for job in self.jobs:
                if job.max_forgetting is not None:
                    raise ValueError(
                        f"job '{job.name}': max_forgetting needs forgetting_eval, the text to measure it on: a file, "
                        "or `base`"
                    )
            return self
        if all(job.classifies for job in self.jobs):
            raise ValueError("forgetting_eval is for jobs that write: what names classes has no loss of a text")
        if any(source.weight is not None for source in parse_sources(self.forgetting_eval)):
            raise ValueError("forgetting_eval has weights; every text of it is measured once. Leave them out")
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
