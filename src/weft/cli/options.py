"""Options that several verbs have in common."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import weft
from weft.errors import UserError

if TYPE_CHECKING:
    from weft.generation.sampling import Sampling

Config = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [KEY=VALUE]...",
        help="The run's configuration (or, for `weft train`, the folder of a run to resume); then settings that win "
        "over it, such as learning_rate=1e-3 or jobs.0.r=16 (docs/config.md has them all).",
        show_default=False,
    ),
]
Target = Annotated[str, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="Folder of a run, of an adapter, or a model.")]
Model = Annotated[str | None, typer.Option(help="Base to use instead of the one that the target names.")]
System = Annotated[str | None, typer.Option(help="System message.")]
ChatTemplate = Annotated[
    str | None, typer.Option(metavar="NAME|FILE|TEXT", help="Chat template instead of the one of training.")
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer (256, or what fits).")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this mass.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from this many likeliest tokens; 0: all.")]
MinP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Draw from tokens with at least this share of the likeliest's.")
]
RepetitionPenalty = Annotated[float, typer.Option(help="Makes tokens of prompt and answer rarer; 1: does nothing.")]
PresencePenalty = Annotated[
    float, typer.Option(min=-2.0, max=2.0, help="Taken off the logits of tokens that the answer has.")
]
FrequencyPenalty = Annotated[float, typer.Option(min=-2.0, max=2.0, help="The same, as often as the answer has them.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be repeated.")]
Seed = Annotated[int, typer.Option(help="Seed of the draws; every answer has its own generator.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Dtype = Annotated[str, typer.Option(help="auto (as in training), float32, bfloat16, float16")]


# The options of those who write, and of those who draw.
DRAWS = ("top_p", "top_k", "min_p", "seed")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
WRITES = ("system", "chat_template", "raw", "max_new_tokens", "temperature", *DRAWS, *PENALTIES, "stop")


def refuse_idle(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Refuse options that change nothing; ``why`` says because of what.

    Raises:
        UserError: One of the ``names`` stands on the command line.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(f"--{name.replace('_', '-')} does nothing {why}. Leave it out.")


def sampling_of(given: Mapping[str, Any]) -> Sampling:
    """How answers are drawn and stopped, by the options ``given``.

    Raises:
        UserError: One of them is out of its range.
    """
    from weft.generation.sampling import Sampling
    from weft.generation.text import StopStrings

    StopStrings(given["stop"] or ())  # which refuses an empty one
    drawn = {name: given[name] for name in ("min_p", "seed", *PENALTIES)}
    return Sampling(given["temperature"], given["top_k"], given["top_p"], **drawn)


def numbers(option: str, text: str | None) -> tuple[float, ...]:
    """The numbers of an option, which stand between commas; none if it is not given.

    Raises:
        UserError: One is no finite number.
    """
    if text is None:
        return ()
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text!r}: expected numbers separated by commas, such as 0.7,0.3.") from None
    if not all(map(math.isfinite, found)):
        raise UserError(f"{option} {text!r}: every weight must be a finite number.")
    return found


@cache
def _sentences() -> dict[str, str]:
    """The sentence of each key of the configuration. The files are parsed and not imported, which would load torch."""
    found = {}
    for file in ("training/settings.py", "data/settings.py"):  # a run's key wins over a job's
        for node in ast.walk(ast.parse((Path(weft.__file__).parent / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
                told = {one.arg: one.value for one in node.value.keywords}
                said = told.get("description")
                # Sentences that are made of others stand in the reference alone.
                if isinstance(said, ast.Constant) and isinstance(said.value, str):
                    default = [str(one.value) for one in node.value.args if isinstance(one, ast.Constant) and one.value]
                    found[ast.unparse(node.target)] = said.value + "".join(f" (default: {one})" for one in default)
    return found


def meaning(key: str) -> str:
    """The help of an option that is a key of the run's configuration."""
    text = _sentences()[key]
    return re.sub(r" \(\[.*?\]\(.*?\)\)|`", "", f"{text[0].upper()}{text[1:]}.")


def template_text(given: str | None) -> str | None:
    """The text of a template, which a name, a file or the text itself says.

    Raises:
        UserError: There is no such file, and no template of that name.
    """
    from weft.data.rendering.templates import template_text as text_of

    return None if given is None else text_of(given).text
