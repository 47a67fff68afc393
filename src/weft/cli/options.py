"""Options that ``chat`` and ``generate`` have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from weft.errors import UserError
from weft.foreign import read_text

Target = Annotated[str, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="Folder of a run, of an adapter, or a model.")]
Model = Annotated[str | None, typer.Option(help="Base to use instead of the one that the target names.")]
System = Annotated[str | None, typer.Option(help="System message.")]
ChatTemplate = Annotated[
    str | None, typer.Option(metavar="FILE|TEXT", help="Chat template instead of the one of training.")
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer (256, or what fits).")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this mass.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from this many likeliest tokens; 0: all.")]
Seed = Annotated[int, typer.Option(help="Seed of the draws; every answer has its own generator.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0")]
Dtype = Annotated[str, typer.Option(help="auto (as in training), float32, bfloat16, float16")]


def template_text(given: str | None) -> str | None:
    """A template's text: what was given, or what is in the file that was.

    Raises:
        UserError: there is no such file, and it is no template either.
    """
    if given is None or "{{" in given or "{%" in given:
        return given
    try:
        return read_text(given)
    except UserError as error:
        raise UserError(
            f"--chat-template {given}: neither a template (with {{{{ … }}}}) nor a readable file: {error}"
        ) from None
