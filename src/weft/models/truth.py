"""The truth for the proof of a base: the results of its own forward for a few short texts, if they can be one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.base.embeddings import config_of, input_embeddings
from weft.core.architecture import Architecture
from weft.core.site import mixes_rows
from weft.errors import UserError, reason_of
from weft.models import trial

# Our path may differ from the truth by so many times the difference of two orders of summation,
NOISE = 10
# and by so many units of the last place of the largest logit, where the two orders agree by chance.
UNITS = 32
# But never by more than this share of it.
MOST = {torch.float16: 0.1, torch.bfloat16: 0.1}
# In bfloat16 rounding hides a factor of 0.85: the proof is made in float32 (``trial.in_float32``).
# In int8 the outliers of one text change the rounding of another one's rows, and no text is alone in a batch.
MIXED = 0.1


@dataclass(frozen=True)
class Truth:
    """The results of the untouched model, logits [T, vocabulary] per sequence (an encoder's hidden states [T, d]), and
    the largest distance of ours from them."""

    sequences: list[list[int]]
    outputs: list[Tensor]
    limit: float

    def distances(self, found: Sequence[Tensor], *, typical: bool = False) -> list[float]:
        """The largest difference in each sequence's results [T, ...], or infinity where one is NaN.

        ``typical`` gives the median of the tokens' largest differences.
        """
        worst = []
        for a, b in zip(self.outputs, found, strict=True):
            # Some models bar a part of their vocabulary with -inf.
            same = torch.where(a == b, 0.0, (a.double() - b.double()).abs())
            rows = same.nan_to_num(float("inf"), float("inf")).amax(-1)
            worst.append(float(rows.median() if typical else rows.max()))
        return worst


def truth_of(model: nn.Module, shape: Architecture) -> tuple[Truth, trial.Trace]:
    """The truth about a model, and the steps of its own forward.

    Raises:
        UserError: It does not run by itself, or gives NaN or infinity.
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
    """The result of the model's first forward in its dtype for a text, [T, vocabulary] or an encoder's [T, d].

    Raises:
        UserError: It does not run.
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
    """The limit of rounding, by the output ``alone`` [T, ...] and the same text's ``again`` [2, T, ...] in a batch."""
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
    """The limit of rounding in 16 bits, if the model's ``own`` output [T, ...] is ``rounding`` from that in float32."""
    scale, dtype = largest([own]), _dtype(model)
    return min(max(NOISE * rounding, UNITS * torch.finfo(dtype).eps * scale), MOST.get(dtype, 1e-4) * scale)


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which it computes; some models (Mamba) give logits in float32 in any case, and 4-bit linears may
    multiply in a narrower one."""
    own = [dtype for m in model.modules() if isinstance(dtype := getattr(m, "compute_dtype", None), torch.dtype)]
    return max([input_embeddings(model).weight.dtype, *own], key=lambda dtype: torch.finfo(dtype).eps)


def largest(outputs: Sequence[Tensor]) -> float:
    """The largest number in outputs of any shape, without the -inf by which some models bar parts of the vocabulary."""
    return max(float(output[output.isfinite()].abs().max()) for output in outputs)


def _other_end(text: list[int]) -> list[int]:
    """The text with another last token, if it has two kinds."""
    return [*text[:-1], next((token for token in text if token != text[-1]), text[-1])]


def check_causal(model: nn.Module, shape: Architecture, text: list[int], output: Tensor, changed: Tensor) -> None:
    """Refuse a language model whose tokens see later ones: it would learn to copy, and cannot write.

    ``output`` [T, vocabulary] is the result for the text, ``changed`` [T, vocabulary] that with another last token.

    Raises:
        UserError: Another last token changes the outputs before it.
    """
    if any(mixes_rows(module) for module in model.modules()):
        return  # in int8 the last row changes the rounding of all rows
    bound = MOST.get(_dtype(model), 1e-4) * largest([output])

    def differs(changed: Tensor) -> Tensor:
        return (changed[:-1].double() - output[:-1].double()).abs()

    if bool((differs(changed) > bound).any()):
        # Try it alone, because the batch may be the cause.
        apart = differs(trial.own_output(model, shape, [_other_end(text)])[0])
        if not bool((apart > bound).any()):
            return
        raise UserError(
            f"this {name_of(model)} is no causal language model: another last token changes its answers before it by "
            f"{float(apart[apart.isfinite()].max()):.2g}. If its config.json can say is_decoder, that must be true; "
            "else take another base."
        )


def check_finite(model: nn.Module, outputs: Sequence[Tensor]) -> None:
    """Refuse a base whose own forward, outputs [T, ...], overflows: it can be neither proved nor trained.

    Raises:
        UserError: An output is NaN or infinite, or all of a text's are -inf.
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
    """Refuse sparse attention that chooses keys by a score of its own.

    Many scores are zero, and among equal ones the choice depends on the width of the batch. So no batch has the results
    of a text alone.

    Raises:
        UserError: The configuration has an ``index_topk``.
    """
    chosen = getattr(config_of(model).get_text_config(), "index_topk", None)
    if chosen is None and any(path.rpartition(".")[2] == "indexer" for path, _ in model.named_modules()):
        chosen = "some"
    if chosen:
        raise UserError(
            f"this {name_of(model)} picks {chosen} keys per token by an indexer (index_topk), and what it picks among "
            "equal scores depends on the batch: an adapter would be trained on other answers than it gives later. Take "
            "another base."
        )


def name_of(model: nn.Module) -> str:
    """The model's type and class, for messages."""
    config = config_of(model)
    return f"{config.model_type} model ({type(model).__name__})"
