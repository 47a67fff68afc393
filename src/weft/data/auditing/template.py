"""Checks of the template: training must see what serving gives, token by token.

They render again. So they look only at some records, evenly over the data. A template that differs, differs everywhere.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from weft.data.auditing.base import Facts, Hit, Item, Records, over, short
from weft.data.formats.examples import Conversation
from weft.data.rendering.render import Sample
from weft.data.rendering.served import ids_elsewhere
from weft.data.rendering.transcript import learned_turns
from weft.errors import UserError

_PROMPTS, _ANSWERS = 64, 256


@over(
    "eos-split",
    "error",
    "the tokenizer does not know its end-of-sequence token after a word, so a template that writes it teaches its "
    "letters: mark the token as special in tokenizer.json (`special: true`, `single_word: false`)",
    early="warn",
    once=True,
)
def eos_split(records: Records) -> Iterator[Hit]:
    """The tokenizer splits an end-of-sequence token that is glued to a word."""
    facts, eos = records.facts, records.facts.special("eos")
    if eos is None:
        return
    for before in ("a", "word", "。", ".", "\n"):
        text = before + facts.tokenizer.eos_token
        ids = list(facts.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not ids or ids[-1] != eos:
            pieces = facts.tokenizer.convert_ids_to_tokens(ids)
            yield Hit(None, f"{text!r} is tokenised without the token {eos}", " ".join(map(repr, pieces)))
            return


@over(
    "serve-differs",
    "error",
    "the template renders a question otherwise when an answer follows it: take one that extends its own prompt",
)
def serve_differs(records: Records) -> Iterator[Hit]:
    """What comes before a learned answer is not the prompt that generation starts from."""
    for item, sample, number in _answered(records, _PROMPTS):
        try:
            served = records.facts.renderer.prompt(
                item.messages[:number], tools=_tools(item), task="seq2seq" if sample.target_ids else "causal_lm"
            ).ids
        except UserError as error:
            yield Hit(item, f"the prompt cannot be rendered for generation: {error}")
            continue
        trained = sample.input_ids if sample.target_ids else sample.input_ids[: sample.answer]
        message = _difference(trained, served, records.facts, "generation gives")
        if message:
            yield Hit(item, *message)


@over(
    "template-differs",
    "error",
    "`chat_template` is not the tokenizer's own: serve the adapter with the same template (weft does), give it to the "
    "other server (vLLM: --chat-template), or train with the tokenizer's own",
)
def template_differs(records: Records) -> Iterator[Hit]:
    """The tokenizer's own chat template gives another prompt than the one that is configured."""
    if records.facts.own_template:
        yield from _served_elsewhere(records, records.facts.own_template, "the tokenizer's own template")


@over(
    "served-elsewhere",
    "warning",
    "weft serves as it trains, and `weft merge` saves a template that writes what is missing; for an adapter on "
    "another server, make the template write it (the beginning- or end-of-sequence token, most often)",
)
def served_elsewhere(records: Records) -> Iterator[Hit]:
    """Transformers' apply_chat_template gives other tokens than weft for the same template."""
    yield from _served_elsewhere(records, records.facts.renderer.chat_template, "transformers with this template")


@over(
    "answer-not-learned",
    "error",
    "the loss mask does not lie on the answer: look at the record with `weft preview --record`, and check the template",
)
def answer_not_learned(records: Records) -> Iterator[Hit]:
    """The learned tokens do not decode to the answer."""
    facts = records.facts
    for item, sample, _ in _answered(records, _ANSWERS):
        (ids, weights), first = sample.written, sample.answer or 0
        learned = [number for number, weight in zip(ids[first:], weights[first:], strict=True) if weight]
        unknown = facts.special("unk")
        if not learned or "<think" in item.answer or (unknown is not None and unknown in learned):
            continue  # templates remove thoughts
        text = facts.decode(learned)
        if _letters(item.answer) not in _letters(text):
            yield Hit(item, "the learned tokens are not the answer", f"{short(text)} ↔ {short(item.answer)}")


def _answered(records: Records, count: int) -> Iterator[tuple[Item, Sample, int]]:
    """Some records that were not cut, each with its sample and the place of its last learned turn."""
    for item in records.spread(count):
        sample, learned = item.samples[-1], learned_turns(item.messages)
        whole = len(item.samples) == 1 and item.length in (0, len(sample.input_ids))
        if not learned or not whole or (sample.answer is None and not sample.target_ids):
            continue
        pattern = records.facts.control_pattern
        if pattern is None or not pattern.search(item.text):
            yield item, sample, learned[-1]


def _tools(item: Item) -> Sequence[dict[str, object]]:
    return item.example.tools if isinstance(item.example, Conversation) else ()


def _served_elsewhere(records: Records, template: str | None, who: str) -> Iterator[Hit]:
    facts = records.facts
    for item, sample, number in _answered(records, _PROMPTS):
        if sample.target_ids or sample.answer is None:
            continue
        try:
            served = ids_elsewhere(
                facts.tokenizer,
                template,
                item.messages[:number],
                tools=_tools(item),
                variables=facts.renderer.settings.template_kwargs,
            )
        except Exception as error:  # a template is a program, and the run may not use this one
            yield Hit(item, f"{who} refuses this conversation: {error}")
            continue
        trained = sample.input_ids[: sample.answer]
        message = _difference(trained, served, facts, f"{who} gives")
        if message:
            yield Hit(item, *message)


def _difference(trained: list[int], served: list[int], facts: Facts, who: str) -> tuple[str, str] | None:
    """The first token in which two prompts differ, and both prompts from there on."""
    if trained == served:
        return None
    shorter = min(len(trained), len(served))
    place = next((i for i in range(shorter) if trained[i] != served[i]), shorter)
    one, other = (repr(facts.decode(ids[place : place + 12])) for ids in (trained, served))
    shown = facts.show(trained[max(0, place - 12) :])
    return f"from token {place} on training sees {one}, and {who} {other}", shown


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
