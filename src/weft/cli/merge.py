"""``weft merge``: an adapter becomes part of its base's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weft.cli import common, early, options
from weft.errors import check_word
from weft.paths import local_path


def merge(
    adapter: Annotated[
        list[Path],
        typer.Option(
            metavar="ADAPTER|RUN", parser=local_path, help="Folder of an adapter, or of a run with one; repeatable."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", parser=local_path, help="Folder of the new model.")
    ],
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="One number per adapter. Default: the same share for each.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base, if the adapter does not name it or it lies elsewhere now.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto (those of the base), float32, bfloat16, float16")
    ] = "auto",
    quantization: Annotated[
        str | None, typer.Option(help="nf4, fp4 or int8, if the base of the training was and the folder does not say.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="nf4, fp4 or int8: how the merged model is kept; default: not quantised.")
    ] = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> int:
    """Write the base with an adapter in its weights, as a plain Hugging Face folder; prove that it answers alike.

    weft merge --adapter runs/first/adapters/lora --output merged
    """
    for option, value in (("--quantization", quantization), ("--quantize", quantize)):
        if value is not None:
            check_word(option, value, ("nf4", "fp4", "int8"))
    shares = options.numbers("--weights", weights)
    early.refuse(lambda: _check(adapter, shares, output, model, dtype=dtype, device=device))
    from weft.export.folder import merge_folder

    common.tell_hub(model or "")
    result = merge_folder(
        adapter,
        output,
        weights=shares,
        model=model,
        dtype=dtype,
        device=device,
        quantization=quantization,  # type: ignore[arg-type]
        quantize=quantize,  # type: ignore[arg-type]
    )
    for note in result.notes:
        common.say(note)
    if as_json:
        common.print_json({"output": str(output), "bytes": result.bytes, **result.entries,
                           "proof": asdict(result.proof), "notes": list(result.notes)})  # fmt: skip
        return common.DONE
    named = " + ".join(map(str, adapter))
    print(f"{named} ({result.entries['method']}) in its base's weights -> {output} ({result.entries['dtype']}, "
          f"{common.human_size(result.bytes)})")  # fmt: skip
    for line in result.lines:
        print(line)
    if "labels" not in result.entries:
        print(f"talk to it:  weft chat {output}")
    return common.DONE


def _check(
    adapter: Sequence[Path], weights: Sequence[float], output: Path, model: str | None, *, dtype: str, device: str
) -> None:
    from weft.export.sources import Sources
    from weft.files.whole import check_new
    from weft.models.load import check_device, resolve_dtype, resolve_model

    Sources.of(adapter, weights)
    resolve_dtype(dtype)
    check_device(device)
    if model is not None:
        resolve_model(model)
    check_new(output, "--output ")
