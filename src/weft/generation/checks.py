"""What a request is refused for before it is taken."""

from __future__ import annotations

from weft.core.adapters import Adapters
from weft.errors import UserError
from weft.generation.request import Request


def check_writes(adapters: Adapters, name: str | None) -> None:
    """Refuse a base that writes no text under adapter ``name``.

    Raises:
        UserError: the base is an encoder, or the adapter was trained to classify.
    """
    what = "A classification adapter answers with a label: weft generate, or weft.evaluate.predict."
    if not adapters.architecture.writes:
        raise UserError(f"a {adapters.architecture.model_type} model is an encoder: it writes no text. {what}")
    if not adapters.head(name).writes:
        raise UserError(f"adapter '{name}' was trained to classify; it writes no text. {what}")


def check_request(request: Request, adapters: Adapters) -> None:
    """Refuse what the base cannot answer.

    Raises:
        UserError: It writes no text, or prompt and answer together are longer than it allows.
    """
    check_writes(adapters, request.adapter)
    if request.max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {request.max_new_tokens}; at least 1 is needed.")
    learned = 0 if request.adapter is None else adapters[request.adapter].num_learned_tokens
    limit, length = adapters.architecture.max_length, len(request.prompt) + learned
    if limit is not None and length + request.max_new_tokens > limit:
        raise UserError(
            f"a prompt of {length} tokens and max_new_tokens {request.max_new_tokens} exceed the model's limit of "
            f"{limit}."
        )
