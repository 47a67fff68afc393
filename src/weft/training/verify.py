"""The proof, on the first batch of a run, that a sequence does not feel the others in its pack.

A few short sequences of every job's first step, of the pack that holds most, go through the model three times:
together, together with other token ids in all but one of each job, and that one alone. Nothing is drawn and nothing is
kept, so the run is the same with the proof and without.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from weft.base.embeddings import input_embeddings
from weft.core.adapters import Adapters
from weft.core.site import sites_in
from weft.core.stream import Part
from weft.data import Sample
from weft.errors import UserError
from weft.objectives.passes import Work, sequence_losses
from weft.training.job import Job

_ADVICE = (
    "Please report this, with the versions that `weft doctor` prints. Until then batch_size: 1 without "
    "gradient_accumulation_steps trains without neighbours (one job per run); verify_packing: false trains all the "
    "same, on samples that feel each other."
)
# So many sequences of each job take part: the shortest and one longest, so that it costs a fraction of a step.
_SEQUENCES = 4
# How far the loss alone may lie from the loss in the pack, relative to 1 + the loss: other shapes round otherwise.
_ALONE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# How far it may move when only the neighbours' ids change: the shapes are the same, so only kernels can differ.
_NEIGHBOURS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}


@dataclass(frozen=True)
class Proof:
    """The largest differences, and how many sequences stood for the rest."""

    alone: float = 0.0
    neighbours: float = 0.0
    sequences: int = 0


def verify_packing(adapters: Adapters, jobs: Sequence[Job]) -> Proof:
    """Compare losses in a pack of the jobs' coming step: packed, alone, and beside other neighbours.

    Raises:
        UserError: a loss depends on the neighbours; the message says whose, by how much, and which attention did it.
    """
    device = adapters.device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        return _verify(adapters, jobs)


def _verify(adapters: Adapters, jobs: Sequence[Job]) -> Proof:
    # Best fit puts long sequences first, at times alone. The proof takes the pack in which most lie together.
    learning = [job for job in jobs if job.active and not job.rolls]  # answers of their own are not written yet
    packs = {job.name: _shortest(_sequences(max(job.micro_batches(), key=len))) for job in learning}
    if sum(len(samples) for samples in packs.values()) < 2:
        return Proof()  # nothing is packed
    vocabulary = input_embeddings(adapters.model).weight.shape[0]
    _check_positions(adapters, packs)
    together = _last_losses(adapters, packs)
    others = {name: [*(_changed(s, vocabulary) for s in samples[:-1]), samples[-1]] for name, samples in packs.items()}
    proof = Proof(sequences=len(packs))
    # In int8 a row's product takes another path if a neighbour has an outlier: rounding, as of a shape that differs.
    mixed = any(site.apart for _, site in sites_in(adapters.model))
    near = _ALONE[torch.bfloat16 if mixed else adapters.dtype]
    nothing = near if mixed else _NEIGHBOURS[adapters.dtype]
    beside = _last_losses(adapters, others) if any(len(samples) > 1 for samples in packs.values()) else together
    for name, samples in packs.items():
        alone = _last_losses(adapters, {name: samples[-1:]})[name]
        if not math.isfinite(alone):
            continue  # no number to compare; what comes of it, the first step says
        moved, apart = abs(beside[name] - together[name]), abs(alone - together[name])
        scale = 1 + abs(alone)
        if not moved <= nothing * scale:
            _refuse(adapters, name, samples[-1], together[name], beside[name], when="when only other sequences change")
        if not apart <= near * scale:
            _refuse(adapters, name, samples[-1], together[name], alone, when="alone")
        proof = replace(proof, alone=max(proof.alone, apart), neighbours=max(proof.neighbours, moved))
    return proof


def _sequences(samples: Sequence[Sample]) -> list[Sample]:
    """The samples; of a record whose answers were judged each answer after its prompt."""
    return [one for sample in samples for one in sample.each]


def _shortest(samples: Sequence[Sample]) -> list[Sample]:
    """The shortest samples, and the longest last: most leaks come from what stands before, and it chooses the tables of
    positions."""
    by_size = sorted(samples, key=lambda sample: sample.size)
    return by_size if len(by_size) <= _SEQUENCES else [*by_size[: _SEQUENCES - 1], by_size[-1]]


def _check_positions(adapters: Adapters, packs: dict[str, list[Sample]]) -> None:
    """Refuse positions that go on counting. Losses may hide them: rotary angles see differences only."""
    stream = adapters.stream([Part(name, [s.input_ids for s in samples]) for name, samples in packs.items()])
    begins = [end - length for end, length in zip(itertools.accumulate(stream.lengths), stream.lengths, strict=True)]
    samples = [(name, sample) for name, samples in packs.items() for sample in samples]
    for (name, sample), begin, prefix in zip(samples, begins, stream.prefix_length, strict=True):
        expected, found = adapters.architecture.first_position + prefix, int(stream.position_ids[begin])
        if found != expected:
            raise UserError(
                f"{sample.source}: in the first batch of job '{name}' this sequence's positions begin at {found} "
                f"instead of {expected}: they go on counting from its neighbour ({_backend(adapters)}). {_ADVICE}"
            )


def _last_losses(adapters: Adapters, packs: dict[str, list[Sample]]) -> dict[str, float]:
    """The mean loss of each job's last sequence, all in one pass."""
    losses = sequence_losses(adapters, [Work(name, samples) for name, samples in packs.items()])
    weights = [adapters.head(name).loss_weight(samples[-1]) for name, samples in packs.items()]
    return {n: float(loss[-1]) / weight for n, loss, weight in zip(packs, losses, weights, strict=True)}


def _changed(sample: Sample, vocabulary: int) -> Sample:
    """A sample of the same shape with another token everywhere."""
    ids = [(token + 1) % vocabulary for token in sample.input_ids]
    targets = tuple((token + 1) % vocabulary for token in sample.target_ids)
    return replace(sample, input_ids=ids, target_ids=targets)


def _refuse(adapters: Adapters, name: str, sample: Sample, packed: float, other: float, when: str) -> None:
    raise UserError(
        f"{sample.source}: sequences leak into each other. In the first batch of job '{name}' this one's loss is "
        f"{packed:.6g} among the others and {other:.6g} {when}. {_backend(adapters)} does not keep sequences "
        f"apart, or does not count positions from each sequence's start. {_ADVICE}"
    )


def _backend(adapters: Adapters) -> str:
    attention = getattr(adapters.model.config, "_attn_implementation", None)
    kind = type(adapters.model).__name__
    return f"The attention {attention!r} of {kind} {adapters.layout.words} ({adapters.dtype}, {adapters.device.type})"
