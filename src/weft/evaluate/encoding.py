"""Texts as token ids, by lm_eval's conventions: where a context ends and its continuation begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from weft.errors import UserError
from weft.evaluate.questions import Continuation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def split(
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    continuation: str,
    *,
    apart: bool = False,
    encoded: Callable[[str], list[int]] | None = None,
) -> Continuation:
    """A context and its continuation as token ids.

    Both are encoded as one text, of which as many tokens as the context alone has are the context. White space at its
    end moves to the continuation before, because tokenizers join it to the next word. An empty context becomes the
    token that begins texts.

    Args:
        apart: Encode the two by themselves, as encoder-decoders need it (``Layout.writes_apart``).
        encoded: Gives the context's ids, where they may be known already; default: ``encode``.

    Raises:
        UserError: Nothing is left to be predicted, or an empty context has no token that could begin it.
    """
    kept = context.rstrip()
    context, continuation = kept, context[len(kept) :] + continuation
    first = [] if not context else encode(tokenizer, context) if encoded is None else encoded(context)
    if not first:
        ids = encode(tokenizer, continuation, special=False)
        prefix = prefix_token(tokenizer)
        first, ids = ([prefix], ids) if not ids or ids[0] != prefix else (ids[:1], ids[1:])
    elif apart:
        ids = encode(tokenizer, continuation, special=False)
    else:
        ids = encode(tokenizer, context + continuation)[len(first) :]
    if not ids:
        raise UserError(
            f"the continuation {continuation!r} adds no token to its context, which ends with {context[-40:]!r}; "
            "nothing can be predicted. Give it at least one more character."
        )
    return Continuation(first, ids)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool | None = None) -> list[int]:
    """The ids of a text, with the special tokens that the tokenizer adds.

    A text that begins with the token that begins texts, as one from a chat template may, gets none. ``special`` True or
    False: with them or without in any case.
    """
    if special is None:
        begin = tokenizer.bos_token or tokenizer.eos_token
        special = not (isinstance(begin, str) and begin and text.startswith(begin))
    return list(tokenizer.encode(text, add_special_tokens=special, verbose=False))


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that begins texts: the tokenizer's first (BOS), or its last (EOS) where it has none.

    Raises:
        UserError: It has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise UserError(
        "the tokenizer has neither bos_token nor eos_token, one of which an empty context needs. Set one in its "
        "tokenizer_config.json, or give every item a context."
    )
