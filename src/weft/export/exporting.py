"""The export of an adapter or a model into a new folder, in one of the formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from weft.data.provenance import file_names
from weft.errors import UserError, check_word, nearest
from weft.export.card import CARD, card, facts_of
from weft.export.folder import Result, merge_folder
from weft.export.format import Format, Material, Written
from weft.export.formats import FORMATS
from weft.files import adapter_folder as files
from weft.files.run_folder import RUN_FILE, RunStore, run_of
from weft.files.whole import new_folder, remove, write_text
from weft.foreign import read_json
from weft.models import gate
from weft.models.load import resolve_model
from weft.models.quantize import Kind
from weft.paths import is_hub_id, local_path
from weft.training.config import read_run_config

_MERGED = ".merged"


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, its files, what was checked, and how it is loaded."""

    folder: Path
    format: str
    written: Written
    _: KW_ONLY
    base: str
    files: Mapping[str, int]
    merge: Result | None = None


def find_material(source: str | Path, adapter: str | None = None, model: str | None = None) -> Material:
    """What a source stands for: an adapter's folder, a run's with one (or with ``adapter`` chosen), a model.

    Args:
        model: the base, instead of the one that the adapter names.

    Raises:
        UserError: It is none of these, or the run has several adapters and none is chosen.
    """
    folder = local_path(source)
    if (folder / RUN_FILE).is_file():
        names = [job.name for job in read_run_config(folder).jobs]
        listed = ", ".join(names)
        if adapter is None and len(names) != 1:
            raise UserError(f"{folder} is a run with the adapters {listed}; choose one: --adapter {names[0]}.")
        if adapter is not None and adapter not in names:
            raise UserError(f"{folder} has no adapter '{adapter}'.{nearest(adapter, names)} There are: {listed}.")
        (folder,) = RunStore(folder).finished([adapter or names[0]])
    elif adapter is not None:
        raise UserError(f"--adapter {adapter} chooses among the adapters of a run, and {folder} is none. Leave it out.")
    if files.is_adapter(folder):
        base = model or _base_of(folder)
        if base is None:
            raise UserError(f"{folder / files.CONFIG} does not say which base it is for; name that with --model.")
        return Material(folder, files.name_for(folder), base=resolve_model(base), adapter=folder)
    if model is not None:
        raise UserError(f"{source} is no run and no adapter, so that --model has no base to replace. Leave one out.")
    place = Path(resolve_model(str(source)))
    if not place.is_dir():
        raise UserError(
            f"{source} is no folder here. A model of a hub is exported from its folder: hf download {source} "
            f"--local-dir {place.name}"
        )
    return Material(place, place.name)


def _base_of(folder: Path) -> str | None:
    run = run_of(folder)
    recorded = None if run is None else (RunStore(run).read_run().get("base") or {}).get("model")
    there = isinstance(recorded, str) and (Path(recorded).is_dir() or is_hub_id(recorded))
    return recorded if there else files.base_of(folder)


def find_format(to: str, kind: str | None) -> tuple[Format, str]:
    """The format of a name, and what its tensors are kept in.

    Raises:
        UserError: There is no such format, or it has no such kind.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}: there is no such format.{nearest(to, FORMATS)} Formats: {', '.join(FORMATS)}.")
    found = FORMATS[to]
    if kind is None:
        return found, next(iter(found.kinds), "")
    if not found.kinds:
        raise UserError(f"--dtype does nothing --to {to}, which keeps the tensors as they are. Leave it out.")
    check_word("--dtype", kind, tuple(found.kinds))
    return found, kind


def check(material: Material, form: Format) -> None:
    """Refuse early what the format cannot hold, before weights are read.

    Raises:
        UserError: It cannot hold it.
    """
    path = Path(material.base or material.folder) / "config.json"
    form.check(material, read_json(path) if path.is_file() else {})


def export(
    material: Material,
    output: str | Path,
    form: Format,
    kind: str = "",
    *,
    base_name: str | None = None,
    model: str | None = None,
    device: str = "auto",
    quantization: Kind | None = None,
) -> Exported:
    """Write the material in a format to the new folder ``output``, with a model card.

    Args:
        base_name: what the folder calls the base (a hub id), instead of its path here.
        model: the base, where it is not the one that the adapter names.
        quantization: how the base of the training was kept, where the folder does not say.

    Raises:
        UserError: The format cannot hold it, or what was written does not answer alike; nothing is left behind.
    """
    output = local_path(output)
    base = base_name or material.base or str(material.folder)
    shown = base if is_hub_id(base) else Path(base).name
    check(material, form)
    form.check_model(gate.load_config(material.base or material.folder))
    with new_folder(output, "--output ") as part:
        merge, given = None, material
        if form.of_model and material.adapter is not None:
            # In 32 bits, so that the format rounds once.
            merge = merge_folder(
                material.adapter, part / _MERGED, model=model, dtype="float32", device=device, quantization=quantization
            )
            given = replace(material, folder=part / _MERGED)
        written = form.write(given, part, kind)
        remove(part / _MERGED)
        if merge is not None:
            written = replace(
                written,
                lines=[*(f"merged: {line}" for line in merge.proof.lines()), *written.lines],
                notes=[*merge.notes, *written.notes],
            )
        if base_name is not None:
            _name_base(part, base_name)
        facts = None if material.adapter is None else facts_of(material.adapter, base)
        write_text(part / CARD, card(form.name, material.name, shown, facts, written, part))
        sizes = {str(path.relative_to(part)): path.stat().st_size for path in sorted(part.rglob("*")) if path.is_file()}
    return Exported(output, form.name, written, base=str(file_names(base)), files=sizes, merge=merge)


def _name_base(part: Path, name: str) -> None:
    """Write another name of the base into an adapter's files."""
    for path in sorted(part.rglob(files.CONFIG)):
        entries = read_json(path)
        if "base_model_name_or_path" in entries:
            files.write_json(path, entries | {"base_model_name_or_path": name})
