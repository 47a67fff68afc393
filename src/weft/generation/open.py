"""Targets, which one can talk to: the folder of a run, an adapter in PEFT's layout, a plain model.

A run's folder answers by itself: it says which base, chat template, tokenizer and adapters belong together. If the run
has not ended, its newest intact checkpoint stands in for the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from weft.adapters import Adapters
from weft.assets import EMBEDDED_MODELS
from weft.data import Renderer
from weft.data.provenance import Provenance, make_renderer
from weft.data.queries import settings_of
from weft.errors import UserError
from weft.files.adapter_folder import (
    CONFIG,
    OWN_CONFIG,
    added_tokens,
    base_of,
    is_adapter,
    merged_from,
    name_for,
    provenance_of,
    trained_on,
)
from weft.files.run_folder import RUN_FILE, RunStore, run_of
from weft.generation.target import BASE, Target
from weft.heads.reward import task_of
from weft.methods.dense import KEPT, how_kept
from weft.models import Base, load_base
from weft.models.load import check_device, load_tokenizer, resolve_dtype, resolve_model
from weft.models.quantize import Kind, Quantization
from weft.paths import local_path
from weft.training.config import RunConfig, read_run_config
from weft.training.same_run import other_base


def open_target(
    target: str | Path,
    *,
    model: str | None = None,
    adapters: str | Sequence[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantization: Quantization | Kind | None = None,
    chat_template: str | None = None,
) -> Target:
    """Open a run's folder, an adapter's folder, or a model (folder, hub id, embedded name).

    Args:
        target: what to open.
        model: the base to use instead of the one that the target names.
        adapters: load only this one, or these, of a run; default all. ``base`` is always there.
        device, dtype: as in a run's configuration.
        quantization: how the base is kept; default: as in training, if the folder says it, or as the model lies there.
        chat_template: to render prompts with, instead of the one of training.

    Raises:
        UserError: nothing usable is there, a file is damaged, or the base is not the one that was trained on.
    """
    kept = Quantization.of(quantization)
    asked = _Overrides(model=model, device=device, dtype=dtype, quantization=kept, chat_template=chat_template)
    folder = local_path(target)
    adapters = [adapters] if isinstance(adapters, str) else adapters
    if (folder / RUN_FILE).is_file():
        return _open_run(folder, asked, adapters)
    if is_adapter(folder):
        run = run_of(folder)
        if run is not None and model is None:
            return _open_run(run, asked, [folder.absolute().name])
        return _open_adapter(folder, asked)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no run ({RUN_FILE}), no adapter ({CONFIG}) and no model (config.json). Give one of these, "
            "a hub id, or the name of an embedded model."
        )
    if model is not None:
        raise UserError(
            f"{target} is no run and no adapter, so that --model has no base to replace. Leave one of them out."
        )
    return _open_model(str(target), asked)


def leaves_out_bad_records(target: str | Path) -> bool:
    """Whether the training of a run or an adapter left out bad records.

    Raises:
        UserError: A file that should say so is damaged.
    """
    folder = local_path(target)
    if (folder / RUN_FILE).is_file():
        return read_run_config(folder).on_bad_record != "error"
    record = Provenance.read(provenance_of(folder), str(folder / OWN_CONFIG))
    return settings_of((record.settings if record else None) or {}).on_bad_record != "error"


@dataclass(frozen=True, kw_only=True)
class _Overrides:
    """The user's choices, which win over what the target says; see ``open_target``."""

    model: str | None
    device: str
    dtype: str
    quantization: Quantization | None
    chat_template: str | None

    def check(self, base: str) -> None:
        """Refuse a base that is not there, and unknown names, before any library is asked."""
        resolve_model(base)
        resolve_dtype(self.dtype)
        check_device(self.device)


def _open_model(name: str, asked: _Overrides) -> Target:
    """Open a model alone; one that ``weft merge`` wrote says how to ask it."""
    folder = local_path(name)
    merged = merged_from(folder)
    if merged is not None and "labels" in merged:
        raise UserError(
            f"{folder} is a merged classifier; transformers runs it: pipeline('text-classification', '{folder}'). With "
            "Weft, ask the adapter that it was made of."
        )
    record = None if merged is None else Provenance.read(provenance_of(folder), str(folder / OWN_CONFIG))
    asked.check(name)
    base = load_base(name, device=asked.device, dtype=asked.dtype, quantization=asked.quantization)
    renderer, notes = make_renderer(record, base.tokenizer, asked.chat_template)
    return Target(base, Adapters(base.model, base.architecture), renderer, notes=notes)


def _open_adapter(folder: Path, asked: _Overrides) -> Target:
    record = Provenance.read(provenance_of(folder), str(folder / OWN_CONFIG))
    source = asked.model or base_of(folder)
    if source is None:
        raise UserError(f"{folder / CONFIG} does not say which base the adapter is for; name it with --model.")
    # An adapter learned beside the weights of its training, and answers otherwise beside others.
    kept = asked.quantization or Quantization.recorded(trained_on(folder) or {}, f"{folder / OWN_CONFIG}: base")
    try:
        asked.check(source)
        # An adapter that was saved with its tokenizer (trainers do) was trained with that one and its chat template.
        tokenizer = load_tokenizer(str(folder)) if (folder / "tokenizer_config.json").is_file() else None
        base = load_base(
            source,
            device=asked.device,
            dtype=asked.dtype,
            tokenizer=tokenizer,
            quantization=kept,
            tokens=added_tokens(folder, tokenizer),
        )
    except UserError as error:
        hint = "" if asked.model else f" ({CONFIG} names this base; --model takes another place)"
        raise UserError(f"{error}{hint}") from None
    renderer, notes = make_renderer(record, base.tokenizer, asked.chat_template)
    if record is None and tokenizer is None and asked.chat_template is None and (folder / OWN_CONFIG).is_file():
        notes.append(f"{folder} does not say which chat template it was trained with; the tokenizer's own is used.")
    adapters, name = Adapters(base.model, base.architecture), name_for(folder)
    difference = _difference(base, folder, adapters)
    try:
        adapters.load(name, folder, tokenizer=base.tokenizer)
    except UserError as error:
        adapters.close()
        raise UserError(f"{_not_its_base(difference)}{error}") from None
    if difference is not None:
        notes.append(f"{base.name} is not the base that {folder} was trained on ({difference}).")
    read = {name: (record.settings if record else None) or {}}
    return Target(base, adapters, renderer, names=(name,), data_settings=read, notes=notes)


def _open_run(folder: Path, asked: _Overrides, wanted: Sequence[str] | None) -> Target:
    config = read_run_config(folder)
    store = RunStore(folder)
    names = [job.name for job in config.jobs]
    keep = names if wanted is None else [name for name in names if name in wanted]
    unknown = [name for name in wanted or () if name not in names and name != BASE]
    if unknown:
        raise UserError(f"{folder} has no adapter '{unknown[0]}'; there are: {', '.join(names)} (and {BASE}).")
    failed = store.failed(keep)
    if failed and (wanted is not None or len(failed) == len(keep)):
        name, reason = next(iter(failed.items()))
        raise UserError(f"{folder} has no adapter '{name}', for its job failed: {reason}.")
    keep = [name for name in keep if name not in failed]
    recorded = store.read_run().get("base")
    recorded = recorded if isinstance(recorded, dict) else {}
    source = asked.model or _base_of(config, recorded)
    asked.check(source)
    tokenizer = load_tokenizer(str(store.tokenizer)) if store.tokenizer.is_dir() else None
    dtype = config.dtype if asked.dtype == "auto" else asked.dtype
    update: dict[str, object] = {"model": source, "device": asked.device, "dtype": dtype}
    if asked.quantization is not None:
        update["quantization"] = asked.quantization.kind
    base = config.model_copy(update=update).base(tokenizer)
    as_trained = asked.dtype == "auto" and asked.quantization is None
    difference = other_base(base, recorded) if recorded and as_trained else None
    if asked.model is None and difference is not None:
        raise UserError(
            f"the model at {base.name} is not the one that {folder} was trained on: its tensors have changed since "
            f"({difference}). Put the old one back; or name a base with --model to use it all the same."
        )
    renderer, notes = _renderer_of_run(store, config, base, keep, asked.chat_template)
    notes += [f"there is no adapter '{name}', for its job failed: {reason}" for name, reason in failed.items()]
    adapters = Adapters(base.model, base.architecture)
    try:
        notes += _add_adapters(adapters, store, config, keep, base)
    except UserError as error:
        raise UserError(f"{_not_its_base(difference)}{error}") from None
    if difference is not None:
        notes.append(f"{base.name} is not the base that {folder} was trained on ({difference}).")
    read = {job.name: config.data_settings(job) for job in config.jobs if job.name in keep}
    others = tuple(name for name in names if name not in keep and name not in failed)
    return Target(base, adapters, renderer, names=tuple(keep), others=others, data_settings=read, notes=notes)


def _renderer_of_run(
    store: RunStore, config: RunConfig, base: Base, names: Sequence[str], chat_template: str | None
) -> tuple[Renderer, list[str]]:
    """Make the renderer that the finished adapters name; before there are any, that of the configuration."""
    saved = [store.adapters / name for name in names if (store.adapters / name / OWN_CONFIG).is_file()]
    section = provenance_of(saved[0]) if saved else None
    if section is None:
        asked = {"chat_template": chat_template} if chat_template else {}
        return config.unlimited().model_copy(update=asked).renderer(base.tokenizer), []
    return make_renderer(Provenance.read(section, str(saved[0] / OWN_CONFIG)), base.tokenizer, chat_template)


def _base_of(config: RunConfig, recorded: dict[str, object]) -> str:
    """The base's path as recorded, since the configuration's may be relative to where the run was started."""
    path = recorded.get("model")
    if config.model not in EMBEDDED_MODELS and isinstance(path, str) and Path(path).is_dir():
        return path
    return config.model


def _difference(base: Base, folder: Path, adapters: Adapters) -> str | None:
    """How the base differs from the one of the adapter's training; None where it does not, or that is not known."""
    recorded = trained_on(folder) or {}
    here = how_kept(adapters.model, adapters.dtype)
    if any(recorded.get(key) != here.get(key) for key in KEPT):
        return None  # the tensors are rounded otherwise, which says nothing of where they come from
    return other_base(base, {"model": base_of(folder), **recorded})


def _not_its_base(difference: str | None) -> str:
    return "" if difference is None else f"this is not the base of its training ({difference}). So it does not fit: "


def _add_adapters(
    adapters: Adapters, store: RunStore, config: RunConfig, names: Sequence[str], base: Base
) -> list[str]:
    """Load the finished adapters, and the others from the newest checkpoint; returns what the user should know."""
    unfinished = []
    for name in names:
        folder = store.adapters / name
        if folder.is_dir():  # it is finished; if a file of it is gone, the user is told, and nothing older answers
            adapters.load(name, folder, tokenizer=base.tokenizer)
        else:
            unfinished.append(name)
    if not unfinished:
        return []
    found = store.latest()
    if found is None:
        raise UserError(f"{store.folder} has neither finished adapters nor a checkpoint yet (see save_steps).")
    state, tensors, warnings = found
    jobs = {job.name: job for job in config.jobs}
    for name in unfinished:
        named = store.read_run().get("labels", {}).get(name)
        adapter = adapters.add(
            name,
            jobs[name].method_on(base),
            seed=jobs[name].seed,
            tokenizer=base.tokenizer,
            head=task_of(named) if named else None,
        )
        stored = tensors.get(name, {})
        with torch.no_grad():
            for key, parameter in adapter.named_parameters():
                value = stored.get(f"parameter.{key}")
                if value is None or value.shape != parameter.shape:
                    raise UserError(f"{store.folder}: the checkpoint does not fit the configuration of job '{name}'.")
                parameter.copy_(value)
    return [*warnings, f"the run is not finished: {', '.join(unfinished)} as of step {state['step']}"]
