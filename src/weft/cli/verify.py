"""``weft verify``: whether two models answer alike, as far as their number formats allow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli import common, early, options
from weft.errors import check_word
from weft.paths import local_path

Side = Annotated[
    str,
    typer.Argument(
        metavar="RUN|ADAPTER|MODEL|GGUF|URL",
        help="A run with one adapter, an adapter's folder, a model (plain, merged or quantised), a GGUF file, or the "
        "address of an OpenAI-compatible server (http://127.0.0.1:8000/v1, with #NAME where it has several models).",
    ),
]


def verify(
    a: Side,
    b: Side,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", parser=local_path, help="Held-out prompts, as `weft generate --input` takes them."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base of adapters, instead of the one that they name.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="nf4, fp4 or int8: how B is loaded, if its folder is not quantised already.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the key of a server.")
    ] = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> int:
    """Compare two models: tokens, logits, weights, tokenizer and chat template, judged by what rounding explains.

    weft verify runs/first/adapters/lora merged
    """
    if quantization is not None:
        check_word("--quantization", quantization, ("nf4", "fp4", "int8"))
    early.refuse(
        lambda: _check(a, b, prompts, model, quantization=quantization, api_key_env=api_key_env, device=device)
    )
    from weft.export.compare import verify_sides

    common.tell_hub(model or "")
    verdict = verify_sides(
        a,
        b,
        prompts=prompts,
        model=model,
        quantization=quantization,  # type: ignore[arg-type]
        device=device,
        api_key_env=api_key_env,
    )
    for note in verdict.notes:
        common.say(note)
    if as_json:
        common.print_json(verdict.entries())
    else:
        for line in verdict.lines():
            print(line)
        for difference in verdict.differences:
            print(f"differs: {difference}")
        print("equal" if verdict.equal else "not equal")
    return common.DONE if verdict.equal else common.DIFFERS


def _check(
    a: str,
    b: str,
    prompts: Path | None,
    model: str | None,
    *,
    quantization: str | None,
    api_key_env: str | None,
    device: str,
) -> None:
    from weft.data.reading.files import find_files
    from weft.export.targets import check_pair
    from weft.models.load import check_device, resolve_model

    check_pair(a, b, model=model, quantization=quantization, api_key_env=api_key_env)
    check_device(device)
    if prompts is not None:
        find_files(prompts)
    if model is not None:
        resolve_model(model)
