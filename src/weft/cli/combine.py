"""``weft combine``: trained adapters of one kind become a new one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, early, options
from weft.errors import UserError
from weft.paths import local_path

if TYPE_CHECKING:
    from weft.combine.rules import Combination
    from weft.core.adapter import Adapter
    from weft.models.load import Base


@dataclass(frozen=True)
class AdapterFolder:
    """One adapter's folder, and the run that it belongs to."""

    folder: Path
    run: Path | None

    @property
    def name(self) -> str:
        """The name in messages."""
        return str(self.folder)


def combine(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|ADAPTER...", help="Folders of adapters, or of runs, which stand for their adapters."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", parser=local_path, help="Folder of the new adapter.")
    ],
    adapter: Annotated[list[str] | None, typer.Option(help="Of the runs only this adapter; may be repeated.")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="One number per adapter. Default: the same share for each.")
    ] = None,
    combination_type: Annotated[
        str, typer.Option("--type", metavar="TYPE", help="linear, cat, svd, ties, dare_linear, ... (docs/cli.md)")
    ] = "linear",
    density: Annotated[float | None, typer.Option(help="Share of the entries that ties, dare_... keep.")] = None,
    majority_sign_method: Annotated[str, typer.Option(help="total or frequency; of the ties types.")] = "total",
    svd_rank: Annotated[int | None, typer.Option(help="Rank of what the svd types give.")] = None,
    seed: Annotated[int, typer.Option(help="Of dare's random choice.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="Base, if the adapters do not name it or name it differently.")
    ] = None,
    as_json: options.Json = False,
) -> int:
    """Combine trained adapters of one kind into a new one. The base's weights are not loaded.

    weft combine runs/a runs/b --output both --weights 0.7,0.3 --type ties --density 0.5
    """
    if "dare" not in combination_type:
        options.refuse_idle(context, ["seed"], f"with --type {combination_type}: only dare chooses at random")
    if "ties" not in combination_type:
        options.refuse_idle(
            context, ["majority_sign_method"], f"with --type {combination_type}: only ties elects signs"
        )
    given = options.numbers("--weights", weights)
    settings = {"density": density, "majority_sign_method": majority_sign_method, "svd_rank": svd_rank, "seed": seed}
    early.refuse(lambda: _check(given, combination_type, settings, output, sources, adapter=adapter, model=model))
    from weft.files import adapter_folder as files
    from weft.files.whole import new_folder
    from weft.models.load import sketch_base

    how = _how(given, combination_type, settings)
    with new_folder(output, "--output ") as part:
        found, base_name = _chosen(sources, adapter, given, model)
        common.tell_hub(base_name)
        base = sketch_base(base_name, tokens=_added(found))
        new = _combined(found, how, base, base_name, files.name_for(output))
        files.save(new, base.architecture, part, base_name=base_name)
        _save_tokenizer(found, part)
    _tell(output, found, how, sum(tensor.numel() for tensor in new.tensors().values()), as_json=as_json)
    return common.DONE


def _check(
    weights: tuple[float, ...],
    kind: str,
    settings: dict[str, Any],
    output: Path,
    sources: list[str],
    *,
    adapter: list[str] | None,
    model: str | None,
) -> None:
    from weft.files.whole import check_new

    _how(weights, kind, settings)
    check_new(output, "--output ")
    _chosen(sources, adapter, weights, model)


def _how(weights: tuple[float, ...], kind: str, settings: dict[str, Any]) -> Combination:
    """The settings of the combination. Raises UserError for those that cannot be, by the names that they have here."""
    from weft.combine.rules import Combination

    try:
        return Combination(weights, kind, **settings)
    except UserError as error:
        raise UserError(_by_options(str(error))) from None


def _by_options(text: str) -> str:
    return re.sub(r"\b(combination_(?=type)|density|svd_rank|majority_sign_method)", _option, text)


def _option(found: re.Match[str]) -> str:
    return f"--{found[0].removeprefix('combination_').replace('_', '-')}"


def _chosen(
    sources: list[str], adapter: list[str] | None, weights: tuple[float, ...], model: str | None
) -> tuple[list[AdapterFolder], str]:
    """The adapters to combine, and the name of their base."""
    from weft.files.run_folder import RUN_FILE
    from weft.models.load import resolve_model

    found = [one for source in sources for one in _find(source, adapter)]
    if adapter and not any((local_path(source) / RUN_FILE).is_file() for source in sources):
        raise UserError(
            "--adapter does nothing for folders of adapters: it chooses among those of a run. Leave it out."
        )
    if weights and len(weights) != len(found):
        names = ", ".join(one.name for one in found)
        raise UserError(f"--weights: {len(weights)} given for {len(found)}: {names}. Give one for each adapter.")
    return found, resolve_model(model) if model else _base(found)


def _added(found: list[AdapterFolder]) -> list[str]:
    """The tokens that the adapters added to their base, each of them the same ones."""
    from weft.files.adapter_folder import added_tokens

    added = {one.name: added_tokens(one.folder) for one in found}
    first, *others = added
    for other in others:
        if added[other] != added[first]:
            raise UserError(
                f"the adapters have other added tokens: {first} {added[first]}, {other} {added[other]}. A token's row "
                "means nothing beside another token of the same id; train them with the same add_tokens."
            )
    return added[first]


def _combined(found: list[AdapterFolder], how: Combination, base: Base, base_name: str, name: str) -> Adapter:
    """The new adapter, which knows where it comes from."""
    from weft.combine.rules import Source
    from weft.combine.rules import combine as compose
    from weft.files import adapter_folder as files

    def load(one: AdapterFolder) -> Source:
        config, tensors, task = files.read(one.folder, base.model)
        if task is not None:
            raise UserError(f"{one.name} has a classification head; heads trained apart cannot be made one.")
        try:
            made = files.assemble("one", config, tensors, base.model, base.architecture)
        except UserError as error:
            raise UserError(f"{one.name}, on {base_name}: {error}") from None
        return Source(one.name, config, made.tensors())

    parts = [load(one) for one in found]
    try:
        config, tensors = compose(parts, how)
    except UserError as error:
        raise UserError(str(error).replace("combination_type", "--type")) from None
    new = files.assemble(name, config, tensors, base.model, base.architecture)
    kept = [files.trained_on(one.folder) for one in found]
    new.record_origin(_common_provenance(found), kept[0] if all(one == kept[0] for one in kept) else {})
    return new


def _find(source: str, wanted: Sequence[str] | None) -> list[AdapterFolder]:
    """The adapters that a folder stands for."""
    from weft.files.adapter_folder import CONFIG, is_adapter
    from weft.files.run_folder import RUN_FILE, RunStore, run_of
    from weft.training.config import read_run_config

    folder = local_path(source)
    if (folder / RUN_FILE).is_file():
        names = [job.name for job in read_run_config(folder).jobs]
        chosen = [name for name in names if not wanted or name in wanted]
        if not chosen:
            raise UserError(f"{folder} has no adapter {', '.join(wanted or ())}; there are: {', '.join(names)}.")
        return [AdapterFolder(path, folder) for path in RunStore(folder).finished(chosen)]
    if not is_adapter(folder):
        raise UserError(f"{folder} holds neither a run ({RUN_FILE}) nor an adapter ({CONFIG}).")
    return [AdapterFolder(folder, run_of(folder))]


def _common_provenance(found: Sequence[AdapterFolder]) -> dict[str, object] | None:
    """What the adapters' provenances have in common; tells the user where they differ."""
    from weft.data import provenance
    from weft.files.adapter_folder import OWN_CONFIG, provenance_of

    read = provenance.Provenance.read
    record, notes = provenance.common(
        {one.name: read(provenance_of(one.folder), str(one.folder / OWN_CONFIG)) for one in found}
    )
    for note in notes:
        common.say(f"the adapters were not trained alike: {note}")
    return None if record is None else record.model_dump(mode="json")


def _base(found: Sequence[AdapterFolder]) -> str:
    """The one base that all adapters, or their runs, name."""
    from weft.files.adapter_folder import base_of
    from weft.files.run_folder import RunStore

    bases = {one.name: base_of(one.folder) for one in found}
    for one in found:
        if one.run is not None:
            recorded = RunStore(one.run).read_run().get("base", {}).get("model")
            bases[one.name] = recorded if isinstance(recorded, str) else bases[one.name]
    nameless = next((name for name, base in bases.items() if base is None), None)
    if nameless is not None:
        raise UserError(f"{nameless} does not say which base it is for; name it with --model.")
    if len(set(bases.values())) > 1:
        lines = "\n".join(f"  {name}: {base}" for name, base in bases.items())
        raise UserError(
            f"the adapters were made for different bases, so they cannot be combined:\n{lines}\n"
            "If it is one base under several names, say which with --model."
        )
    return str(bases[found[0].name])


def _save_tokenizer(found: Sequence[AdapterFolder], folder: Path) -> None:
    """Write the tokenizer and the chat template of the adapters' run, if there is one."""
    from weft.data.rendering.templates import template_text
    from weft.files.run_folder import RunStore
    from weft.files.writing import writing
    from weft.models.load import load_tokenizer
    from weft.training.config import read_run_config

    run = next((one.run for one in found if one.run is not None and RunStore(one.run).tokenizer.is_dir()), None)
    if run is None:
        return
    tokenizer = load_tokenizer(str(RunStore(run).tokenizer))
    wanted = read_run_config(run).chat_template
    tokenizer.chat_template = template_text(wanted).text if wanted else tokenizer.chat_template
    with writing(folder):
        tokenizer.save_pretrained(folder)


def _tell(output: Path, found: Sequence[AdapterFolder], how: Combination, parameters: int, *, as_json: bool) -> None:
    from weft.files.whole import weights_bytes
    from weft.preview.text import count_of

    size = weights_bytes(output)
    if as_json:
        common.print_json(
            {
                "output": str(output),
                "adapters": [one.name for one in found],
                "weights": list(how.weights) or None,
                "combination_type": how.combination_type,
                "parameters": parameters,
                "bytes": size,
            }
        )
        return
    print(f"{count_of(len(found), 'adapter')}, {how.combination_type} -> {output} ({parameters:,} parameters, "
          f"{common.human_size(size)})")  # fmt: skip
    print(f"talk to it:  weft chat {output}")
