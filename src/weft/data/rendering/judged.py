"""Answers to one prompt, side by side in one sample: the prompt once, then each answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from weft.data.formats.examples import Conversation, Judged
from weft.data.rendering.sample import Sample, TooLongError
from weft.data.rendering.truncation import Limit
from weft.errors import UserError


def conversations(example: Judged) -> list[Conversation]:
    """The prompt with each answer, the best first; nothing of the prompt is learned."""
    prompt = [replace(turn, train=False) for turn in example.prompt]
    return [Conversation((*prompt, *answer), example.source, example.tools) for answer in example.each]


def beside(samples: Sequence[Sample], limit: Limit, *, head: int) -> Sample:
    """One sample of the rendered answers to one prompt, the first of which is the best; none has a limit yet.

    The prompt ends where the first learned token stands, or earlier where the answers' ids part. An answer ends with
    its last learned token, its end token: what a template writes behind that, no policy writes. Of longer records
    ``truncation: right`` cuts the ends of answers. ``left`` and ``middle`` cut the prompt, the same for all of them,
    after its first ``head`` tokens.

    Raises:
        UserError: Two answers are the same once they are rendered, or they have no prompt in common.
        TooLongError: A record is longer than ``max_length``, and is not cut to fit.
    """
    source = samples[0].source
    samples = [_ended(sample) for sample in samples]
    prompt = _common(samples)
    if not prompt:
        raise UserError(f"{source}: rendered, the answers have not one token of a prompt in common.")
    ends = [tuple(sample.input_ids[prompt:]) for sample in samples]
    if len(set(ends)) < len(ends):
        raise UserError(f"{source}: two answers are the same once the chat template has written them. Remove one.")
    if any(slot > prompt for sample in samples for slot in sample.slots):
        raise UserError(f"{source}: the chat template puts a slot for virtual tokens behind the prompt of the answers.")
    longest = max(samples, key=lambda sample: len(sample.input_ids))
    start, stop = limit.cut_ids(longest.input_ids, source, "the longest answer with its prompt", head=head)
    gap = stop - start
    ids, slots = list(samples[0].input_ids[:prompt]), [slot for slot in samples[0].slots if slot <= prompt]
    answers = [(list(sample.input_ids[prompt:]), list(sample.weights[prompt:])) for sample in samples]
    if gap and limit.truncation == "right":
        room = len(longest.input_ids) - gap - prompt
        answers = [(tokens[: max(room, 0)], weights[: max(room, 0)]) for tokens, weights in answers]
    elif gap:
        begin = head if limit.truncation == "left" else max(head, (prompt - gap) // 2)
        if begin + gap >= prompt:
            raise TooLongError(f"{source}: max_length {limit.max_length} leaves nothing of the prompt before an answer "
                               f"of {len(longest.input_ids) - prompt} tokens. Raise `max_length`.")  # fmt: skip
        del ids[begin : begin + gap]
        slots = [slot if slot <= begin else slot - gap for slot in slots if not begin < slot < begin + gap]
    if not all(any(weights) for _, weights in answers):
        raise TooLongError(f"{source}: cut to max_length {limit.max_length}, an answer keeps no token to learn: the "
                           "prompt alone is that long. Raise `max_length` or remove the record.")  # fmt: skip
    if len({tuple(tokens) for tokens, _ in answers}) < len(answers):
        raise TooLongError(f"{source}: cut to max_length {limit.max_length}, two answers are the same. Raise "
                           "`max_length` or remove the record.")  # fmt: skip
    weights, branches, places = [0.0] * len(ids), [], len(ids)
    for tokens, own in answers:
        branches.append(len(ids))
        ids += tokens
        weights += own
    return Sample(ids, weights, source, slots=tuple(slots), answer=places, cut=gap, branches=tuple(branches))


def _ended(sample: Sample) -> Sample:
    """The sample up to its last learned token."""
    end = max((place for place, weight in enumerate(sample.weights, start=1) if weight), default=0)
    return replace(sample, input_ids=sample.input_ids[:end], weights=sample.weights[:end]) if end else sample


def _common(samples: Sequence[Sample]) -> int:
    """How many of the first tokens all samples have in common, none of which is learned."""
    first = [next((place for place, weight in enumerate(s.weights) if weight), len(s.weights)) for s in samples]
    columns = zip(*(sample.input_ids for sample in samples), strict=False)
    alike = next((place for place, column in enumerate(columns) if len(set(column)) > 1), min(first))
    return min(alike, *first)


def mismatched(samples: Sequence[Sample], most: int | None = None) -> list[Sample]:
    """Each record's prompt with the first answer of the record before it, the first one's with the last's.

    ``most`` is the longest that one may be; a longer one loses the end of its answer.
    """
    found = []
    for sample, other in zip(samples, [*samples[-1:], *samples[:-1]], strict=True):
        prompt, answer = sample.branches[0], other.each[0]
        begin = other.branches[0]
        ids = [*sample.input_ids[:prompt], *answer.input_ids[begin:]][:most]
        weights = [*([0.0] * prompt), *answer.weights[begin:]][:most]
        if any(weights):
            found.append(
                Sample(ids, weights, sample.source, slots=sample.slots, answer=prompt, branches=(prompt,))
            )
    return found
