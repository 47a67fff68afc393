"""Configuration keys of other tools, and what they are called here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weft.errors import UserError

# One meaning, several names: transformers and TRL, LLaMA-Factory, axolotl, ms-swift.
RENAMED: dict[str, str] = {
    "model_name_or_path": "model",
    "base_model": "model",
    "dataset": "data",
    "train_file": "data",
    "eval_dataset": "eval_data",
    "validation_file": "eval_data",
    "finetuning_type": "method",
    "peft_type": "method",
    "adapter": "method",
    "tuner_type": "method",
    "train_type": "method",
    "lora_r": "r",
    "lora_rank": "r",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_samples": "limit",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "schedule": "lr_scheduler_type",
    "accumulation": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "optim": "optimizer",
    "max_norm": "max_grad_norm",
    "torch_dtype": "dtype",
    "val_size": "eval_size",
    "num_threads": "threads",
    "freeze_trainable_layers": "num_layers_trainable",
    "num_layer_trainable": "num_layers_trainable",
    "num_expand": "num_new_blocks",
    "patience": "early_stopping_patience",
    "neftune_alpha": "neftune_noise_alpha",
    "noisy_embedding_alpha": "neftune_noise_alpha",
}

# The value of batch_tokens that stands for batch_size * max_length; keys that ask for it.
AUTO = "auto"
_SAME = ("packing", "sample_packing", "neat_packing")

# Other tools' words for a value of ours.
VALUES: dict[str, dict[object, object]] = {
    "optimizer": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw"},
    "lr_scheduler_type": {"constant_with_warmup": "constant"},
    "method": {
        "LORA": "lora",
        "PROMPT_TUNING": "prompt_tuning",
        "PREFIX_TUNING": "prefix_tuning",
        "prompt": "prompt_tuning",
        "prefix": "prefix_tuning",
        "adapter": "bottleneck",
        "adapters": "bottleneck",
    },
    "target_modules": {"all": "all-linear"},
}


Meaning = Callable[[Any], tuple[str, Any] | None]


@dataclass(frozen=True)
class Switch:
    """A key of another tool that is a choice here.

    ``means`` makes (our key, our value) of its value, or None where that changes nothing; ``told`` is its line in the
    reference.
    """

    means: Meaning
    told: str


def _on(key: str, value: Any, told: str | None = None) -> Switch:
    return Switch(lambda on: (key, value) if on else None, told or f"`{key}: {value}` if on")


def _targets(value: Any) -> tuple[str, Any]:
    """LLaMA-Factory writes ``q_proj,v_proj``; here a string is a regular expression over whole paths."""
    if isinstance(value, str) and value not in ("all", "all-linear"):
        return "target_modules", [name.strip() for name in value.split(",") if name.strip()]
    return "target_modules", value


def _names(key: str) -> Switch:
    """LLaMA-Factory writes ``mlp,self_attn``, and ``all`` for no choice."""

    def split(value: object) -> tuple[str, object] | None:
        if isinstance(value, str):
            value = [name.strip() for name in value.split(",") if name.strip()]
        return None if value in (None, [], ["all"]) else (key, value)

    return Switch(split, f"`{key}`; names separated by commas")


def _resume(value: object) -> tuple[str, object]:
    if isinstance(value, str):
        raise UserError(
            f"resume_from_checkpoint: {value!r}: a run goes on from the newest intact checkpoint of its output_dir; "
            "write resume: true."
        )
    return "resume", bool(value)


def _only_off(key: str) -> Switch:
    """A feature that is not here: switching it off changes nothing, switching it on cannot be obeyed."""

    def check(value: object) -> None:
        if value not in (None, False, 0, "none", [], ["none"]):
            raise UserError(f"{key}: {value!r} is not in this version of Weft; leave it out.")

    return Switch(check, "nothing if off; not in this version if on")


_BITS = {4: ("quantization", "nf4"), 8: ("quantization", "int8"), None: None, 16: None}


def _bits(value: object) -> tuple[str, object] | None:
    if value not in _BITS:
        raise UserError(f"quantization_bit: {value!r}: a base is kept in 4 (nf4) or 8 bits (int8).")
    return _BITS[value]


# swift's words for which tokens are learned.
_LOSS_SCALES = {"default": None, "last_round": ("train_on", "last_answer"), "all": ("train_on", "all")}


def _loss_scale(value: object) -> tuple[str, object] | None:
    if value not in _LOSS_SCALES:
        raise UserError(f"loss_scale: {value!r} is none of {', '.join(_LOSS_SCALES)}.")
    return _LOSS_SCALES[value]


# Elsewhere these make packs of max_length tokens, and a batch is batch_size of them.
_PACKING = _on(
    "batch_tokens", AUTO, "`batch_tokens: auto` if on: packs of `batch_size` times `max_length` tokens, as there"
)
_ALL_IF_OFF = "`train_on: all` if off"
_QUANTISED = Switch(_bits, "`quantization`: 4 → `nf4`, 8 → `int8`")
SWITCHES: dict[str, Switch] = {
    "bf16": _on("dtype", "bfloat16"),
    "fp16": _on("dtype", "float16"),
    "use_peft": _on("method", "lora"),
    "train_on_inputs": _on("train_on", "all"),
    "train_on_prompt": _on("train_on", "all"),
    "truncate": _on("truncation", "right"),
    "completion_only_loss": Switch(lambda on: None if on or on is None else ("train_on", "all"), _ALL_IF_OFF),
    "assistant_only_loss": Switch(lambda on: None if on else ("train_on", "all"), _ALL_IF_OFF),
    "mask_history": _on("train_on", "last_answer"),
    "loss_scale": Switch(_loss_scale, "`train_on`: `default` → `answers`, `last_round` → `last_answer`, `all` → `all`"),
    "resume_from_checkpoint": Switch(_resume, "`resume`; a path is refused, a run goes on from its newest checkpoint"),
    "load_in_4bit": _on("quantization", "nf4"),
    "load_in_8bit": _on("quantization", "int8"),
    "quantization_bit": _QUANTISED,
    "quant_bits": _QUANTISED,
    "use_modelscope": _on("hub", "modelscope"),
    # transformers' -1 says that num_train_epochs counts.
    "max_steps": Switch(
        lambda count: None if count in (None, -1, 0) else ("steps", count), "`steps`; -1 changes nothing"
    ),
    "lora_target": Switch(_targets, "`target_modules`; names separated by commas, or `all`"),
    "lora_target_modules": Switch(_targets, "`target_modules`"),
    "freeze_trainable_modules": _names("trainable_modules"),
    "name_module_trainable": _names("trainable_modules"),
    "freeze_extra_modules": _names("name_patterns"),
    "lora_target_linear": _on("target_modules", "all-linear"),
    # Batches here never hold padding, whatever this says.
    "padding_free": Switch(lambda on: None, "nothing: no pad token is ever computed"),
    "packing": _PACKING,
    "sample_packing": _PACKING,
    "neat_packing": _PACKING,
    "report_to": _only_off("report_to"),
}


def translate(given: Mapping[str, object], where: str) -> dict[str, Any]:
    """Keys and values of ``given`` in our words.

    Raises:
        UserError: a key is no string, or two keys mean the same thing.
    """
    out: dict[str, Any] = {}
    came_from: dict[str, str] = {}
    for key, value in given.items():
        if not isinstance(key, str):
            raise UserError(f"{where}: key {key!r} is not a string.")
        name, meaning = RENAMED.get(key, key), value
        if key in SWITCHES:
            pair = SWITCHES[key].means(value)
            if pair is None:
                continue
            name, meaning = pair
        elif key in ("adam_beta1", "adam_beta2"):
            betas = list(out.get("adam_betas", (0.9, 0.999)))
            betas[key == "adam_beta2"] = value
            out["adam_betas"] = betas
            continue
        if came_from.get(name) in _SAME and key in _SAME:
            continue  # LLaMA-Factory's neat_packing stands beside packing
        if name in came_from:
            raise UserError(f"{where}: '{came_from[name]}' and '{key}' mean the same thing; keep one.")
        came_from[name] = key
        out[name] = _value(name, meaning)
    return out


def _value(name: str, value: object) -> object:
    words = VALUES.get(name, {})
    if name == "neftune_noise_alpha" and value is None:
        return 0.0  # transformers' word for off
    if isinstance(value, list) and name == "method":
        return [_value(name, v) for v in value]
    if name == "method" and isinstance(value, str) and "+" in value:
        return "+".join(str(_value(name, part.strip())) for part in value.split("+"))
    return words.get(value, value) if isinstance(value, str) else value
