"""The merge of an adapter's folder with its base into a plain model's folder, which is loaded again and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weft.data.auditing.pieces import decode
from weft.data.provenance import file_names, template_of
from weft.data.rendering.served import served_template
from weft.errors import UserError
from weft.export.proof import Proof, Reference, compare, fixed_prompts, fixed_texts, routed_logits
from weft.export.rendering import Wanted, compare_ids, fixed_conversations, fresh_ids, wanted_ids
from weft.export.requantized import changes_of, requantize
from weft.export.sources import Sources
from weft.export.tokenizer_files import keep_unchanged
from weft.files import adapter_folder as files
from weft.files.run_folder import run_of
from weft.files.whole import new_folder, weights_bytes
from weft.files.writing import writing
from weft.generation.open import open_target
from weft.generation.target import Target
from weft.merge.model import merged_model
from weft.merge.weights import check_mergeable
from weft.methods.dense import dequantize_linears, how_kept
from weft.models.hub import folder_of
from weft.models.load import resolve_dtype, resolve_model
from weft.models.quantize import Kind, Quantization
from weft.paths import local_path
from weft.training.config import read_run_config
from weft.training.same_run import base_fingerprint, other_base
from weft.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD = "5GB"


@dataclass(frozen=True)
class Result:
    """A merged model's folder, how it compares (``lines`` say it in words), and what the user should know."""

    folder: Path
    entries: Mapping[str, object]
    proof: Proof
    _: KW_ONLY
    lines: tuple[str, ...]
    notes: tuple[str, ...]
    bytes: int


def merge_folder(
    adapter: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] = (),
    model: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantization: Kind | None = None,
    quantize: Kind | None = None,
) -> Result:
    """Write the base with an adapter in its weights to the new folder ``output``, and compare it with the adapter.

    Args:
        adapter: an adapter's folder, or a run's that has only one; or several, whose weighted sum it then is.
        weights: one for each of several adapters; default: the same share for each.
        model: the base, instead of the one that the adapter names.
        dtype: of the weights that are written; ``auto``: those of the base in training.
        quantization: how the base of the training was kept, where the folder does not say.
        quantize: how the merged model is kept; the proof is of the model before.

    Raises:
        UserError: the adapter cannot become weights, does not fit the base, the folder is taken, or the merged model
            does not answer as the adapter does; nothing is left behind.
    """
    sources, output = Sources.of(adapter, weights), local_path(output)
    with new_folder(output, "--output ") as part:
        given = resolve_dtype(dtype)
        opened, notes = open_trained(sources.folders[0], model, device, quantization)
        notes += sources.load_others(opened)
        narrowed = given if isinstance(given, torch.dtype) else None
        written = _write(opened, sources, part, narrowed, measured=quantize is not None)
        where, tokenizer = opened.adapters.device, opened.base.tokenizer
        del opened  # two models at once are enough
        with fresh_ids(part, [messages for messages, _ in written.wanted]) as ids_elsewhere:
            proof = compare(part, written.expected, where)
            if proof.holds and written.wanted:
                rendering, told = compare_ids(written.wanted, ids_elsewhere(), partial(decode, tokenizer))
                proof = replace(proof, rendering=rendering)
                notes += told
        if not proof.holds:
            raise UserError(
                f"the merged model does not answer as the adapter does, and nothing is kept: "
                f"{'; '.join(proof.lines())}; asked for: {proof.bar}. --dtype float32 rounds less; or serve the "
                "adapter beside its base."
            )
        entries = written.entries | {"proof": asdict(proof)}
        lines = proof.lines()
        if quantize is not None:
            rounded = requantize(part, quantize, written.changes, written.expected, where)
            entries |= {"requantized": asdict(rounded)}
            lines += rounded.lines()
            notes += rounded.notes()
        data = {} if written.data is None else {"data": written.data}
        files.write_json(part / files.OWN_CONFIG, {"merged": entries, **data})
    if entries["quantization"]:
        notes.append(
            f"the base of the training was {entries['quantization']}: its dequantised weights, beside which the "
            f"adapter learned, are what it was merged with, written in {entries['dtype']}."
        )
    return Result(output, entries, proof, lines=tuple(lines), notes=tuple(notes), bytes=weights_bytes(output))


def open_trained(folder: Path, model: str | None, device: str, quantization: Kind | None) -> tuple[Target, list[str]]:
    """Open the adapter on its base, kept as it was in training, and say what the user should know.

    Raises:
        UserError: It cannot be opened, or its base is another one now and no ``model`` is named.
    """
    kept = files.trained_on(folder)
    run, notes = run_of(folder), []
    if kept is None and run is not None:
        config = read_run_config(run)
        kept = {"dtype": config.dtype, **(config.kept.record() if config.kept else {"quantization": None})}
    if kept is None:
        kept = {}
        if quantization is None:
            notes.append(f"{folder} does not say how its base was kept in training; if it was quantised, say how with "
                         "--quantization, for its weights are then others.")  # fmt: skip
    elif quantization not in (None, kept.get("quantization")):
        was = kept.get("quantization") or "not quantised"
        raise UserError(
            f"--quantization {quantization}: the adapter was trained on a base that was {was}; leave it out."
        )
    try:
        opened = open_target(
            folder,
            model=model,
            device=device,
            dtype="auto" if run is not None and model is None else str(kept.get("dtype", "auto")),
            quantization=Quantization.recorded(kept, folder) or Quantization.of(quantization),
        )
    except UserError as error:
        raise UserError(f"{folder}, on {model or 'its base'}: {error}") from None
    if difference := other_base(opened.base, kept):
        if model is None:
            opened.close()
            raise UserError(
                f"the model at {opened.base.name} is not the one that {folder} was trained on: its tensors are others "
                f"({difference}). "
                "Put the old one back; or name a base with --model to use it all the same."
            )
        notes.append(f"warning: {opened.base.name} is not the base that the adapter was trained on: its tensors are "
                     f"others ({difference}).")  # fmt: skip
    return opened, [*opened.notes, *notes]


@dataclass(frozen=True)
class _MergedFolder:
    entries: dict[str, object]
    data: Mapping[str, object] | None
    expected: list[Reference]
    _: KW_ONLY
    wanted: Wanted
    changes: Mapping[str, float]


def _write(opened: Target, sources: Sources, part: Path, dtype: torch.dtype | None, *, measured: bool) -> _MergedFolder:
    """Write the model and its tokenizer, and close what was opened. The base is this function's own."""
    adapters, name = opened.adapters, sources.name(opened)
    adapter, quantized = adapters[name], bool(getattr(adapters.model, "is_quantized", False))
    check_mergeable(adapter)
    # A wider dtype holds the weights of training as they are, and both sides are compared in one precision.
    if dtype is not None and dtype.itemsize > adapters.dtype.itemsize and not quantized:
        recast(opened, sources, dtype)
        adapter = adapters[name]
    new = merged_model(adapters.model, adapters.architecture, adapters.merge(name, dtype), adapter.head)
    written: torch.dtype = new.dtype
    entries = _entries(opened, sources, new)
    changes = changes_of(adapters.model, adapter, new) if measured else {}
    wanted = _save(opened, new, part)
    source = folder_of(resolve_model(opened.base.name))
    if source is not None:
        entries["tokenizer_files_of_the_base"] = keep_unchanged(part, source)
    del new
    expected = _expected(opened, sources, written)
    opened.close()
    return _MergedFolder(entries, sources.provenance(), expected, wanted=wanted, changes=changes)


def _expected(opened: Target, sources: Sources, written: torch.dtype) -> list[Reference]:
    """Compute what the merged model must give. This changes the base's dtype."""
    adapters, name = opened.adapters, sources.name(opened)
    prompts = fixed_prompts(adapters, name, opened.renderer)
    precise = routed = routed_logits(adapters, name, prompts)
    rounded: list[Tensor] | list[None] = [None] * len(prompts)
    if getattr(adapters.model, "is_quantized", False) or adapters.dtype.itemsize < 4:
        dequantize_linears(adapters.model, torch.float32)
        recast(opened, sources, torch.float32)
        precise = routed_logits(adapters, name, prompts)
    if written.itemsize < 4:
        recast(opened, sources, written)
        rounded = routed_logits(adapters, name, prompts)
    return [Reference(*row) for row in zip(prompts, routed, precise, rounded, strict=True)]


def recast(opened: Target, sources: Sources, dtype: torch.dtype) -> None:
    """Give the base another dtype, and load the adapters anew, for adapters know what their base has.

    Raises:
        UserError: An adapter cannot be loaded again.
    """
    nn.Module.to(opened.adapters.model, dtype)  # transformers' own refuses where a quantised model was loaded
    for name in reversed(opened.adapters.names):
        opened.adapters.remove(name)
    opened.adapters.load(opened.names[0], sources.folders[0], tokenizer=opened.base.tokenizer)
    sources.load_others(opened)


def _entries(opened: Target, sources: Sources, new: PreTrainedModel) -> dict[str, object]:
    """The section ``merged`` of weft.json: what was made of what. Paths are cut to their names."""
    adapter = opened.adapters[sources.name(opened)]
    found = sources.entries() | {
        "method": "+".join(part.method for part in adapter.config.methods()),
        "base": base_fingerprint(opened.base) | {"model": file_names(opened.base.name)},
        **how_kept(opened.adapters.model, opened.adapters.dtype),
        "dtype": str(new.dtype).removeprefix("torch."),
        "weft_version": __version__,
    }
    if adapter.head.labels:
        found["labels"] = list(adapter.head.labels)
    return found


def _save(opened: Target, new: PreTrainedModel, part: Path) -> Wanted:
    """Write the model, and the tokenizer with a chat template that gives the ids of training in other tools.

    Returns:
        Conversations and their ids in training; none where messages are not what the model is given.
    """
    tokenizer, renderer, shape = opened.base.tokenizer, opened.renderer, opened.adapters.architecture
    configured = getattr(opened.adapters.model, "generation_config", None)
    if new.can_generate() and configured is not None:
        new.generation_config = configured
        new.generation_config.eos_token_id = _ends(configured.eos_token_id, tokenizer.eos_token_id)
    if "SequenceClassification" in type(new).__name__ and new.config.pad_token_id is None:
        new.config.pad_token_id = tokenizer.pad_token_id
    with writing(part):
        new.save_pretrained(part, max_shard_size=SHARD)
    # An encoder-decoder without a template renders otherwise than with the plain one.
    if template_of(renderer)["template_from"] == "plain" and shape.stacks > 1:
        with writing(part):
            tokenizer.save_pretrained(part)
        return []
    conversations, own = fixed_conversations(fixed_texts()), tokenizer.chat_template
    wanted = wanted_ids(renderer, shape.task, conversations) if new.can_generate() else []
    tokenizer.chat_template = served_template(renderer, shape.task, [messages for messages, _ in wanted])
    with writing(part):
        tokenizer.save_pretrained(part)
    tokenizer.chat_template = own
    return wanted


def _ends(configured: int | list[int] | None, eos: int | None) -> int | list[int] | None:
    """The tokens that end an answer elsewhere: those of the base, and the one that training taught."""
    known = configured if isinstance(configured, list) else [] if configured is None else [configured]
    if eos is None or eos in known:
        return configured
    return [*known, eos] if known else eos
