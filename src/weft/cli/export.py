"""``weft export``: an adapter or a model in a format of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli import common, early, options
from weft.errors import UserError, check_word
from weft.paths import is_hub_id, local_path

if TYPE_CHECKING:
    from weft.export.exporting import Exported


def export(
    source: Annotated[
        str, typer.Argument(metavar="ADAPTER|RUN|MODEL", help="Folder of an adapter, of a run, or of a model.")
    ],
    to: Annotated[str, typer.Option(help="peft, gguf, gguf-lora, ollama (docs/cli.md)")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", parser=local_path, help="Folder of what is written.")
    ],
    adapter: Annotated[str | None, typer.Option(help="Of a run with several, this adapter.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of a GGUF file: f16 (default), q8_0, f32, bf16; of gguf-lora: f32, f16, bf16")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base, if the adapter does not name it or it lies elsewhere now.")
    ] = None,
    base_name: Annotated[
        str | None, typer.Option(help="What the folder calls the base: a hub id instead of a path of this machine.")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="nf4, fp4 or int8, if the base of the training was and the folder does not say.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Put the folder into this repository of the hub as well.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push-to-hub: for all to see.")] = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> int:
    """Write an adapter or a model for other programs (peft, vLLM, llama.cpp, Ollama), with a model card.

    weft export runs/first --adapter lora --to gguf --dtype q8_0 --output exported
    """
    if quantization is not None:
        check_word("--quantization", quantization, ("nf4", "fp4", "int8"))
    if public and push_to_hub is None:
        raise UserError("--public does nothing without --push-to-hub. Leave it out.")

    def check() -> None:
        _check(source, to, output, adapter, dtype, model=model, quantization=quantization, device=device,
               base_name=base_name, push=push_to_hub)  # fmt: skip

    early.refuse(check)
    from weft.export.exporting import export as write
    from weft.export.exporting import find_format, find_material

    common.tell_hub(model or "")
    check()
    form, kind = find_format(to, dtype)
    done = write(
        find_material(source, adapter, model),
        output,
        form,
        kind,
        base_name=base_name,
        model=model,
        device=device,
        quantization=quantization,  # type: ignore[arg-type]
    )
    for note in done.written.notes:
        common.say(note)
    address = _push(output, push_to_hub, public) if push_to_hub is not None else None
    _tell(done, output, address, as_json=as_json)
    return common.DONE


def _push(output: Path, repository: str, public: bool) -> str:
    from weft.export.hub import push

    return push(output, repository, private=not public)


def _check(
    source: str,
    to: str,
    output: Path,
    adapter: str | None,
    dtype: str | None,
    *,
    model: str | None,
    quantization: str | None,
    device: str,
    base_name: str | None,
    push: str | None,
) -> None:
    from weft.export.exporting import check, find_format, find_material
    from weft.export.hub import check_repository
    from weft.files.whole import check_new
    from weft.models.load import check_device

    form, _ = find_format(to, dtype)
    check_new(output, "--output ")
    check_device(device)
    material = find_material(source, adapter, model)
    check(material, form)
    if quantization is not None and not (form.of_model and material.adapter is not None):
        raise UserError("--quantization is for the merge of an adapter, and nothing is merged here. Leave it out.")
    if push is not None:
        check_repository(push)
        base = base_name or material.base
        if not form.of_model and base is not None and not is_hub_id(base):
            raise UserError(
                f"--push-to-hub: the adapter's files name its base by a path of this machine ({base}), which nobody "
                "else has. Say its hub id with --base-name OWNER/NAME."
            )


def _tell(done: Exported, output: Path, address: str | None, *, as_json: bool) -> None:
    size = sum(done.files.values())
    if as_json:
        common.print_json(
            {
                "output": str(output),
                "format": done.format,
                "base": done.base,
                "bytes": size,
                "files": dict(done.files),
                **done.written.figures,
                "checked": done.written.lines,
                "notes": done.written.notes,
                "pushed": address,
            }
        )
        return
    print(f"{done.format} -> {output} ({common.human_size(size)})")
    for line in done.written.lines:
        print(line)
    for command in done.written.commands:
        print(f"  {command}")
    if address is not None:
        print(f"on the hub: {address}")
