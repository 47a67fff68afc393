"""From samples to what a pass of the model needs: the parts of the stream, and which of its rows are learned from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weft.core.stream import Stream
from weft.data.rendering.render import Sample
from weft.objectives.likelihood import Supervised


def supervise(stream: Stream, samples: Sequence[Sample], sequences: Sequence[int] | None = None) -> Supervised:
    """The learned tokens of ``samples``, which are the stream's ``sequences`` (all of them, if left out).

    The token at place t of a sequence is predicted by the row before it; the first has no row before it of its own, so
    a renderer gives it weight 0.
    """
    rows: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    owner: list[int] = []
    numbers = range(len(samples)) if sequences is None else sequences
    for index, (sample, number) in enumerate(zip(samples, numbers, strict=True)):
        places = stream.rows[number]
        if sample.target_ids:
            # A decoder's rows: one per target, which it predicts.
            rows.extend(places)
            targets.extend(sample.target_ids)
            weights.extend([1.0] * len(sample.target_ids))
            owner.extend([index] * len(sample.target_ids))
            continue
        for place, weight in enumerate(sample.weights):
            if weight and place:
                # The row before it may be a virtual token's: generation goes on from there too.
                rows.append(places[place] - 1)
                targets.append(sample.input_ids[place])
                weights.append(weight)
                owner.append(index)
    device = stream.input_ids.device
    return Supervised(
        torch.tensor(rows, device=device, dtype=torch.int64),
        torch.tensor(targets, device=device, dtype=torch.int64),
        torch.tensor(weights, device=device, dtype=torch.float64),
        torch.tensor(owner, device=device, dtype=torch.int64),
        len(samples),
    )
