"""Configuration keys of other tools, and what they are called here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weft.errors import UserError, shown
from weft.switches import is_on, switch_of
from weft.training.bits import in_our_words
from weft.training.optimizers import OPTIMIZERS
from weft.training.schedules import SCHEDULES

# Our key -> the names that transformers and TRL, LLaMA-Factory, axolotl and ms-swift have for it.
_NAMES: dict[str, tuple[str, ...]] = {
    "model": ("model_name_or_path", "base_model"),
    "data": ("dataset", "train_dataset", "train_file"),
    "eval_data": ("eval_dataset", "validation_file"),
    "method": ("finetuning_type", "peft_type", "adapter", "tuner_type", "train_type"),
    "r": ("lora_r", "lora_rank"),
    "max_length": ("cutoff_len", "sequence_len", "max_seq_length"),
    "batch_size": ("per_device_train_batch_size", "micro_batch_size"),
    "epochs": ("num_train_epochs", "num_epochs"),
    "limit": ("max_samples",),
    "learning_rate": ("lr",),
    "lr_scheduler_type": ("lr_scheduler", "schedule"),
    "gradient_accumulation_steps": ("accumulation", "gradient_accumulation"),
    "optimizer": ("optim",),
    "max_grad_norm": ("max_norm", "gradient_clipping"),
    "dtype": ("torch_dtype",),
    "eval_size": ("val_size",),
    "threads": ("num_threads",),
    "num_layers_trainable": ("freeze_trainable_layers", "num_layer_trainable"),
    "num_new_blocks": ("num_expand",),
    "early_stopping_patience": ("patience",),
    "gradient_checkpointing": ("enable_activation_checkpointing",),
    "neftune_noise_alpha": ("neftune_alpha", "noisy_embedding_alpha"),
}
RENAMED = {theirs: ours for ours, names in _NAMES.items() for theirs in names}

# AUTO is the value of batch_tokens that stands for batch_size * max_length; the keys in _SAME ask for it.
AUTO = "auto"
_SAME = ("packing", "sample_packing", "neat_packing")

# The words that other tools have for our values.
VALUES: dict[str, dict[object, object]] = {
    "optimizer": {
        theirs: ours
        for ours, names in {
            "adamw": ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla"),
            "adamw_8bit": ("adamw_bnb_8bit",),
            "paged_adamw": ("paged_adamw_32bit",),
            "lion": ("lion_32bit",),
            "apollo": ("apollo_adamw",),
        }.items()
        for theirs in names
    },
    "lr_scheduler_type": {
        "constant_with_warmup": "constant",
        "cosine_warmup_with_min_lr": "cosine_with_min_lr",
        "wsd": "warmup_stable_decay",
    },
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

# Their values that are something else than all that we have, and what is said of them.
_OTHERS: dict[str, dict[str, str]] = {
    "optimizer": {
        **dict.fromkeys(("adamw_torch_8bit", "adamw_torch_4bit"), "`adamw_8bit` keeps its state in 8 bits"),
        **dict.fromkeys(
            ("adagrad", "rmsprop", "rmsprop_bnb", "lion_8bit", "paged_lion_8bit", "paged_lion_32bit", "ademamix",
             "ademamix_8bit", "adamw_anyprecision", "galore_adamw", "galore_adafactor", "grokadamw",
             "schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam", "stable_adamw", "muon"),
            "it takes other steps"),
        **dict.fromkeys(("lomo", "adalomo"), "`layerwise_updates` frees gradients as it does, with any optimizer"),
    },
    "lr_scheduler_type": dict.fromkeys(
        ("reduce_lr_on_plateau", "greedy"),
        "it listens to the evaluations; early_stopping_patience is what does so here",
    ),
}  # fmt: skip
_OTHERS["gradient_checkpointing"] = {
    "offload": "true and offload_activations: cpu are that",
    "unsloth": "true and offload_activations: cpu are nearest",
    "offload_disk": "true and offload_activations: disk are that",
}
_KNOWN = {
    "optimizer": ", ".join(OPTIMIZERS),
    "lr_scheduler_type": ", ".join(SCHEDULES),
    "gradient_checkpointing": "true, false, a number, cheap",
}

Meaning = Callable[[Any], tuple[str, Any] | None]


@dataclass(frozen=True)
class Switch:
    """A key of another tool that is a choice here.

    ``means`` makes (our key, our value) of its value, or None where that changes nothing; ``told`` is its line in the
    reference. ``on_or_off``: its value is a word for on or off.
    """

    means: Meaning
    told: str
    on_or_off: bool = False


def _on(key: str, value: Any, told: str | None = None) -> Switch:
    return Switch(lambda on: (key, value) if on else None, told or f"`{key}: {value}` if on", on_or_off=True)


def _listed(value: object) -> object:
    """LLaMA-Factory writes ``q_proj,v_proj``; here a string is a regular expression over whole paths."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _targets(value: object) -> tuple[str, object]:
    return "target_modules", value if value in ("all", "all-linear") else _listed(value)


def _names(key: str) -> Switch:
    """A list of names, with ``all`` for no choice."""
    return Switch(
        lambda value: None if _listed(value) in (None, [], ["all"]) else (key, _listed(value)),
        f"`{key}`; names separated by commas",
    )


def _resume(value: object) -> tuple[str, object]:
    if isinstance(value, str) and switch_of(value) is None:
        raise UserError(
            f"resume_from_checkpoint: {shown(value)}: a run goes on from the newest intact checkpoint of its "
            "output_dir; write resume: true."
        )
    return "resume", is_on(value, "resume_from_checkpoint")


def _word(table: Mapping[object, tuple[str, str] | None], problem: str, told: str) -> Switch:
    """A key whose few values each stand for a key and a value here; ``problem`` is the message for any other."""

    def look_up(value: object) -> tuple[str, str] | None:
        if value not in table:
            raise UserError(problem.format(shown(value)))
        return table[value]

    return Switch(look_up, told)


def _how_to_checkpoint(value: object) -> None:
    """transformers hands these on to torch.utils.checkpoint; the kind of recomputation changes no number."""
    if value is not None and not (isinstance(value, Mapping) and set(value) <= {"use_reentrant"}):
        raise UserError(
            f"gradient_checkpointing_kwargs: {shown(value)}: only use_reentrant is known, which changes nothing here; "
            "leave it out."
        )


def _offloading(value: object) -> tuple[str, str] | None:
    """TRL's and torchtune's switch; axolotl also writes ``disk``."""
    place = value if value in ("disk", "cpu") else "cpu" if is_on(value, "activation_offloading") else None
    return None if place is None else ("offload_activations", str(place))


_OFFLOADING = Switch(_offloading, "`offload_activations`: on → `cpu`, `disk` → `disk`; with `gradient_checkpointing`")
# Elsewhere these make packs of max_length tokens, and a batch is batch_size of them.
_PACKING = _on(
    "batch_tokens", AUTO, "`batch_tokens: auto` if on: packs of `batch_size` times `max_length` tokens, as there"
)
_ALL_IF_OFF = "`train_on: all` if off"
# swift's words for which tokens are learned.
_LOSS_SCALE = _word(
    {"default": None, "last_round": ("train_on", "last_answer"), "all": ("train_on", "all")},
    "loss_scale: {} is none of default, last_round, all.",
    "`train_on`: `default` → `answers`, `last_round` → `last_answer`, `all` → `all`",
)
SWITCHES: dict[str, Switch] = {
    "bf16": _on("dtype", "bfloat16"),
    "fp16": _on("dtype", "float16"),
    "use_peft": _on("method", "lora"),
    "train_on_inputs": _on("train_on", "all"),
    "train_on_prompt": _on("train_on", "all"),
    "truncate": _on("truncation", "right"),
    "completion_only_loss": Switch(lambda on: None if on or on is None else ("train_on", "all"), _ALL_IF_OFF, True),
    "assistant_only_loss": Switch(lambda on: None if on else ("train_on", "all"), _ALL_IF_OFF, True),
    "mask_history": _on("train_on", "last_answer"),
    "loss_scale": _LOSS_SCALE,
    "resume_from_checkpoint": Switch(_resume, "`resume`; a path is refused, a run goes on from its newest checkpoint"),
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
    "gradient_checkpointing_kwargs": Switch(
        _how_to_checkpoint, "nothing if it is `{use_reentrant: …}`; others are refused"
    ),
    "disable_gradient_checkpointing": Switch(
        lambda off: None if off or off is None else ("gradient_checkpointing", True),
        "`gradient_checkpointing: true` if off",
        on_or_off=True,
    ),
    "activation_offloading": _OFFLOADING,
    "enable_activation_offloading": _OFFLOADING,
}


def translate(given: Mapping[str, object], where: str) -> dict[str, Any]:
    """Keys and values of ``given`` in our words.

    Raises:
        UserError: a key is no string, or two keys mean the same thing.
    """
    out: dict[str, Any] = {}
    came_from: dict[str, str] = {}
    for key in given:
        if not isinstance(key, str):
            raise UserError(f"{where}: key {key!r} is not text.")
    for key, value in in_our_words(given, where).items():
        name, meaning = RENAMED.get(key, key), value
        if key in SWITCHES:
            switch = SWITCHES[key]
            pair = switch.means(is_on(value, f"{where}: {key}") if switch.on_or_off and value is not None else value)
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
    other = _OTHERS.get(name, {}).get(value.lower()) if isinstance(value, str) else None
    if other is not None:
        raise UserError(f"{name}: {shown(value)} is not in this version of Weft ({other}). There are: {_KNOWN[name]}.")
    if name == "neftune_noise_alpha" and value is None:
        return 0.0  # transformers' word for off
    if isinstance(value, list) and name == "method":
        return [_value(name, v) for v in value]
    if name == "method" and isinstance(value, str) and "+" in value:
        return "+".join(str(_value(name, part.strip())) for part in value.split("+"))
    return words.get(value, value) if isinstance(value, str) else value
