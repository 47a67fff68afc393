"""Targets, which one can talk to: the folder of a run, an adapter in PEFT's layout, a plain model.

A run's folder answers by itself: it says which base, chat template, tokenizer and adapters belong together. If the run
has not ended, its newest intact checkpoint stands in for the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import get_args

import torch

from weft.adapters import Adapters
from weft.assets import EMBEDDED_MODELS
from weft.data import Message, Prompt, Renderer
from weft.data.pipeline import Recipe
from weft.data.provenance import Provenance, make_renderer
from weft.data.queries import (
    ClassQueryRecipe,
    Query,
    QueryRecipe,
    given_queries,
    read_queries,
    reading_of,
    settings_of,
)
from weft.data.rendering.drafts import RenderSettings
from weft.data.settings import part
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
from weft.generation.engine import check_writes
from weft.heads.classification import ClassificationTask
from weft.methods.dense import how_kept
from weft.models import Base, load_base
from weft.models.load import check_device, load_tokenizer, resolve_dtype, resolve_model
from weft.models.quantize import Quantization
from weft.models.token_rows import check_rows
from weft.paths import local_path
from weft.training.config import RunConfig, read_run_config
from weft.training.same_run import other_base

BASE = "base"
# The limit of an answer where neither the user nor the model sets one.
_DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Target:
    """A base with adapters, and the renderer that their training used.

    Attributes:
        names: the adapters, in the run's order; empty for a plain model.
        data_settings: how each adapter's training read its data, as far as that is known.
        notes: what the user should know, such as that an adapter comes from a checkpoint.
    """

    base: Base
    adapters: Adapters
    renderer: Renderer
    _: KW_ONLY
    names: tuple[str, ...] = ()
    data_settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends an answer: the tokenizer's, the model's and the renderer's."""
        check_writes(self.adapters, None)
        configured = getattr(self.base.model, "generation_config", None)
        eos = getattr(configured, "eos_token_id", None)
        ids = eos if isinstance(eos, list) else [eos]
        return frozenset(
            i for i in (*ids, self.base.tokenizer.eos_token_id, self.renderer.eos_token_id) if isinstance(i, int)
        )

    def adapter(self, name: str | None) -> str | None:
        """The adapter's name as ``Request`` wants it; ``base`` (unless an adapter is called so) and None are the base.

        Raises:
            UserError: there is no such adapter.
        """
        if name is None or (name == BASE and name not in self.names):
            return None
        self.adapters[name]
        return name

    def prompt(self, prompt: str | Sequence[Message], *, raw: bool = False) -> Prompt:
        """Ids and slots of a prompt: a conversation, or a text that is one question (``raw``: to be continued)."""
        if isinstance(prompt, str) and not raw:
            return self.prompt([Message("user", prompt)])
        if isinstance(prompt, str):
            made = Prompt(list(self.renderer.tokenizer(prompt, verbose=False)["input_ids"]))
        else:
            made = self.renderer.prompt(prompt, task=self.adapters.architecture.task)
        check_rows(made.ids, self.base.token_rows, self.base.tokenizer, "the prompt")
        return made

    def prompt_ids(self, prompt: str | Sequence[Message], *, raw: bool = False) -> list[int]:
        """``prompt(...).ids``, for adapters that need no slots."""
        return self.prompt(prompt, raw=raw).ids

    def queries(
        self, source: Path | Sequence[str], adapter: str | None, *, system: str | None = None, raw: bool = False
    ) -> list[Query]:
        """The questions of a file, or of texts, read and rendered as in the training of ``adapter``.

        Args:
            source: The path of a file, or texts that the user gave.
            adapter: The adapter that is asked; None: the base, whose prompts are those of the first adapter.
            system: A message before each question.
            raw: Whether texts are to be continued as they stand.

        Raises:
            UserError: A record cannot be asked; it is about the first one.
        """
        given = self.data_settings.get(adapter or next(iter(self.names), ""), {})
        settings, known = settings_of(given), self.adapters.architecture
        recipe: Recipe
        if adapter is not None and not self.adapters.head(adapter).writes:
            cut = settings.truncation in ("left", "right", "middle")
            limits = {"max_length": settings.max_length or known.max_length if cut else None, "chat_template": None}
            columns, label = given.get("text_columns"), given.get("label_column")
            recipe = ClassQueryRecipe(
                renderer=Renderer(self.renderer.tokenizer, part(RenderSettings, settings, **limits)),
                token_rows=self.base.token_rows,
                labels=self.adapters[adapter].head.labels,
                text_columns=[str(name) for name in columns] if isinstance(columns, (list, tuple)) else None,
                label_column=label if isinstance(label, str) else None,
                encoder=not known.writes,
            )
        else:
            recipe = QueryRecipe(
                renderer=self.renderer,
                token_rows=self.base.token_rows,
                settings=reading_of(source, settings) if isinstance(source, Path) else settings,
                task=known.task,
                system=system,
                raw=raw,
            )
        return read_queries(source, recipe) if isinstance(source, Path) else given_queries(source, recipe, "--prompt")

    def room(
        self, length: int, adapter: str | None, wanted: int | None, *, what: str = "the prompt", clip: bool = False
    ) -> int:
        """How many tokens may follow a prompt of ``length``: ``wanted``, or what is usual and fits.

        Raises:
            UserError: the prompt leaves no room, or less than ``wanted`` (unless ``clip``).
        """
        limit = self.adapters.architecture.max_length
        if limit is None:
            return wanted or _DEFAULT_NEW_TOKENS
        learned = 0 if adapter is None else self.adapters[adapter].num_learned_tokens
        left = limit - length - learned
        if left < (1 if clip or wanted is None else wanted):
            taken = f"{length} tokens" + f" and the adapter's {learned}" * bool(learned)
            asked = f" (max_new_tokens: {wanted})" * (wanted is not None)
            raise UserError(f"{what}: {taken} of the model's {limit} positions leave no room for an answer{asked}.")
        return min(wanted or _DEFAULT_NEW_TOKENS, left)

    def summary(self) -> str:
        """One line on what was loaded: base, adapters, how the base is kept, where it is, and the chat template."""
        kept = how_kept(self.base.model, self.adapters.dtype)
        how = ", ".join(str(part) for part in (kept["dtype"], kept["quantization"], self.adapters.device) if part)
        template = {"own": "the tokenizer's", "asked": "the one of training or given", "fallback": "plain headings"}
        return (
            f"base {self.base.name} ({self.adapters.architecture.model_type}, {how}); adapters: "
            f"{', '.join(self.names) or 'none'}; chat template: {template[self.renderer.template.origin]}"
        )

    def close(self) -> None:
        """Take the adapters off; the model is again the one that was loaded."""
        self.adapters.close()


def open_target(
    target: str | Path,
    *,
    model: str | None = None,
    adapters: Sequence[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantization: Quantization | None = None,
    chat_template: str | None = None,
) -> Target:
    """Open a run's folder, an adapter's folder, or a model (folder, hub id, embedded name).

    Args:
        target: what to open.
        model: the base to use instead of the one that the target names.
        adapters: load only these of a run; default all. ``base`` is always there.
        device, dtype: as in a run's configuration.
        quantization: how the base of an adapter's folder is kept; default: as in training, if the folder says it.
        chat_template: to render prompts with, instead of the one of training.

    Raises:
        UserError: nothing usable is there, a file is damaged, or the base is not the one that was trained on.
    """
    asked = _Overrides(model=model, device=device, dtype=dtype, quantization=quantization, chat_template=chat_template)
    folder = local_path(target)
    if (folder / RUN_FILE).is_file():
        return _open_run(folder, asked, adapters)
    if merged_from(folder) is None and is_adapter(folder):
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
    base = load_base(name, device=asked.device, dtype=asked.dtype)
    renderer, notes = make_renderer(record, base.tokenizer, asked.chat_template)
    return Target(base, Adapters(base.model, base.architecture), renderer, notes=notes)


def _open_adapter(folder: Path, asked: _Overrides) -> Target:
    record = Provenance.read(provenance_of(folder), str(folder / OWN_CONFIG))
    source = asked.model or base_of(folder)
    if source is None:
        raise UserError(f"{folder / CONFIG} does not say which base the adapter is for; name it with --model.")
    # An adapter learned beside the weights of its training, and answers otherwise beside others.
    kept = asked.quantization or (trained_on(folder) or {}).get("quantization")
    if kept not in (None, *get_args(Quantization)):
        raise UserError(
            f"{folder / OWN_CONFIG}: base.quantization is {kept!r}; expected null or one of "
            f"{', '.join(get_args(Quantization))}."
        )
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
        raise UserError(f"{error}{_not_its_base(difference)}") from None
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
    base = config.model_copy(update={"model": source, "device": asked.device, "dtype": dtype}).base(tokenizer)
    difference = other_base(base, recorded) if recorded and asked.dtype == "auto" else None
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
        raise UserError(f"{error}{_not_its_base(difference)}") from None
    if difference is not None:
        notes.append(f"{base.name} is not the base that {folder} was trained on ({difference}).")
    read = {job.name: config.data_settings(job) for job in config.jobs if job.name in keep}
    return Target(base, adapters, renderer, names=tuple(keep), data_settings=read, notes=notes)


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
    if any(recorded.get(key) != kept for key, kept in here.items()):
        return None  # the tensors are rounded otherwise, which says nothing of where they come from
    return other_base(base, {"model": base_of(folder), **recorded})


def _not_its_base(difference: str | None) -> str:
    return "" if difference is None else f" This is not the base of its training ({difference})."


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
            head=ClassificationTask(tuple(named)) if named else None,
        )
        stored = tensors.get(name, {})
        with torch.no_grad():
            for key, parameter in adapter.named_parameters():
                value = stored.get(f"parameter.{key}")
                if value is None or value.shape != parameter.shape:
                    raise UserError(f"{store.folder}: the checkpoint does not fit the configuration of job '{name}'.")
                parameter.copy_(value)
    return [*warnings, f"the run is not finished: {', '.join(unfinished)} as of step {state['step']}"]
