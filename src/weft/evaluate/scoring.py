"""How likely texts are: continuations after a context, and whole texts, under several adapters in the same passes.

Continuations that share a context, as the choices of a question do, read it once. The conventions, by which tokens a
text is cut and what is predicted once, are those of lm_eval (``weft.evaluate.encoding`` has those of the tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from weft.base.embeddings import input_embeddings
from weft.core.adapters import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.evaluate.questions import Continuation, Question, planned, questions_of
from weft.generation.checks import check_writes
from weft.layouts.building import check_ids
from weft.machine import freed_memory_kept
from weft.objectives.passes import EVALUATION_TOKENS
from weft.ops.loss import LOGIT_BYTES


@dataclass(frozen=True)
class Scored:
    """``logprob``: log p of a continuation, the sum over its tokens; ``greedy``: whether none was likelier than any
    of them."""

    logprob: float
    greedy: bool


@torch.no_grad()
def score(
    adapters: Adapters,
    asked: Mapping[str | None, Sequence[Continuation]],
    *,
    max_tokens: int = EVALUATION_TOKENS,
) -> dict[str | None, list[Scored]]:
    """The log-probability of each continuation after its context, of all adapters (None: the base) together.

    Log-probabilities are those of the whole vocabulary, in fp32 (fp64 for an fp64 base). Where the base's layout can
    share rows, continuations of an adapter with the same context read it once, and contexts that begin alike, as with
    the same examples before each question, read that beginning once a pass; else each reads all of its own. Different
    adapters share no rows, for their hidden states differ.

    Args:
        max_tokens: Rows of a pass, at most; a single context with its continuations may take more.

    Raises:
        UserError: An adapter writes no text, a context or a continuation is empty, or both together are longer than the
            base's positions: ``fit`` cuts them.
    """
    questions: list[Question] = []
    for name, continuations in asked.items():
        check_writes(adapters, name)
        _check(adapters, name, continuations)
        questions += questions_of(adapters, name, continuations, max_tokens)
    found: dict[str | None, list[Scored]] = {name: [Scored(0.0, True)] * len(own) for name, own in asked.items()}
    with freed_memory_kept(adapters.device.type):
        for batch in planned(questions, max_tokens, shares=adapters.layout.shares_rows):
            for (name, index), scored in _score_pass(adapters, batch):
                found[name][index] = scored
    return found


def room(adapters: Adapters, name: str | None) -> int | None:
    """How many tokens adapter ``name`` can read at once, beside its own learned ones; None: any number."""
    limit = adapters.architecture.max_length
    return None if limit is None else limit - (0 if name is None else adapters[name].num_learned_tokens)


def fit(adapters: Adapters, name: str | None, continuation: Continuation) -> Continuation:
    """The continuation with as much of its context's end as the base has positions for, as lm_eval cuts it.

    The last token is predicted and not read. Slots of what is cut off move to the beginning.

    Raises:
        UserError: The continuation alone is too long.
    """
    limit, context = room(adapters, name), continuation.context
    if limit is None:
        return continuation
    keep = limit if adapters.layout.writes_apart else limit + 1 - len(continuation.ids)
    if keep < 1 or len(continuation.ids) > limit:
        raise UserError(
            f"a continuation of {len(continuation.ids)} tokens leaves no room for its context: "
            f"{_who(name)} reads {limit} at once. Shorten it."
        )
    gone = max(0, len(context) - keep)
    slots = tuple(max(0, slot - gone) for slot in continuation.slots)
    return replace(continuation, context=context[gone:], slots=slots) if gone else continuation


def windows(ids: Sequence[int], prefix: int, length: int | None) -> list[Continuation]:
    """A text as continuations in which each token is predicted once, as lm_eval's rolling windows.

    The model reads ``length`` tokens at most (None: any number). The first window begins with the token ``prefix``. The
    next ones take as many new tokens as they can behind one that was read; the last one reads as much as fits.
    """
    length = length or max(len(ids), 1)
    found = []
    for begin in range(0, len(ids), length):
        end = min(begin + length, len(ids))
        context = ids[end - length - 1 : begin] if begin else [prefix]
        found.append(Continuation(context, ids[begin:end]))
    return found


def score_texts(
    adapters: Adapters,
    asked: Mapping[str | None, Sequence[Sequence[int]]],
    prefix: int,
    *,
    max_length: int | None = None,
    max_tokens: int = EVALUATION_TOKENS,
) -> dict[str | None, list[float]]:
    """The log-probability of each whole text, whose first token follows the token ``prefix``.

    Texts are cut into ``windows`` of ``max_length`` tokens, or of what each adapter can read (``room``) if that is
    less: one with virtual tokens has windows that are so much shorter. A text without tokens has log-probability 0.

    Raises:
        UserError: An adapter writes no text, or ``max_length`` is less than 1.
    """
    if max_length is not None and max_length < 1:
        raise UserError(f"max_length is {max_length}; a window reads one token at least.")
    pieces: dict[str | None, list[Continuation]] = {}
    counts: dict[str | None, list[int]] = {}
    for name, texts in asked.items():
        limits = [limit for limit in (room(adapters, name), max_length) if limit is not None]
        cut = [windows(ids, prefix, min(limits, default=None)) for ids in texts]
        pieces[name], counts[name] = [one for own in cut for one in own], [len(own) for own in cut]
    scored = score(adapters, pieces, max_tokens=max_tokens)
    totals: dict[str | None, list[float]] = {}
    for name, sizes in counts.items():
        values = iter(scored[name])
        totals[name] = [sum(next(values).logprob for _ in range(size)) for size in sizes]
    return totals


def _check(adapters: Adapters, name: str | None, continuations: Sequence[Continuation]) -> None:
    limit, layout, vocabulary = room(adapters, name), adapters.layout, len(input_embeddings(adapters.model).weight)
    for index, one in enumerate(continuations):
        for what, ids in (("context", one.context), ("continuation", one.ids)):
            if not len(ids):
                raise UserError(
                    f"continuation {index} of {_who(name)}: the {what} is empty; a token is predicted after another. "
                    "An empty context wants the token that begins texts."
                )
        check_ids(one.ids, vocabulary, f"continuation {index} of {_who(name)}")  # the last one is not read
        longest = max(map(len, layout.written(one.context, one.ids)))
        if limit is not None and longest > limit:
            raise UserError(
                f"continuation {index} of {_who(name)}: {longest} tokens are to be read, and it reads {limit} at once. "
                "weft.evaluate.scoring.fit cuts the context from the left."
            )


def _who(name: str | None) -> str:
    return "the base" if name is None else f"adapter '{name}'"


def _score_pass(adapters: Adapters, batch: Sequence[Question]) -> Iterator[tuple[tuple[str | None, int], Scored]]:
    """The scores of some questions, in one pass of the base."""
    layout, names = adapters.layout, list(dict.fromkeys(one.adapter for one in batch))
    ordered = sorted(batch, key=lambda one: names.index(one.adapter))
    stream, hidden = adapters.run(
        [_part(adapters, name, list(own)) for name, own in groupby(ordered, key=lambda one: one.adapter)]
    )
    rows: dict[tuple[str | None, int], int] = {}  # of an adapter a row of the batch -> its number among those asked
    at: list[int] = []
    targets: list[int] = []
    places: list[tuple[tuple[str | None, int], int]] = []
    number = 0
    for one in ordered:
        for index, ids, own in one.wanted:
            before = layout.before(stream, number + own, len(one.context), len(ids))
            at += [rows.setdefault((one.adapter, row), len(rows)) for row in before]
            targets += ids
            places.append(((one.adapter, index), len(ids)))
        number += len(one.sequences)
    logps, likeliest = _token_scores(adapters, hidden, list(rows), at, targets)
    begin = 0
    for place, count in places:
        own_logps, best = logps[begin : begin + count], likeliest[begin : begin + count]
        yield place, Scored(sum(own_logps), all(best))
        begin += count


def _part(adapters: Adapters, name: str | None, questions: Sequence[Question]) -> Part:
    written = [adapters.layout.written(one.context, ids) for one in questions for ids in one.sequences]
    return Part(
        name,
        [sequence for sequence, _ in written],
        answers=[len(one.context) for one in questions for _ in one.sequences],
        slots=[one.slots for one in questions for _ in one.sequences],
        targets=[target for _, target in written],
        shared=[count for one in questions for count in one.shared],
    )


def _token_scores(
    adapters: Adapters,
    hidden: Tensor,
    rows: Sequence[tuple[str | None, int]],
    at: Sequence[int],
    targets: Sequence[int],
) -> tuple[list[float], list[bool]]:
    """log p of each target after the row with number ``at``, and whether it is the likeliest token there.

    ``rows``: (adapter, row of the hidden states [N, d]), those of an adapter side by side. Logits are held of a chunk
    of them at a time.
    """
    device = hidden.device
    order, wanted = torch.tensor(at, device=device), torch.tensor(targets, device=device)
    logps = torch.zeros(len(at), dtype=torch.float64, device=device)
    likeliest = torch.zeros(len(at), dtype=torch.bool, device=device)
    chunk = max(32, LOGIT_BYTES // (4 * len(input_embeddings(adapters.model).weight)))
    begin, kept = 0, torch.empty(0, device=device)
    while begin < len(rows):
        own = rows[begin : begin + chunk]
        if adapters.exact:  # the same shapes as if no other adapter were there
            own = [row for row in own if row[0] == own[0][0]]
        counts = [(name, len(list(some))) for name, some in groupby(own, key=lambda row: row[0])]
        states = hidden.index_select(0, torch.tensor([row for _, row in own], device=device))
        logits = adapters.logits(states, counts)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Memory that is written again and again is fast; new memory has to be made ready by the system first.
        kept = kept if kept.dtype == logits.dtype and len(kept) >= len(own) else torch.empty_like(logits)
        logp = torch.log_softmax(logits, -1, out=kept[: len(own)])
        mine = ((order >= begin) & (order < begin + len(own))).nonzero()[:, 0]
        of = order[mine] - begin
        told = logp[of, wanted[mine]]
        logps[mine], likeliest[mine] = told.double(), told == logp.amax(-1)[of]
        begin += len(own)
    return logps.tolist(), likeliest.tolist()
