"""What `weft verify` does: it opens two sides and compares them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from weft.data import Renderer
from weft.data.queries import QueryRecipe, read_queries
from weft.data.settings import ReadSettings
from weft.errors import UserError
from weft.export.server import Server, verify_server
from weft.export.sides import ModelHere, open_here
from weft.export.targets import check_pair, is_address
from weft.export.verdict import Verdict
from weft.export.verify import verify_models
from weft.models.quantize import Quantization


def verify_sides(
    a: str,
    b: str,
    *,
    prompts: Path | None = None,
    model: str | None = None,
    quantization: Quantization | None = None,
    device: str = "auto",
    api_key_env: str | None = None,
) -> Verdict:
    """Compare two of: a run with one adapter, an adapter's folder, a model, a server's address.

    Args:
        prompts: a file of held-out prompts; default: fixed ones.
        model: the base of adapters, instead of the one that they name.
        quantization: how ``b`` is loaded, where its folder is not quantised already.
        api_key_env: the environment variable that holds a server's key.

    Raises:
        UserError: One of them cannot be opened, or the two cannot be compared.
    """
    check_pair(a, b, model=model, quantization=quantization, api_key_env=api_key_env)
    with ExitStack() as stack:
        here: list[ModelHere] = []
        for target, how in ((a, None), (b, quantization)):
            if not is_address(target):
                here.append(stack.enter_context(open_here(target, model=model, device=device, quantization=how)))
        texts = _texts(prompts, here[0]) if prompts is not None else []
        if len(here) == 2:
            return verify_models(here[0], here[1], texts)
        server = stack.enter_context(Server(a if is_address(a) else b, key=_key(api_key_env)))
        return verify_server(here[0], server, texts, server_is_a=is_address(a))


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    found = os.environ.get(variable)
    if not found:
        raise UserError(f"--api-key-env {variable}: there is no such environment variable, or it is empty.")
    return found


def _texts(file: Path, side: ModelHere) -> list[str]:
    """The questions in a file; of a conversation, its last message."""
    recipe = QueryRecipe(
        renderer=Renderer(side.tokenizer), token_rows=len(side.tokenizer), settings=ReadSettings(), task="causal_lm"
    )
    found = []
    for query in read_queries(file, recipe):
        said = query.said
        found.append(said if isinstance(said, str) else said[-1]["content"])
    return found
