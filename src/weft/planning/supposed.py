"""Answers as they are supposed for a plan: how long a policy's will be, nobody knows before it has written them."""

from __future__ import annotations

from collections.abc import Sequence

from weft.data import Sample
from weft.objectives.ppo import Value
from weft.objectives.rollouts import RolloutObjective
from weft.training.batches import rows_of
from weft.training.job import Job
from weft.training.rolled import Rolled
from weft.training.rollouts import packed


def supposed_passes(job: Job, jobs: Sequence[Job]) -> list[list[Sample]]:
    """The passes of a job's coming step, in which every answer is as long as it may be."""
    judged = job.judged
    own = next(one.judged for one in jobs if one.name == judged.of) if isinstance(judged, Value) else judged
    assert isinstance(own, RolloutObjective)
    size, count = own.max_completion_length, own.num_generations
    rolled = []
    for prompt in (sample for micro in job.prompts() for sample in micro):
        begin = len(prompt.input_ids)
        told = (0.0,) * (size * count)
        rolled.append(
            Rolled(
                [*prompt.input_ids, *[0] * (size * count)],
                [0.0] * begin + [1.0] * (size * count),
                prompt.source,
                branches=tuple(begin + number * size for number in range(count)),
                advantages=told,
                values=told,
                returns=told,
            )
        )
    sizes = [rows_of(one, job.adapter.num_virtual_tokens, apart=False) for one in rolled]
    return [list(one) for one in packed(rolled, sizes, job.config.pack_tokens)]
