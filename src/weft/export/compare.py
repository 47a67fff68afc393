"""What `weft verify` does: it opens two sides and compares them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from weft.data import Renderer
from weft.data.queries import QueryRecipe, read_queries
from weft.data.settings import ReadSettings
from weft.errors import UserError
from weft.export import llama_cpp
from weft.export.proof import fixed_texts
from weft.export.server import Server, verify_server
from weft.export.sides import ModelHere, open_here
from weft.export.targets import check_pair, is_address, is_gguf
from weft.export.verdict import Verdict
from weft.export.verify import ModelsVerdict, verify_models
from weft.models.quantize import Kind
from weft.paths import local_path


def verify_sides(
    a: str,
    b: str,
    *,
    prompts: Path | None = None,
    model: str | None = None,
    quantization: Kind | None = None,
    device: str = "auto",
    api_key_env: str | None = None,
) -> Verdict:
    """Compare two of: a run with one adapter, an adapter's folder, a model, a GGUF file, a server's address.

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
            return _with_llama_cpp(verify_models(here[0], here[1], texts), here)
        server = stack.enter_context(Server(a if is_address(a) else b, key=_key(api_key_env)))
        return verify_server(here[0], server, texts, server_is_a=is_address(a))


def _with_llama_cpp(verdict: ModelsVerdict, sides: Sequence[ModelHere]) -> ModelsVerdict:
    """The verdict, and whether llama.cpp makes of a GGUF file what transformers does, where it is installed."""
    notes, differences = list(verdict.notes), list(verdict.differences)
    for side in (side for side in sides if is_gguf(side.name)):
        if not llama_cpp.installed():
            notes.append(f"{side.name} was read by transformers; with llama-cpp-python llama.cpp would be asked too")
            continue
        texts = [side.text(text) for text in fixed_texts()]
        proof = llama_cpp.compare(local_path(side.name), [(ids, side.logits(ids)) for ids in texts])
        (notes if proof.holds else differences).append(f"{side.name} {proof.line()}, beside transformers")
    return replace(verdict, notes=tuple(notes), differences=tuple(differences))


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
