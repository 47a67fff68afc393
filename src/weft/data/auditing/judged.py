"""Checks of judged answers: verdicts that contradict each other, that length explains, or that stand in the text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from weft.data.auditing.base import Hit, Item, Records, over, short
from weft.data.auditing.duplicates import normalise
from weft.data.formats.examples import LabelledAnswer, Message, Preference, Ranking

_ENOUGH = 20  # records; of fewer a share says nothing
_BIASED = 0.75
_TOLD, _UNTOLD = 0.3, 0.02
_LOPSIDED = 4.0
_WORD = re.compile(r"\w+|[^\w\s]")


@over("contrary-verdicts", "error", "decide for one verdict: what is learned from the one is unlearned from the other")
def contrary_verdicts(records: Records) -> Iterator[Hit]:
    """An answer is better in one record and worse in another, to the same prompt: swapped columns, perhaps."""
    good: dict[tuple[str, str, str], Item] = {}
    bad: dict[tuple[str, str, str], Item] = {}
    for item in records.items:
        prompt = normalise(item.prompt)
        for answer, verdict in _verdicts(item):
            key = item.split, prompt, normalise(answer)
            other = (bad if verdict else good).get(key)
            (good if verdict else bad).setdefault(key, item)
            if other is not None and other is not item:
                yield Hit(item, f"this answer is judged otherwise in {other.source}", short(answer))
                break


@over(
    "length-bias",
    "warning",
    "a model can learn to write longer or shorter and nothing else: balance the data, or take loss_type: sigmoid_norm "
    "or simpo, and compare the accuracy with length_baseline",
)
def length_bias(records: Records) -> Iterator[Hit]:
    """In most pairs the better answer is the longer one, or the shorter one."""
    pairs = [pair for item in records.of("train") for pair in _pairs(item)]
    if len(pairs) < _ENOUGH:
        return
    longer = sum((len(good) > len(bad)) + (len(good) == len(bad)) / 2 for good, bad in pairs) / len(pairs)
    if not 1 - _BIASED <= longer <= _BIASED:
        what, share = ("longer", longer) if longer > 0.5 else ("shorter", 1 - longer)
        yield Hit(None, f"in {100 * share:.0f} % of {len(pairs):,} pairs the better answer is the {what} one")


@over("verdict-in-text", "warning", "remove the word from the answers: it is what would be learned")
def verdict_in_text(records: Records) -> Iterator[Hit]:
    """A word at the beginning or the end of answers tells the verdict."""
    sides: dict[bool, list[str]] = {True: [], False: []}
    for item in records.of("train"):
        for answer, verdict in _verdicts(item):
            sides[verdict].append(answer)
    if min(map(len, sides.values())) < _ENOUGH:
        return
    for place, at in (("first", 0), ("last", -1)):
        counts = {
            verdict: Counter(words[at].lower() for text in texts if (words := _WORD.findall(text)))
            for verdict, texts in sides.items()
        }
        for verdict in (True, False):
            own, other = len(sides[verdict]), len(sides[not verdict])
            word, count = counts[verdict].most_common(1)[0] if counts[verdict] else ("", 0)
            if count > _TOLD * own and counts[not verdict][word] < _UNTOLD * other:
                told, beside = "better" if verdict else "worse", 100 * counts[not verdict][word] / other
                share = f"{100 * count / own:.0f} % of the {told} answers and of {beside:.0f} % of the others"
                yield Hit(None, f"{word!r} is the {place} word of {share}")


@over("lopsided-verdicts", "warning", "set desirable_weight and undesirable_weight so that both sides count alike")
def lopsided_verdicts(records: Records) -> Iterator[Hit]:
    """Many more good answers than bad ones, or many more bad ones."""
    found = Counter(item.example.label for item in records.of("train") if isinstance(item.example, LabelledAnswer))
    good, bad = found[True], found[False]
    if good + bad >= _ENOUGH and max(good, bad) > _LOPSIDED * min(good, bad):
        yield Hit(None, f"{good:,} good answers and {bad:,} bad ones")


def _verdicts(item: Item) -> list[tuple[str, bool]]:
    """The answers of a record, and whether each is judged good. Of a ranking the best and the worst."""
    match item.example:
        case Preference() | Ranking():
            first, *_, last = item.example.each
            return [(_text(first), True), (_text(last), False)]
        case LabelledAnswer():
            return [(_text(item.example.completion), item.example.label)]
    return []


def _pairs(item: Item) -> list[tuple[str, str]]:
    """The pairs of a record's answers, the better one first."""
    if not isinstance(item.example, (Preference, Ranking)):
        return []
    texts = list(map(_text, item.example.each))
    return [(good, bad) for place, good in enumerate(texts) for bad in texts[place + 1 :] if good != bad]


def _text(turns: tuple[Message, ...]) -> str:
    return "\n".join(turn.content for turn in turns)
