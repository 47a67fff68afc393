"""``weft combine``: trained adapters of one kind become a new one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli import common
from weft.errors import UserError

if TYPE_CHECKING:
    from weft.combine.rules import Combination
    from weft.core.adapter import Adapter
    from weft.models.load import Base


@dataclass(frozen=True)
class Found:
    """One adapter's folder, and the run that it belongs to."""

    folder: Path
    run: Path | None

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.folder)


def combine(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|ADAPTER...", help="Folders of adapters, or of runs, which stand for their adapters."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the new adapter.")],
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
) -> int:
    """Combine trained adapters of one kind into a new one. The base's weights are not loaded.

    weft combine runs/a runs/b --output both --weights 0.7,0.3 --type ties --density 0.5
    """
    from weft.combine.rules import Combination
    from weft.files import adapter_folder as files
    from weft.models.load import resolve_model, sketch_base

    given = _weights(weights)
    how = Combination(
        given,
        combination_type,
        density,
        majority_sign_method=majority_sign_method,  # type: ignore[arg-type]
        svd_rank=svd_rank,
        seed=seed,
    )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already; it is left alone. Take another folder.")
    found = [one for source in sources for one in _find(source, adapter)]
    if given and len(given) != len(found):
        names = ", ".join(one.name for one in found)
        raise UserError(f"--weights has {len(given)} numbers; there are {len(found)} adapters: {names}.")
    base_name = resolve_model(model) if model else _base(found)
    common.tell_hub(base_name)
    base = sketch_base(base_name)

    new = _combined(found, how, base, base_name, _name(output))
    part = output.absolute().with_name(f".{output.name}.unfinished")
    shutil.rmtree(part, ignore_errors=True)
    files.save(new, base.architecture, part, base_name=base_name)
    _save_tokenizer(found, part)
    if output.exists():
        output.rmdir()  # empty, or it would have been refused
    part.replace(output)
    _tell(output, found, how, sum(tensor.numel() for tensor in new.tensors().values()), as_json=as_json)
    return common.DONE


def _combined(found: list[Found], how: Combination, base: Base, base_name: str, name: str) -> Adapter:
    """The new adapter, which knows where it comes from."""
    from weft.combine.rules import Source
    from weft.combine.rules import combine as compose
    from weft.files import adapter_folder as files

    def load(one: Found) -> Source:
        config, tensors, task = files.read(one.folder, base.model)
        if task is not None:
            raise UserError(f"{one.name} has a classification head; heads trained apart cannot be made one.")
        try:
            made = files.assemble("one", config, tensors, base.model, base.architecture)
        except UserError as error:
            raise UserError(f"{one.name}, on {base_name}: {error}") from None
        return Source(one.name, config, made.tensors())

    config, tensors = compose([load(one) for one in found], how)
    new = files.assemble(name, config, tensors, base.model, base.architecture)
    kept = [files.trained_on(one.folder) for one in found]
    new.record_origin(_common_provenance(found), kept[0] if all(one == kept[0] for one in kept) else {})
    return new


def _name(output: Path) -> str:
    """What the adapter is called where its file says so."""
    return re.sub(r"[^\w\-]", "_", output.absolute().name, flags=re.ASCII).strip("_") or "adapter"


def _weights(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--weights {text!r}: expected numbers separated by commas, such as 0.7,0.3.") from None


def _find(source: str, wanted: Sequence[str] | None) -> list[Found]:
    """The adapters that a folder stands for."""
    from weft.files.adapter_folder import CONFIG, OWN_CONFIG
    from weft.files.run_folder import RUN_FILE, RunStore
    from weft.training.config import read_run_config

    folder = Path(source).expanduser()
    if (folder / RUN_FILE).is_file():
        names = [job.name for job in read_run_config(folder).jobs]
        chosen = [name for name in names if not wanted or name in wanted]
        if not chosen:
            raise UserError(f"{folder} has no adapter {', '.join(wanted or ())}; there are: {', '.join(names)}.")
        found = [Found(RunStore(folder).adapters / name, folder) for name in chosen]
        missing = next((one for one in found if not one.folder.is_dir()), None)
        if missing is not None:
            for name, reason in RunStore(folder).failed([missing.folder.name]).items():
                raise UserError(
                    f"{folder} has no adapter '{name}', for its job failed: {reason}. Name the others with --adapter."
                )
            raise UserError(f"{folder} is not finished: there is no {missing.name} yet. Go on with it (--resume).")
        return found
    if not any((folder / name).is_file() for name in (CONFIG, OWN_CONFIG)):
        raise UserError(f"{folder} holds neither a run ({RUN_FILE}) nor an adapter ({CONFIG}).")
    run = folder.absolute().parent.parent
    inside = folder.absolute().parent.name == "adapters" and (run / RUN_FILE).is_file()
    return [Found(folder, run if inside else None)]


def _common_provenance(found: Sequence[Found]) -> dict[str, object] | None:
    """How the adapters' data was read and rendered, as far as that was the same; tells where it was not."""
    from weft.data import provenance
    from weft.files.adapter_folder import OWN_CONFIG, provenance_of

    read = provenance.Provenance.read
    record, notes = provenance.common(
        {one.name: read(provenance_of(one.folder), str(one.folder / OWN_CONFIG)) for one in found}
    )
    for note in notes:
        common.say(f"the adapters were not trained alike: {note}")
    return None if record is None else record.model_dump(mode="json")


def _base(found: Sequence[Found]) -> str:
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


def _save_tokenizer(found: Sequence[Found], folder: Path) -> None:
    """An adapter that leaves its run takes the tokenizer and the chat template along."""
    from weft.data.rendering.templates import template_text
    from weft.files.run_folder import RunStore
    from weft.models.load import load_tokenizer
    from weft.training.config import read_run_config

    run = next((one.run for one in found if one.run is not None and RunStore(one.run).tokenizer.is_dir()), None)
    if run is None:
        return
    tokenizer = load_tokenizer(str(RunStore(run).tokenizer))
    wanted = read_run_config(run).chat_template
    tokenizer.chat_template = template_text(wanted).text if wanted else tokenizer.chat_template
    tokenizer.save_pretrained(folder)


def _tell(output: Path, found: Sequence[Found], how: Combination, parameters: int, *, as_json: bool) -> None:
    size = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
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
    print(f"{len(found)} adapters, {how.combination_type} -> {output} ({parameters:,} parameters, "
          f"{common.human_size(size)})")  # fmt: skip
    print(f"talk to it:  weft chat {output}")
