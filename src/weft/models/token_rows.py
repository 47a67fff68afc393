"""The rows of a model's embeddings: one for every token that its tokenizer can give, and new ones for new tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from weft.base.embeddings import input_embeddings, output_head
from weft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_rows(model: nn.Module) -> int:
    """The number of tokens that have a row in the model's embeddings."""
    return int(input_embeddings(model).weight.shape[0])


def check_tokens(tokens: Sequence[str]) -> None:
    """Refuse texts that no tokenizer could take as tokens.

    Raises:
        UserError: One is there twice, or has nothing to see.
    """
    for token in tokens:
        if not token.strip() or tokens.count(token) > 1:
            raise UserError(f"add_tokens: {token!r} is {'there twice' if token.strip() else 'no word'}; leave it out.")


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> tuple[int, ...]:
    """Make each of ``tokens`` one token of the tokenizer, wherever it stands in a text; tokens that it has stay.

    Returns:
        Their ids.

    Raises:
        UserError: One cannot be a token of its own.
    """
    from transformers import AddedToken

    check_tokens(tokens)
    for token in tokens:
        if token not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    ids = tuple(tokenizer.get_vocab()[token] for token in tokens)
    for token, number in zip(tokens, ids, strict=True):
        if (found := tokenizer.encode(token, add_special_tokens=False, verbose=False)) != [number]:
            raise UserError(
                f"add_tokens: {token!r} is a piece of the vocabulary already (id {number}), and in a text by itself it "
                f"is {len(found)} tokens. Take another spelling, such as {f'<|{token}|>'!r}."
            )
    return ids


@torch.no_grad()
def add_rows(model: nn.Module, rows: int) -> None:
    """Give the embeddings, and the output layer, rows up to ``rows``; each new one is the mean of those there."""
    before = token_rows(model)
    if rows <= before:
        return
    cast(Any, model).resize_token_embeddings(rows, mean_resizing=False)
    for module in (input_embeddings(model), output_head(model)):
        for parameter in module.parameters(recurse=False) if module is not None else ():
            if not parameter.is_meta:
                parameter[before:] = parameter[:before].double().mean(0).to(parameter)
    model.requires_grad_(False)


def check_rows(ids: Iterable[int], rows: int, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse token ids that the model has no row for; ``where`` names their place.

    Raises:
        UserError: There is one. The message names the token, its id and the number of rows.
    """
    highest = max(ids, default=-1)
    if highest < rows:
        return
    token = tokenizer.convert_ids_to_tokens([highest])[0]
    named = f"token {token!r} (id {highest})" if token is not None else f"token id {highest}"
    raise UserError(
        f"{where}: {named} has no row in the model's embeddings, which have {rows}. The tokenizer has more tokens than "
        "the model. Take the tokenizer that the model was trained with, or a chat_template and data without this "
        "token, or train a row for it (add_tokens)."
    )


def check_special_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer whose BOS or EOS, which stand in every text, have no row in the model.

    Raises:
        UserError: One has none.
    """
    rows = token_rows(model)
    for key in ("bos_token", "eos_token"):
        number = getattr(tokenizer, f"{key}_id", None)
        if isinstance(number, int):
            check_rows([number], rows, tokenizer, f"{name}: {key} of the tokenizer")
