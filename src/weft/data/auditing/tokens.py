"""Checks of the rendered tokens: is anything learned, is the end learned, are special tokens in their places."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from weft.data.auditing.base import SHORT, Hit, Records, over, short
from weft.data.views import Array

_UNKNOWN_SHARE, _UNKNOWN_COUNT = 0.05, 3
_SEVERAL = 20  # texts


@over(
    "nothing-to-learn",
    "error",
    "give the record an answer after a question, or remove it; a `train`/`loss`/`weight` of false on every answer and "
    "a max_length that the prompt fills are the usual causes",
    early="refuse",
)
def nothing_to_learn(records: Records) -> Iterator[Hit]:
    """A record of which no token is learned."""
    if records.facts.prompts:
        return
    tokens = records.tokens
    for sample in np.flatnonzero((tokens.count(tokens.learned) == 0) & tokens.writes).tolist():
        shown = records.facts.show(tokens.of(sample))
        yield Hit(records.owner(sample), "no token of this record is learned", shown)
    yield from _problems(records, "nothing-to-learn")


@over(
    "eos-never-learned",
    "error",
    "the model would never stop: set `eos_token` in tokenizer_config.json to the token that ends an answer in the chat "
    "template, and raise max_length if every answer is cut",
    early="refuse",
    once=True,
)
def eos_never_learned(records: Records) -> Iterator[Hit]:
    """The end-of-sequence token is learned in no record."""
    eos, ends = records.facts.special("eos"), records.ends
    if ends.learned or not any(records.shared(_ends).values()):
        return
    name = "the tokenizer has none" if eos is None else f"{records.facts.tokenizer.eos_token!r}, id {eos}"
    message = f"the end-of-sequence token ({name}) is learned in none of {ends.samples} samples"
    yield Hit(None, message, ends.first or "")


@over(
    "pad-masks-eos",
    "error",
    "labels were masked wherever the pad token stands, and pad is the end-of-sequence token: mask by position, or set "
    "`pad_token` in tokenizer_config.json to a token of its own",
    early="refuse",
)
def pad_masks_eos(records: Records) -> Iterator[Hit]:
    """The end-of-sequence token is there, but it is also the pad token and has no weight."""
    facts = records.facts
    if facts.special("eos") is None or facts.special("pad") != facts.special("eos"):
        return
    for sample, place in records.shared(_ends)["masked"]:
        shown = facts.show(records.tokens.around(place))
        message = "the answer's end-of-sequence token has weight 0, and is the pad token as well"
        yield Hit(records.owner(sample), message, shown)


@over(
    "eos-not-learned",
    "error",
    "the end-of-sequence token must follow each learned answer with a weight above 0: look at the record with "
    "`weft preview --record`, and check the weights and the chat template",
    early="refuse",
)
def eos_not_learned(records: Records) -> Iterator[Hit]:
    """A learned answer does not end with a learned end-of-sequence token."""
    facts, shared = records.facts, records.facts.special("pad") == records.facts.special("eos")
    if not records.ends.learned:
        return  # eos-never-learned says so once
    found = [(place, sample, "is missing") for sample, place in records.shared(_ends)["missing"]]
    if not shared:
        found += [(place, sample, "follows with weight 0") for sample, place in records.shared(_ends)["masked"]]
    for place, sample, what in sorted(found):
        shown = facts.show(records.tokens.around(place))
        yield Hit(records.owner(sample), f"after this learned text the end-of-sequence token {what}", shown)


@over(
    "answer-cut",
    "error",
    "raise `max_length`, remove or split long records, or choose a way of cutting that keeps the answer's end; where "
    "answers are cut, the model learns to stop in mid-sentence or never",
    early="warn",
)
def answer_cut(records: Records) -> Iterator[Hit]:
    """max_length cut an answer off, and with it the end-of-sequence token."""
    facts = records.facts
    for sample, place in records.shared(_ends)["cut"]:
        item = records.owner(sample)
        lost = f" ({item.length:,} tokens in all)" if item.length > (facts.max_length or 0) else ""
        shown = short("…" + facts.decode(records.tokens.around(place)))
        yield Hit(item, f"the answer is cut off at max_length {facts.max_length}{lost}: its end is not learned", shown)


@over(
    "double-bos",
    "error",
    "the chat template writes the beginning-of-sequence token and the tokenizer adds another: remove `bos_token` from "
    "the template, or the tokenizer's own; and take it out of the data if it stands there",
    early="refuse",
)
def double_bos(records: Records) -> Iterator[Hit]:
    """A sequence begins with two beginning-of-sequence tokens."""
    tokens, facts, bos = records.tokens, records.facts, records.facts.special("bos")
    if bos is None or not len(tokens.ids):
        return
    first = tokens.starts[:-1][tokens.lengths > 1]
    for place in first[(tokens.ids[first] == bos) & (tokens.ids[first + 1] == bos)].tolist():
        item = records.owner(int(tokens.owner(np.array([place]))[0]))
        yield Hit(item, "two beginning-of-sequence tokens in a row", facts.show(tokens.around(place, 0, 12)))


@over(
    "double-eos",
    "error",
    "the template closes the answer and something adds the end-of-sequence token once more: remove one of them",
    early="warn",
)
def double_eos(records: Records) -> Iterator[Hit]:
    """An answer learns to end twice."""
    tokens, facts, eos = records.tokens, records.facts, records.facts.special("eos")
    if eos is None or eos == facts.special("bos"):
        return
    ends = tokens.learned & (tokens.ids == eos)
    for place in np.flatnonzero(ends[1:] & ends[:-1]).tolist():
        owner = tokens.owner(np.array([place, place + 1]))
        if owner[0] == owner[1]:
            shown = facts.show(tokens.around(place))
            yield Hit(records.owner(int(owner[0])), "two learned end-of-sequence tokens in a row", shown)


@over(
    "pad-learned",
    "error",
    "pad tokens carry no meaning and must have weight 0: data should not be padded before it is packed",
    early="refuse",
)
def pad_learned(records: Records) -> Iterator[Hit]:
    """Pad tokens are learned."""
    tokens, facts, pad = records.tokens, records.facts, records.facts.special("pad")
    if pad is None or pad in (facts.special("eos"), facts.special("bos"), facts.special("unk")):
        return
    for sample in np.flatnonzero(tokens.count(tokens.learned & (tokens.ids == pad))).tolist():
        yield Hit(records.owner(sample), "pad tokens are learned", facts.show(tokens.of(sample)))


@over(
    "prompt-learned",
    "error",
    "with `train_on: answers` only answers have weight: check the weights, or say `train_on: all` if it is meant",
    early="refuse",
)
def prompt_learned(records: Records) -> Iterator[Hit]:
    """The question is learned as well, though only answers are to be."""
    tokens, facts = records.tokens, records.facts
    if facts.renderer.settings.train_on == "all" or facts.task == "seq2seq":
        return
    # Samples that learn a second token before their answer: few, if any.
    second = np.flatnonzero((tokens.begins > 1) & (tokens.lengths > 1))
    for number in second[tokens.learned[tokens.starts[second] + 1]].tolist():
        begin, length = int(tokens.starts[number]), int(tokens.begins[number])
        if tokens.learned[begin + 1 : begin + length].all():
            shown = facts.show(tokens.of(number)[:length])
            yield Hit(records.owner(number), "the prompt is learned, from its second token on", shown)


@over(
    "unknown-tokens",
    "error",
    "the tokenizer has no tokens for this text, so the model would neither see nor write it: take a base whose "
    "tokenizer knows the language, or clean the text",
    early="warn",
)
def unknown_tokens(records: Records) -> Iterator[Hit]:
    """A flood of unknown tokens."""
    tokens, facts, unk = records.tokens, records.facts, records.facts.special("unk")
    if unk is None or unk in (facts.special("eos"), facts.special("bos")):
        return
    counts = tokens.count(tokens.ids == unk)
    flooded = (counts >= _UNKNOWN_COUNT) & (counts > _UNKNOWN_SHARE * tokens.lengths)
    for sample in np.flatnonzero(flooded).tolist():
        message = f"{counts[sample]} of {tokens.lengths[sample]} tokens are unknown to the tokenizer"
        yield Hit(records.owner(sample), message, facts.show(tokens.of(sample)))


@over(
    "short-texts",
    "warning",
    "every text begins and ends by itself, so lines were probably meant as one text: set `text_unit: file` or "
    "`paragraph`, or put the lines of a text into one record",
    early="warn",
    once=True,
)
def short_texts(records: Records) -> Iterator[Hit]:
    """Plain texts that are much shorter than usual: more than half have fewer than 20 tokens."""
    texts = records.texts
    if texts.count > _SEVERAL and 2 * texts.short > texts.count:
        yield Hit(None, f"{texts.short:,} of {texts.count:,} texts have fewer than {SHORT} tokens")


def _problem_check(code: str, mend: str, about: str) -> None:
    """Register a check for records that training would refuse."""

    def check(records: Records) -> Iterator[Hit]:
        yield from _problems(records, code)

    check.__doc__ = about
    over(code, "error", mend)(check)


_problem_check(
    "empty-answer", "give the record an answer, remove it, or set `empty_answers: skip`", "An answer is empty."
)
_problem_check(
    "too-long", "raise `max_length`, have long records cut, or remove them", "A record is longer than max_length."
)
_problem_check("not-read", "mend the record as the message says, or remove it", "A record fits no format.")
_problem_check("no-row", "take the model's own tokenizer, or leave the token out", "The model has no row for a token.")
_problem_check("not-rendered", "mend the record or the chat template, as the message says", "A record is not rendered.")


def _problems(records: Records, code: str) -> Iterator[Hit]:
    for item in records.items:
        if item.problem is not None and item.problem[0] == code:
            yield Hit(item, item.problem[1], item.shown or short(item.text))


# ---------------------------------------------------------------------------------------------------- ends of answers


def _ends(records: Records) -> dict[str, list[tuple[int, int]]]:
    """Learned stretches with a wrong end: ``cut`` by max_length, EOS ``masked``, or EOS ``missing``.

    Each is a sample and the place of the last token of the stretch.
    """
    tokens, facts, eos = records.tokens, records.facts, records.facts.special("eos")
    found: dict[str, list[tuple[int, int]]] = {"cut": [], "masked": [], "missing": []}
    ends, owners = _ends_to_look_at(records)
    last = ends + 1 == tokens.starts[owners + 1]
    full = tokens.lengths[owners] == facts.max_length if facts.max_length else np.zeros(len(ends), bool)
    following = tokens.ids[np.minimum(ends + 1, max(len(tokens.ids) - 1, 0))]
    for end, sample, at_end, at_limit, next_id in zip(
        ends.tolist(), owners.tolist(), last.tolist(), full.tolist(), following.tolist(), strict=True
    ):
        if at_limit and not tokens.answers[sample]:
            continue  # this text goes on in another window, or was cut: it has no answer that must end
        kind = "cut" if at_end and at_limit else "masked" if not at_end and next_id == eos else "missing"
        found[kind].append((sample, end))
    return found


def _ends_to_look_at(records: Records) -> tuple[Array, Array]:
    """The last tokens of learned stretches, where they are no EOS, and their samples."""
    tokens, eos = records.tokens, records.facts.special("eos")
    ends, owners = tokens.stretches()
    wrong = tokens.ids[ends] != (-1 if eos is None else eos)
    if records.facts.renderer.settings.train_on == "all":
        # The text after an answer is learned too, so the end may be inside a stretch. So only the last answer of each
        # sample counts, with all that follows it.
        final = np.append(owners[1:] != owners[:-1], True)[: len(owners)]
        learned_eos = tokens.learned & (tokens.ids == (-1 if eos is None else eos))
        starts = tokens.starts[:-1] + tokens.begins
        sums = np.concatenate([[0], np.cumsum(learned_eos)])
        wrong &= final & (sums[tokens.starts[1:]] - sums[starts] == 0)[owners]
    return ends[wrong], owners[wrong]
