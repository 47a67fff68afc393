"""Which tasks a base can be trained for."""

from __future__ import annotations

from weft.core.architecture import Architecture
from weft.errors import UserError


def check_job(name: str, task: str, base: str, shape: Architecture) -> None:
    """Refuse a job that the base cannot do; ``causal_lm``, the default, is whatever writing the base was made for.

    Args:
        base: what the user calls the base.

    Raises:
        UserError: ``seq2seq`` without an encoder-decoder, classification with one, or writing with an encoder.
    """
    kind = shape.model_type
    if task == "seq2seq" and shape.task != "seq2seq":
        raise UserError(
            f"job '{name}': task is seq2seq, but a {kind} model is no encoder-decoder (T5 and mT5 are). Leave task "
            "out, or take such a base."
        )
    if task == "sequence_classification" and shape.task == "seq2seq":
        raise UserError(
            f"job '{name}': task is sequence_classification, which Weft does not do with an encoder-decoder ({kind}). "
            "Set task: seq2seq and let it write the name of the class, or take another base."
        )
    if task == "causal_lm" and not shape.writes:
        raise UserError(
            f"job '{name}': task is causal_lm, but {base} is an encoder ({kind}) and writes no text. Set task: "
            "sequence_classification, or take a base that writes."
        )
