"""The truth that a base is proved against: what its own forward gives for a few short texts, and what makes it none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.core.architecture import Architecture
from weft.core.embeddings import config_of, input_embeddings
from weft.core.site import mixes_rows
from weft.errors import UserError
from weft.models import trial

# Our path may differ from the truth by so many times what two orders of summation differ by,
NOISE = 10
# and by so many units of the last place of the largest logit, where the two orders agree by chance.
UNITS = 32
# But never by more than this share of it.
MOST = {torch.float16: 0.1, torch.bfloat16: 0.1}
# In bfloat16 rounding hides a factor of 0.85: the proof is made in float32 (``trial.in_float32``).
# In int8 the outliers of one text change how another one's rows are rounded, and no text is alone in a batch.
MIXED = 0.1


@dataclass(frozen=True)
class Truth:
    """What the untouched model gives: per sequence its logits [T, vocabulary] (an encoder's hidden states [T, d]), and
    how far ours may lie from them."""

    sequences: list[list[int]]
    outputs: list[Tensor]
    limit: float

    def distances(self, found: Sequence[Tensor], *, typical: bool = False) -> list[float]:
        """The largest difference of each sequence, or infinity where a number is none; ``typical``: of the token in the
        middle, when they are ordered by it."""
        worst = []
        for a, b in zip(self.outputs, found, strict=True):
            # Some models bar a part of their vocabulary with -inf.
            same = torch.where(a == b, 0.0, (a.double() - b.double()).abs())
            rows = same.nan_to_num(float("inf"), float("inf")).amax(-1)
            worst.append(float(rows.median() if typical else rows.max()))
        return worst


def truth_of(model: nn.Module, shape: Architecture) -> tuple[Truth, trial.Trace]:
    """The truth about a model, and what its own forward went through.

    Raises:
        UserError: it does not run by itself, or gives numbers that are none.
    """
    sequences = trial.sequences_for(model, shape)
    longest = max(sequences, key=len)
    tables = [path for path, module in model.named_modules() if isinstance(module, nn.Embedding)]
    with trial.watched(model, [*shape.linears, *shape.norms, *tables]) as trace:
        first = first_output(model, shape, longest)
    outputs = [first if s is longest else trial.own_output(model, shape, [s])[0] for s in sequences]
    check_finite(model, outputs)
    again = trial.own_output(model, shape, [longest, longest, _other_end(longest)])
    if not shape.bidirectional:
        check_causal(model, shape, longest, first, again[2])
    return Truth(sequences, outputs, limit_of(model, outputs, first, again[:2])), trace


def first_output(model: nn.Module, shape: Architecture, text: list[int]) -> Tensor:
    """What the model's own forward gives for a text, when it runs for the first time in its dtype.

    Raises:
        UserError: it does not run.
    """
    try:
        return trial.own_output(model, shape, [text])[0]
    except Exception as error:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        raise UserError(
            f"this {name_of(model)} does not run by itself in {dtype}: transformers' own forward of {len(text)} tokens "
            f"stops with {type(error).__name__}: {reason_of(error)}. Take another dtype or another base."
        ) from error


def limit_of(model: nn.Module, outputs: Sequence[Tensor], alone: Tensor, again: Tensor) -> float:
    """How far rounding reaches, by what the output ``alone`` is ``again``, in a batch."""
    scale = largest(outputs)
    if any(mixes_rows(module) for module in model.modules()):
        return MIXED * scale
    apart = (again.double() - alone.double()).abs()
    noise = float(apart[apart.isfinite()].max())
    dtype = _dtype(model)
    # transformers computes softmax and norms of a float64 model in float32.
    units = UNITS * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    # A model whose own batch mixes its rows would else measure that as rounding.
    return min(max(NOISE * noise / max(scale, 1e-30), units), MOST.get(dtype, 1e-4)) * scale


def limit_of_narrow(model: nn.Module, own: Tensor, rounding: float) -> float:
    """How far rounding reaches in 16 bits, where the model's ``own`` output lies ``rounding`` from that in float32."""
    scale, dtype = largest([own]), _dtype(model)
    return min(max(NOISE * rounding, UNITS * torch.finfo(dtype).eps * scale), MOST.get(dtype, 1e-4) * scale)


def _dtype(model: nn.Module) -> torch.dtype:
    """What it computes in; some models (Mamba) give logits in float32 whatever that is."""
    table = input_embeddings(model)
    dtype: torch.dtype = table.weight.dtype
    return dtype


def largest(outputs: Sequence[Tensor]) -> float:
    """The largest number of them; some models bar a part of their vocabulary with -inf."""
    return max(float(output[output.isfinite()].abs().max()) for output in outputs)


def _other_end(text: list[int]) -> list[int]:
    """The text with another last token, if it has two kinds."""
    return [*text[:-1], next((token for token in text if token != text[-1]), text[-1])]


def check_causal(model: nn.Module, shape: Architecture, text: list[int], output: Tensor, changed: Tensor) -> None:
    """Refuse a language model whose tokens see what comes after them: it would learn to copy, and can write nothing.

    ``output`` is what the text gives, ``changed`` what it gives with another last token.

    Raises:
        UserError: another last token changes the outputs before it.
    """
    if any(mixes_rows(module) for module in model.modules()):
        return  # in int8 every row is rounded by what the last one is
    bound = MOST.get(_dtype(model), 1e-4) * largest([output])

    def differs(changed: Tensor) -> Tensor:
        return (changed[:-1].double() - output[:-1].double()).abs()

    if bool((differs(changed) > bound).any()):
        # Alone, for it may be the batch's doing.
        apart = differs(trial.own_output(model, shape, [_other_end(text)])[0])
        if not bool((apart > bound).any()):
            return
        raise UserError(
            f"this {name_of(model)} is no causal language model: another last token changes its answers before it by "
            f"{float(apart[apart.isfinite()].max()):.2g}. If its config.json can say is_decoder, that must be true; "
            "else take another base."
        )


def check_finite(model: nn.Module, outputs: Sequence[Tensor]) -> None:
    """Refuse a base whose own forward overflows: nothing can be proved of it, and nothing learned from it.

    Raises:
        UserError: an output is NaN or infinite, or a whole text's are barred.
    """
    bad = sum(int((o.isnan() | (o == float("inf"))).sum()) for o in outputs)
    if bad or any(not bool(output.isfinite().any()) for output in outputs):
        dtype = str(outputs[0].dtype).removeprefix("torch.")
        hint = "Load it in bfloat16 or float32 (dtype)." if dtype == "float16" else "Are its weights damaged?"
        raise UserError(
            f"this {name_of(model)} does not run by itself in {dtype}: {bad} of the "
            f"{sum(output.numel() for output in outputs)} numbers that transformers' own forward gives for three short "
            f"texts are NaN or infinite. {hint}"
        )


def check_indexer(model: nn.Module) -> None:
    """Refuse sparse attention that picks keys by a score of its own: where scores are equal, many are zero, what is
    picked depends on how wide the batch is, so no batch gives what a text gives alone.

    Raises:
        UserError: the configuration has an ``index_topk``.
    """
    config = config_of(model)
    chosen = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "index_topk", None)
    if chosen is None and any(path.rpartition(".")[2] == "indexer" for path, _ in model.named_modules()):
        chosen = "some"
    if chosen:
        raise UserError(
            f"this {name_of(model)} picks {chosen} keys per token by an indexer (index_topk), and what it picks among "
            "equal scores depends on the batch: an adapter would be trained on other answers than it gives later. Take "
            "another base."
        )


def reason_of(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def name_of(model: nn.Module) -> str:
    """The model's type and class, for messages."""
    config = config_of(model)
    return f"{config.model_type} model ({type(model).__name__})"
