"""Records longer than ``max_length``: policies for them, windows over long texts, joined documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from weft.data.formats.examples import Conversation
from weft.data.rendering.sample import Draft, Sample, TooLongError
from weft.data.rendering.transcript import Script, learned_turns
from weft.errors import UserError, check_word

Truncation = Literal["refuse", "drop", "left", "right", "middle"]
Documents = Literal["separate", "windows", "joined"]


# No language has so many characters to a token on average.
_CHARACTERS = 1000


def in_todays_words(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of an earlier version under their names of today: ``truncate: true`` was ``truncation: right``.

    Raises:
        UserError: ``truncation`` stands beside it and says something else.
    """
    keys = dict(keys)
    if isinstance(keys.get("truncate"), bool):
        cut, given = keys.pop("truncate"), keys.get("truncation", "right")
        if given not in ("refuse", "right"):
            raise UserError(f"truncate is an older word for truncation, which is {given!r}. Drop `truncate`.")
        keys |= {"truncation": "right"} if cut else {}
    return keys


class Limit(BaseModel):
    """The keys for the length of a sample and for longer records, and what follows from them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_length: int | None = Field(
        None, gt=1, description="longest sequence in tokens; default: what the model can take"
    )
    truncation: Truncation = Field(
        "refuse", description="what becomes of longer records: refused, left out, or cut at an end ([data.md](data.md))"
    )
    documents: Documents = Field(
        "separate", description="plain text: a sample each, longer ones in windows, or all joined and cut into windows"
    )
    window_overlap: int = Field(
        1, ge=0, description="tokens that a window repeats from the one before, as context that is not learned again"
    )

    @model_validator(mode="before")
    @classmethod
    def _older_words(cls, values: object) -> object:
        return in_todays_words(values) if isinstance(values, Mapping) else values

    def check(self) -> None:
        """Refuse keys that do not go together, once the longest sequence of the model is known.

        Raises:
            UserError: The keys do not go together.
        """
        check_word("truncation", self.truncation, get_args(Truncation))
        check_word("documents", self.documents, get_args(Documents))
        limit = self.max_length
        if limit is not None and limit < 2:
            raise UserError(f"max_length is {limit}; expected 2 tokens or more (the first is never learned).")
        if self.documents != "separate" and limit is None:
            raise UserError(f"documents: {self.documents} cuts text into windows of `max_length` tokens; set that.")
        if self.window_overlap < 0 or (limit is not None and self.window_overlap > limit - 1):
            raise UserError(
                f"window_overlap is {self.window_overlap}; expected 0 or more, and less than max_length ({limit}), or "
                "a window would hold nothing new."
            )

    def exceeded(self, length: int) -> bool:
        """Whether a sample of ``length`` tokens is too long."""
        return self.max_length is not None and length > self.max_length

    def hopeless(self, script: Script) -> bool:
        """Whether a text is so long that it is refused without tokenising it, which would take minutes."""
        refuses = self.truncation in ("refuse", "drop") and (self.documents == "separate" or not script.plain)
        return refuses and self.max_length is not None and len(script.text) > _CHARACTERS * max(self.max_length, 1000)

    def check_text(self, script: Script, source: str) -> None:
        """Refuse a ``hopeless`` text.

        Raises:
            TooLongError: It is hopeless.
        """
        if self.hopeless(script):
            raise TooLongError(
                f"{source}: the record has {len(script.text)} characters, max_length is {self.max_length} tokens. Set "
                "`truncation`, raise `max_length`, or remove this one."
            )

    def cut_ids(self, ids: list[int], source: str, what: str, *, head: int = 0, tail: int = 0) -> tuple[int, int]:
        """The tokens [start, stop) to remove from ``ids`` so that they fit. The first ``head`` and the last ``tail``
        stay.

        Raises:
            TooLongError: The policy is to refuse or to drop, or no token is left to remove.
        """
        length, limit = len(ids), self.max_length
        if limit is None or length <= limit:
            return length, length
        if self.truncation in ("refuse", "drop"):
            raise TooLongError(
                f"{source}: {what} is {length} tokens long, max_length is {limit}. Raise `max_length`, set "
                "`truncation` (`right` cuts the end off, as `truncate: true` does; `left` the oldest turns and the "
                "beginning of the prompt; `drop` leaves such records out), or remove this one."
            )
        gap, stop = length - limit, length - tail
        if stop - gap < head:
            raise TooLongError(f"{source}: max_length {limit} leaves no room for {what}. Raise `max_length`.")
        start = {"left": head, "middle": max(head, (stop - gap) // 2), "right": stop - gap}[self.truncation]
        return start, start + gap


def fit(draft: Draft, limit: Limit, source: str, *, head: int) -> None:
    """Cut a draft to ``max_length`` as the policy says. The first ``head`` tokens stay, except under ``right``.

    ``left`` and ``middle`` remove tokens before the last learned answer. The answer stays whole, with its end and all
    that follows. Text without answers loses its beginning or its middle.

    Raises:
        TooLongError: That cannot be done, or the policy is to refuse or to drop.
    """
    size = limit.max_length
    if size is None or len(draft.ids) <= size:
        return
    if limit.truncation == "right" or not draft.answers:
        draft.remove(*limit.cut_ids(draft.ids, source, "the record", head=0 if limit.truncation == "right" else head))
        return
    answer = draft.answers[-1][0]
    kept = len(draft.ids) - answer
    room = size - kept  # for what comes before the answer
    if limit.truncation in ("left", "middle") and room <= head:
        raise TooLongError(
            f"{source}: the last answer, which `truncation: {limit.truncation}` keeps whole, takes {kept} tokens and "
            f"what opens the record {head}: nothing of its prompt would be left within max_length {size}. Raise "
            "`max_length`, take `truncation: right` (cuts the answer) or `drop`, or remove the record."
        )
    draft.remove(*limit.cut_ids(draft.ids, source, "the record", head=head, tail=kept))


def without_oldest_round(example: Conversation) -> Conversation | None:
    """The conversation without its first user turn and the answer to that; None if only one round leads to an answer.

    A system message at the beginning stays.
    """
    messages = example.messages
    first = 1 if messages and messages[0].role == "system" else 0
    last = max(learned_turns(messages), default=0)
    start = next((i for i in range(first + 1, last) if messages[i].role == "user"), None)
    return None if start is None else replace(example, messages=messages[:first] + messages[start:])


def windows(sample: Sample, limit: Limit) -> Iterator[Sample]:
    """A long text as several samples of at most ``max_length`` tokens.

    Each begins with the last ``window_overlap`` tokens of the one before, as context that is not learned again.
    """
    size = limit.max_length
    if size is None or len(sample.input_ids) <= size:
        yield sample
        return
    for start, stop, new in _windows(len(sample.input_ids), size, limit.window_overlap):
        weights = [0.0] * (new - start) + sample.weights[new:stop]
        weights[0] = 0.0
        if any(weights):
            yield replace(sample, input_ids=sample.input_ids[start:stop], weights=weights)


def joined(samples: Iterable[Sample], limit: Limit, *, bos: Sequence[int]) -> Iterator[Sample]:
    """Plain texts end to end, cut into windows of exactly ``max_length`` tokens. The last window may be shorter.

    Every text ends with its end-of-sequence token already. The first token of the next text is learned too, unless it
    is a BOS. Conversations (samples with an answer) pass through unchanged.
    """
    size, overlap = limit.max_length or 0, limit.window_overlap
    ids: list[int] = []
    weights: list[float] = []
    begins: list[tuple[int, str]] = []  # where in ``ids`` which document begins
    for sample in samples:
        if sample.answer is not None or sample.slots:
            yield sample
            continue
        opens = bool(bos) and sample.input_ids[: len(bos)] == list(bos)
        begins.append((len(ids), sample.source))
        weights += sample.weights if opens or not ids else [1.0, *sample.weights[1:]]
        ids += sample.input_ids
        at = 0
        while len(ids) - at > size:  # a window that is just full may be the last, which ends below
            yield _window(ids[at : at + size], weights[at : at + size], at, begins)
            at += size - overlap
            weights[at : at + overlap] = [0.0] * overlap
        if at:
            source = [name for place, name in begins if place <= at][-1]
            begins = [(0, source), *((place - at, name) for place, name in begins if place > at)]
            del ids[:at], weights[:at]
    if any(weights[1:]):
        yield _window(ids, weights, 0, begins)


def _window(ids: list[int], weights: list[float], at: int, begins: Sequence[tuple[int, str]]) -> Sample:
    source = [name for place, name in begins if place <= at][-1]
    return Sample(ids, [0.0, *weights[1:]], source)


def _windows(length: int, size: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, the first token that no earlier window holds)."""
    start = new = 0
    while new < length:
        stop = min(start + size, length)
        yield start, stop, new
        start, new = stop - overlap, stop
