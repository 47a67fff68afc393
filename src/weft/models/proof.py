"""The proof, when a base is loaded, that our path through it has the results of its own forward.

A few short sequences go through the untouched model, each alone, by transformers' own code: that is the truth. Then
they go together, in one batch of mixed lengths, through our path: fused blocks in the packed stream first, then the
stream with the model's own blocks, then padded batches. The base runs in the first way whose logits are the truth's
within rounding. If there is none, the base is refused, and the message names the module where it first differs.

The limit of rounding is measured on the spot: the model's own forward sums in another order for a text alone and for
the same text in a batch.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from weft.base.body import accepted, own_logits, scaled
from weft.base.embeddings import config_of, input_embeddings, output_head
from weft.base.kinds import is_linear, linear_shape
from weft.core.adapters import Adapters, is_open
from weft.core.architecture import Architecture, body_of
from weft.core.stream import Part
from weft.errors import UserError, reason_of
from weft.layouts.choice import layout_for
from weft.models import trial
from weft.models.difference import first_difference
from weft.models.facts import FACTS, sketch
from weft.models.finding import finding_of, fused_kinds, settled, with_tables, with_way
from weft.models.fused import recognise
from weft.models.interface import install_interface
from weft.models.kept import KeptProof
from weft.models.quantize import one_kernel
from weft.models.tables import as_before, neighbour_dependent
from weft.models.truth import (
    MOST,
    UNITS,
    Truth,
    check_finite,
    check_indexer,
    first_output,
    limit_of,
    limit_of_narrow,
    name_of,
    truth_of,
)
from weft.ops.loss import HeadForm

# The proved architecture of each model, for use while adapters are open and its own forward cannot run.
_PROVED: weakref.WeakKeyDictionary[nn.Module, Architecture] = weakref.WeakKeyDictionary()


def _sketch(model: nn.Module) -> Architecture:
    try:
        return sketch(model)
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"this {name_of(model)} is not built as a language model that Weft knows: {reason_of(error)}. Take another "
            "base."
        ) from error


def describe(model: nn.Module, folder: Path | None = None) -> Architecture:
    """The ``Architecture`` of a transformers model, proved on it (on the meta device: as tables and names tell it).

    ``folder`` is the one from which the model was loaded without a change: an earlier proof of it holds again
    (``KeptProof``).

    Raises:
        UserError: Its structure is not known, or no way through it has the results of its own forward.
    """
    if model in _PROVED and is_open(model):
        return _PROVED[model]
    if any(p.is_meta for p in model.parameters()):
        return _sketch(model)
    kept = None if folder is None else KeptProof.of(model, folder)
    shape = kept.recall(model) if kept else None
    if shape is None:
        shape = _proved(model, _sketch(model))
        if kept:
            kept.keep(shape)
    _PROVED[model] = shape
    return shape


def _proved(model: nn.Module, shape: Architecture) -> Architecture:
    """``prove`` on a model in evaluation mode; afterwards it is in its former mode."""
    training = [module for module in model.modules() if module.training]
    undo = one_kernel(model)
    model.eval()
    try:
        with torch.no_grad(), as_before(model), trial.unchanging(model):
            if not shape.memory_linears:
                shape = prove(model, shape)
            else:
                with trial.in_float32(model) as widened:
                    _prove_pairs(model, shape)
                if widened:
                    _prove_pairs(model, shape)
            return shape
    finally:
        for module in training:
            module.training = True
        undo()


def prove(model: nn.Module, shape: Architecture) -> Architecture:
    """The architecture with the findings about the model and the first right way through it.

    Raises:
        UserError: No way is right; the message names the module at which the last one first differs.
    """
    check_indexer(model)
    shape = with_tables(shape, tuple(neighbour_dependent(model)))
    try:
        with trial.shallow(model, shape) as depth:
            with trial.fewer_words(model) as cut:
                found = _prove_short(model, shape, depth)
            if cut and found.head_form and _head_form(model, found) != found.head_form:
                # The model treats the rows that were cut off differently.
                found = _prove_short(model, shape, depth)
    except _OtherBlocksError as other:
        return prove(model, sketch(model, other.order))
    whole = replace(found, blocks=shape.blocks, linears=shape.linears, norms=shape.norms)
    if depth < len(shape.blocks):
        whole = _fused_everywhere(model, whole)
    return settled(whole, finding_of(whole))


class _OtherBlocksError(Exception):
    """A text goes through other blocks than those taken for the model's, which are a tower for pictures."""

    def __init__(self, order: set[str]) -> None:
        super().__init__()
        self.order = order


def _prove_short(model: nn.Module, shape: Architecture, depth: int) -> Architecture:
    """``prove`` of the first ``depth`` blocks.

    Raises:
        UserError: No way is right.
        _OtherBlocksError: The model's own forward does not call the blocks.
    """
    short = replace(shape, blocks=shape.blocks[:depth], linears=_within(shape.linears, shape, depth),
                    norms=_within(shape.norms, shape, depth))  # fmt: skip
    with trial.in_float32(model) as widened:
        truth, trace = truth_of(model, short)
        if not shape.bidirectional and shape.blocks[0] not in set(trace.order):
            raise _OtherBlocksError(set(trace.order))
        out_of_reach = _everywhere(trial.unreachable(trace), shape, depth)
        body = "" if shape.bidirectional else trace.body
        short = replace(short, body=body, unreachable=out_of_reach)
        short = replace(short, head_form=_head_form(model, short))
        found, why = _first_right(model, short, truth)
    if widened:
        _prove_narrow(model, found, truth)
    return replace(found, padded_because=why)


def _fused_everywhere(model: nn.Module, proved: Architecture) -> Architecture:
    """The architecture in which all blocks of a kind are fused as the first one is."""
    kinds = fused_kinds(proved)
    more = {
        f"{block}.{path.removeprefix(f'{proved.blocks[first]}.')}": mixin
        for block, first in trial.first_alike(model, proved).items()
        for path, mixin in kinds.items()
        if path.startswith(f"{proved.blocks[first]}.")
    }
    return with_way(proved, "fused", kinds | more) if kinds else proved


def _prove_narrow(model: nn.Module, way: Architecture, wide: Truth) -> None:
    """Repeat the proof in the model's own dtype, where it may overflow.

    ``wide`` is the truth in float32. Its distance from the model's own forward of one text is the limit of rounding.

    Raises:
        UserError: It overflows, or most tokens get other logits; a few may, where rounding chooses other experts.
    """
    text = max(wide.sequences, key=len)
    own = first_output(model, way, text)
    check_finite(model, [own])
    expected = wide.outputs[wide.sequences.index(text)]
    rounding = Truth([text], [expected], 0.0).distances([own], typical=True)[0]
    truth = replace(wide, limit=limit_of_narrow(model, own, rounding))
    typical = max(truth.distances(our_output(model, way, truth.sequences), typical=True))
    if typical > truth.limit:
        raise UserError(_refusal(model, way, typical, truth))


def _within(paths: Sequence[str], shape: Architecture, depth: int) -> tuple[str, ...]:
    gone = tuple(f"{block}." for block in shape.blocks[depth:])
    return tuple(path for path in paths if not path.startswith(gone)) if gone else tuple(paths)


def _everywhere(found: dict[str, str], shape: Architecture, depth: int) -> dict[str, str]:
    """The findings in the first blocks, for all blocks."""
    if depth == len(shape.blocks):
        return found
    inside = {
        path.removeprefix(f"{block}."): why
        for block in shape.blocks[:depth]
        for path, why in found.items()
        if path.startswith(f"{block}.")
    }
    known = {*shape.linears, *shape.norms}
    more = {f"{block}.{end}": why for block in shape.blocks[depth:] for end, why in inside.items()}
    return found | {path: why for path, why in more.items() if path in known}


def _prove_pairs(model: nn.Module, shape: Architecture) -> None:
    """Prove an encoder-decoder by its decoder's results for a few targets, each alone and all in one batch.

    Raises:
        UserError: Our path has other results, or the model's own are NaN or infinite.
    """
    sources = trial.sequences_for(model, shape)
    targets = sources[1:] + sources[:1]
    outputs = [trial.own_pair(model, [s], [t])[0] for s, t in zip(sources, targets, strict=True)]
    check_finite(model, outputs)
    again = trial.own_pair(model, [sources[0]] * 3, [targets[0]] * 3)
    truth = Truth(targets, outputs, limit_of(model, outputs, outputs[0], again))
    with contextlib.closing(Adapters(model, shape, layout_for(shape))) as adapters:
        _, hidden = adapters.run([Part(None, sources, targets=targets)])
        found = adapters.logits(hidden).split([len(target) for target in targets])
    distance = max(truth.distances(found, typical=outputs[0].dtype in MOST))
    if distance > truth.limit:
        raise UserError(
            f"this {name_of(model)} answers otherwise through Weft than by itself: its logits differ by "
            f"{distance:.3g}, where rounding explains {truth.limit:.1g}. Weft refuses what it cannot prove; take "
            "another base."
        )


def _head_form(model: nn.Module, shape: Architecture) -> HeadForm | None:
    """The form of the head with the results of the model's own code, for small and large hidden states; or None."""
    head = output_head(model)
    if shape.bidirectional or head is None:
        return shape.head_form
    if not is_linear(head):
        return None
    width, _ = linear_shape(head)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, width, generator=generator) * torch.tensor([0.1, 0.1, 1.0, 1.0, 30.0, 30.0])[:, None]
    hidden = rows.to(head.weight.device, head.weight.dtype if head.weight.is_floating_point() else torch.bfloat16)
    try:
        own = own_logits(model, body_of(model, shape), hidden)
    except Exception:  # a dense layer of another width stands before the head
        return None
    # Not the module's own forward, because an output layer may do more than its weight says.
    floating = head.weight.is_floating_point() and isinstance(head, nn.Linear)
    plain = nn.functional.linear(hidden, head.weight, head.bias) if floating else head(hidden)
    if plain.shape != own.shape:
        return None  # some of the vocabulary is cut off
    for form in _forms(model, shape.head_form or HeadForm(), own, plain):
        near = UNITS * torch.finfo(plain.dtype).eps * plain.abs().amax(-1, keepdim=True) * abs(form.scale)
        if bool(((scaled(plain, form) - own).abs() <= near).all()):
            return form
    return None


def _forms(model: nn.Module, told: HeadForm, own: Tensor, plain: Tensor) -> Iterator[HeadForm]:
    yield told
    yield HeadForm()
    largest = plain.abs().argmax()
    yield HeadForm(float((own.flatten()[largest] / plain.flatten()[largest]).double()))
    for name, value in vars(model.config).items():
        if "cap" in name and isinstance(value, (int, float)) and value and not isinstance(value, bool):
            yield HeadForm(1.0, float(value))
            yield HeadForm(told.scale, float(value))


def _first_right(model: nn.Module, shape: Architecture, truth: Truth) -> tuple[Architecture, str]:
    """The first way whose outputs are the truth's, and the reason if it is not the stream."""
    why = ""
    last: tuple[Architecture, float | Exception] | None = None
    for way in _ways(model, shape):
        try:
            distance = max(truth.distances(our_output(model, way, truth.sequences)))
            if way.install_attention is None and not shape.bidirectional:
                distance = max(distance, _narrow(model, way, truth))
        except Exception as error:  # an attention asks for what the stream does not have, or a body takes no embeddings
            last = last or (way, error)
            why = why or reason_of(error)
            continue
        if distance <= truth.limit:
            return way, "" if way.install_attention is not None else why
        if way.install_attention is None or last is None or isinstance(last[1], Exception):
            last = (way, distance)
        why = why or f"the stream's logits differ from its own by {distance:.2g}"
    assert last is not None
    raise UserError(_refusal(model, last[0], last[1], truth))


def _ways(model: nn.Module, shape: Architecture) -> Iterator[Architecture]:
    install = shape.install_attention
    if not _takes_embeddings(model, shape):
        shape = replace(shape, by_ids=True)
    if install is install_interface and (kinds := recognise(model)):
        yield with_way(shape, "fused", kinds)
    if install is not None:
        yield shape
    config = config_of(model)
    if install is install_interface and config.model_type not in FACTS and not shape.by_ids:
        yield replace(shape, by_ids=True)
    yield with_way(shape, "padded")
    if not (shape.bidirectional or shape.by_ids):
        yield replace(with_way(shape, "padded"), by_ids=True)


def _takes_embeddings(model: nn.Module, shape: Architecture) -> bool:
    """Whether the body runs on embeddings of no token: Gemma 4 looks for the tokens of its embeddings."""
    table = input_embeddings(model)
    body = body_of(model, shape)
    rows = torch.randn(1, 3, table.weight.shape[1], generator=torch.Generator().manual_seed(0))
    try:
        body(inputs_embeds=rows.to(table.weight), **accepted(body, use_cache=False))
    except Exception:  # each body refuses in its own way
        return False
    return True


def our_output(model: nn.Module, shape: Architecture, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """The results of our path for the sequences in one batch: logits [T, vocabulary] each, or an encoder's [T, d]."""
    with contextlib.closing(Adapters(model, shape, layout_for(shape))) as adapters:
        hidden = adapters.forward(adapters.stream([Part(None, sequences)]))
        found = hidden if shape.bidirectional else adapters.logits(hidden)
    return list(found.split([len(s) for s in sequences]))


def _narrow(model: nn.Module, way: Architecture, truth: Truth) -> float:
    """The distance from the truth of padded batches narrower than the first: some models pad by themselves."""
    few = [truth.sequences[-1][:9], truth.sequences[0][:1]]
    outputs = [trial.own_output(model, way, [sequence])[0] for sequence in few]
    return max(Truth(few, outputs, truth.limit).distances(our_output(model, way, few)))


def _refusal(model: nn.Module, way: Architecture, found: float | Exception, truth: Truth) -> str:
    kind = name_of(model)
    how = "in padded batches" if way.install_attention is None else "in the packed stream"
    if isinstance(found, Exception):
        return (
            f"this {kind} cannot be run: {how} it stops with {type(found).__name__}: {reason_of(found)}. Weft refuses "
            "what it cannot prove; take another base, or report this with the versions that `weft doctor` prints."
        )
    apart = truth.distances(our_output(model, way, truth.sequences))
    own = functools.partial(trial.own_output, model, way)
    place = first_difference(model, way, truth.sequences, apart.index(max(apart)), own)
    where = f"The first module that differs is {place}." if place else "Where it begins is too small to be seen."
    return (
        f"this {kind} answers otherwise through Weft than by itself: {how} its outputs differ by {found:.3g}, where "
        f"rounding explains {truth.limit:.1g}. {where} Weft refuses what it cannot prove; take another base, or report "
        "this with the versions that `weft doctor` prints."
    )
