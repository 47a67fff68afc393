"""Whether the embeddings of a model have a row for every token that its tokenizer can give."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from weft.base.embeddings import input_embeddings
from weft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_rows(model: nn.Module) -> int:
    """The number of tokens that have a row in the model's embeddings."""
    return int(input_embeddings(model).weight.shape[0])


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
        "the model. Take the tokenizer that the model was trained with, or a chat_template and data without this token."
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
