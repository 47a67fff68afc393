"""The reference of all configuration keys, written from the code: ``python -m weft.cli.reference > docs/config.md``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from weft.core.adapter import MethodConfig
from weft.methods import METHODS
from weft.train.aliases import RENAMED, SWITCHES, VALUES
from weft.train.settings import JobConfig, RunConfig

# What the keys mean; a test sees to it that none is missing and none is left over.
RUN_KEYS: dict[str, str] = {
    "model": "the base: a Hugging Face folder, a hub id, or an embedded model (`tiny-llama`, `tiny-bloom`)",
    "data": "training data: a file, a folder, a pattern, a hub's data set (`owner/name`, `owner/name:split`), a list "
    "of them, or `0.7*a.jsonl + 0.3*b.jsonl`; a job may have its own ([data.md](data.md))",
    "jobs": "one mapping per job; or leave it out, and `method: [lora, prefix_tuning]` makes one job per method",
    "output_dir": "folder of the run",
    "overwrite_output_dir": "delete the run that is in `output_dir` (anything else there is never deleted)",
    "resume": "go on from the newest intact checkpoint in `output_dir`; begins anew if the run never began",
    "eval_data": "data to evaluate on; a job may have its own",
    "eval_split": "without `eval_data`: the share of the records to hold out, chosen by the hash of their content",
    "eval_size": "without `eval_data`: how many records to hold out of the training data, the same for every job",
    "data_format": "format of the records, if it should not be recognised ([data.md](data.md))",
    "columns": "what the format's fields are made of, `{field of the format: field in the data}`; also paths and "
    "templates ([data.md](data.md))",
    "limit": "read only this many records (of each source of `data`)",
    "empty_answers": "what to do with a record whose answer is empty",
    "on_bad_record": "what to do with any other record that cannot be used: list up to 20 and end; leave out and log "
    "how many; or write all of them to a file as well",
    "bad_records_file": "the file for `on_bad_record: report`; default: `bad_records.jsonl` in the run's folder",
    "data_workers": "processes that render the records; the samples and their order are the same for any number",
    "chat_template": "a name ([data.md](data.md)), a `.jinja` file or Jinja text, instead of the tokenizer's own",
    "allow_unknown_markers": "take a named template although the tokenizer has no tokens for its markers",
    "template_kwargs": "variables for the chat template, such as `{enable_thinking: false}`",
    "train_on": "which tokens are learned ([data.md](data.md))",
    "max_length": "longest sequence in tokens; default: what the model can take",
    "truncation": "what becomes of longer records: refused, left out, or cut at an end ([data.md](data.md))",
    "documents": "plain text: a sample each, longer ones in windows, or all joined and cut into windows",
    "window_overlap": "tokens that a window repeats from the one before, as context that is not learned again",
    "audit": "what to do before the first step if the rendered data would train wrongly (nothing to learn, an end that "
    "is not learned, two BOS …): refuse, say so, or do not look ([data.md](data.md))",
    "hub": "where an id of a model or a data set is looked up; `HF_ENDPOINT` names a mirror of Hugging Face",
    "data_hub": "for data sets, if it is another one than `hub`",
    "shape": "`tiny`: the same architecture with two layers of width 64 and random weights, to try a run in seconds",
    "quantization": "how the base's linears are kept: NF4 with double quantisation, or LLM.int8; needs `weft[quant]`",
    "dtype": "what the base computes in: `auto` (as its config says), `float32`, `bfloat16`, `float16`, `float64`",
    "device": "`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:0`",
    "threads": "CPU threads of torch",
    "exact": "one matrix product per job: bit for bit what each job alone would give, and slower",
    "verify_packing": "before the first step, prove on the first batch that a sequence's loss does not depend on its "
    "neighbours ([data.md](data.md))",
    "gradient_checkpointing": "recompute the blocks in the backward pass: less memory, more time",
    "logging_steps": "a line of metrics every so many steps of a job",
    "save_steps": "a checkpoint every so many steps; there is always one at the end and when the run is stopped",
    "save_total_limit": "how many checkpoints to keep",
    "callbacks": "names of callbacks, which hear every event of the run ([extending.md](extending.md))",
}
JOB_KEYS: dict[str, str] = {
    "name": "name of the adapter and of its folder",
    "method": "one of "
    + ", ".join(f"`{name}`" for name in METHODS)
    + "; or several in one adapter, joined by `+` (above)",
    "data": "training data of this job",
    "eval_data": "evaluation data of this job",
    "task": "`causal_lm` writes text, as the base does it (`seq2seq`: only on an encoder-decoder, T5 or "
    "mT5); `sequence_classification` names the class of a text, through a head of the job's "
    "own (on a base that writes or on an encoder)",
    "labels": "classification: names of the classes in order; default: those in the training data",
    "text_columns": "classification: the columns with the text or the pair of texts, if their names are not usual ones "
    "([data.md](data.md))",
    "label_column": "classification: the column with the label, likewise",
    "steps": "optimizer steps; wins over `epochs`",
    "epochs": "passes over the data",
    "batch_size": "records per optimizer step, times `gradient_accumulation_steps`",
    "pack_tokens": "the most tokens that go through the model at once: a step's records are packed into as few passes "
    "as best fit finds; default: the tokens of the fullest batch of the first epoch ([data.md](data.md))",
    "batch_tokens": "instead of `batch_size`: a step is packs of whole records up to this many tokens; "
    "`auto`: `batch_size` times `max_length` ([data.md](data.md))",
    "gradient_accumulation_steps": "makes a step of that many batches; what goes through the model at once stays as "
    "large as one of them",
    "objective": "what is minimised instead of the likelihood of the answers: the name of an extension's objective "
    "([extending.md](extending.md)); evaluation stays the likelihood",
    "objective_settings": "settings of the objective",
    "optimizer": "torch's own",
    "learning_rate": "default: the usual one of the method (below); of several methods in one job each its own",
    "adam_betas": "AdamW's decay rates; `adam_beta1` and `adam_beta2` set one",
    "adam_epsilon": "AdamW's ε",
    "momentum": "of `sgd`",
    "weight_decay": "decoupled for `adamw`",
    "lr_scheduler_type": "after the warm-up",
    "warmup_steps": "wins over `warmup_ratio`",
    "warmup_ratio": "share of the steps in which the rate rises",
    "max_grad_norm": "clip the job's gradients to this norm; 0: do not",
    "seed": "of the job's initial values, order and dropout",
    "eval_steps": "evaluate every so many steps, besides before the first and after the last",
    "early_stopping_patience": "end after so many evaluations without gain, with the best weights; needs `eval_steps`",
    "early_stopping_min_delta": "how much lower a loss must be to count as gain",
    "neftune_noise_alpha": "NEFTune: strength of the noise on the embeddings in training; 5 is usual, 0: none",
}
# What a switch of another tool does here, by key.
SWITCH_MEANINGS: dict[str, str] = {
    "bf16": "`dtype: bfloat16` if on",
    "fp16": "`dtype: float16` if on",
    "use_peft": "`method: lora` if on",
    "train_on_inputs": "`train_on: all` if on",
    "train_on_prompt": "`train_on: all` if on",
    "truncate": "`truncation: right` if on",
    "completion_only_loss": "`train_on: all` if off",
    "assistant_only_loss": "`train_on: all` if off",
    "mask_history": "`train_on: last_answer` if on",
    "loss_scale": "`train_on`: `default` → `answers`, `last_round` → `last_answer`, `all` → `all`",
    "resume_from_checkpoint": "`resume`; a path is refused, a run goes on from its newest checkpoint",
    "max_steps": "`steps`; -1 changes nothing",
    "lora_target": "`target_modules`; names separated by commas, or `all`",
    "lora_target_modules": "`target_modules`",
    "lora_target_linear": "`target_modules: all-linear` if on",
    **dict.fromkeys(
        ("packing", "sample_packing", "neat_packing"),
        "`batch_tokens: auto` if on: packs of `batch_size` times `max_length` tokens, as there",
    ),
    "padding_free": "nothing: no pad token is ever computed",
    "load_in_4bit": "`quantization: nf4` if on",
    "load_in_8bit": "`quantization: int8` if on",
    "quantization_bit": "`quantization`: 4 → `nf4`, 8 → `int8`",
    "quant_bits": "`quantization`: 4 → `nf4`, 8 → `int8`",
    "freeze_trainable_modules": "`trainable_modules`; names separated by commas",
    "name_module_trainable": "`trainable_modules`; names separated by commas",
    "freeze_extra_modules": "`name_patterns`; names separated by commas",
    "use_modelscope": "`hub: modelscope` if on",
    "report_to": "nothing if off; not in this version if on",
}

_INTRO = """\
# Configuration

<!-- Written by `python -m weft.cli.reference`; a test compares. Do not edit. -->

A run is one YAML (or JSON) file. Keys of a job, and settings of its method, may stand at the top, where they are
defaults for every job that knows them:

```yaml
model: tiny-llama
data: train.jsonl
epochs: 2                  # for both jobs
jobs:
- {name: small, method: lora, r: 4}
- {method: prefix_tuning, num_virtual_tokens: 10, learning_rate: 5e-3}
```

One job may carry several methods. They are trained, saved and loaded as one adapter, and act in the order in which they
are named. Settings may stand beside the job's for all that know them, or under a method's name, where they win:

```yaml
method: prefix_tuning+bottleneck
reduction_factor: 8
prefix_tuning: {num_virtual_tokens: 10}
neftune_noise_alpha: 5     # noise on the embeddings goes with any method
```

On the command line `key=value` wins over the file, with YAML's values and dots for what lies deeper:
`learning_rate=1e-3`, `jobs.0.r=16`, `jobs.small.r=16` (by name), `eval_data=` (none). An unknown key is an error that
names the nearest one; so is a key that stands twice. `1e-3` is a number. In Python:
`weft.load_config(path, ["learning_rate=1e-3"])`, or `weft.make_config({...})` for a mapping.
"""


def config_markdown() -> str:
    """The whole page."""
    parts = [
        _INTRO,
        "## The run\n",
        _table(RunConfig.model_fields, RUN_KEYS, {"jobs": "from `method`"}),
        "## A job\n",
        _table(
            {k: v for k, v in JobConfig.model_fields.items() if k != "method_settings"},
            JOB_KEYS,
            {"name": "the method"},
        ),
        "## The methods\n",
        *_methods(),
        "## Keys of other tools\n",
        "Accepted wherever the key itself may stand. Two keys with one meaning in one place are an error.\n",
        _aliases(),
    ]
    return "\n".join(parts)


def _table(fields: Mapping[str, object], meanings: Mapping[str, str], derived: Mapping[str, str]) -> str:
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for key in meanings:
        field = fields[key]
        lines.append(f"| `{key}` | {_type(field)} | {derived.get(key) or _default(field)} | {meanings[key]} |")
    return "\n".join(lines) + "\n"


def _type(field: Any) -> str:
    annotation = field.annotation
    text = getattr(annotation, "__name__", str(annotation)) if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"\b(typing|weft\.[\w.]+)\.", "", text)
    # Choices stand as they are written in YAML.
    text = re.sub(r"Literal\[([^\]]*)\]", lambda found: " | ".join(re.findall(r"'([^']*)'", found[1])), text)
    text = re.sub(r"Union\[(.*)\]", lambda found: found[1].replace(", ", " | "), text)
    text = re.sub(r"tuple\[JobConfig, \.\.\.\]", "list of jobs", text)
    return text.replace(" | None", "").replace("|", "\\|")


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    return "" if field.default is None else f"`{_yaml(field.default)}`"


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _methods() -> Iterator[str]:
    for name, cls in METHODS.items():
        summary = " ".join((cls.__doc__ or "").split()).replace("``", "`")
        yield f"### {name}\n\n{summary} Learning rate by default: {_rates(cls)}.\n"
        lines = ["| key | type | default |", "|---|---|---|"]
        lines += [f"| `{key}` | {_type(field)} | {_default(field)} |" for key, field in cls.model_fields.items()]
        yield "\n".join(lines) + "\n"


def _rates(cls: type[MethodConfig]) -> str:
    small, large = cls.learning_rate(128), cls.learning_rate(2048)
    return f"{large:g}" if small == large else f"{large:g} (bases of width 2048 and more) to {small:g} (128 and less)"


def _aliases() -> str:
    lines = ["| theirs | here |", "|---|---|"]
    lines += [f"| `{key}` | `{ours}` |" for key, ours in RENAMED.items()]
    lines += ["| `adam_beta1`, `adam_beta2` | one of `adam_betas` |"]
    lines += [f"| `{key}` | {SWITCH_MEANINGS[key]} |" for key in SWITCHES]
    for key, words in VALUES.items():
        pairs = ", ".join(f"`{theirs}` → `{ours}`" for theirs, ours in words.items())
        lines.append(f"| values of `{key}` | {pairs} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(config_markdown(), end="")
