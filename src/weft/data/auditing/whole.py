"""Checks of all records together: copies, contradictions, leaks between training and evaluation, lopsided data."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from weft.data.auditing.base import Hit, Item, Records, over, short
from weft.data.auditing.duplicates import Pair, near, normalise

_COMMON_SHARE, _COMMON_COUNT = 0.05, 10
_ONE_ANSWER = 0.6
_RARE_CLASS, _MAJORITY = 0.01, 0.95
_FEW, _ENOUGH = 10, 100


@over("duplicate", "error", "keep one of them: copies are learned more than once and count as much in the evaluation")
def duplicate(records: Records) -> Iterator[Hit]:
    """The same record again, but for case and white space."""
    first: dict[tuple[str, str, str | None], Item] = {}
    for item, key in zip(records.items, records.shared(_texts), strict=True):
        if not key:
            continue
        original = first.setdefault((item.part, key, item.label), item)
        if original is not item:
            yield Hit(item, f"the same record as {original.source}", short(item.text))


@over("near-duplicate", "error", "keep one of them; if the difference is what matters, nothing needs mending")
def near_duplicate(records: Records) -> Iterator[Hit]:
    """A record that nearly is another one (Jaccard similarity of 0.8 or more)."""
    told: set[int] = set()
    for pair, one, other in records.shared(_near):
        if one.part == other.part and pair.second not in told:
            told.add(pair.second)
            what = f"nearly the same as {one.source} (similarity {pair.similarity:.2f})"
            yield Hit(other, what, f"{short(other.text)} ↔ {short(one.text)}")


@over("leak", "error", "remove it from the training data: an evaluation on what was learned says nothing")
def leak(records: Records) -> Iterator[Hit]:
    """A record of the evaluation stands in the training data, whole, by its prompt, or nearly."""
    evaluation = records.of("eval")
    if not evaluation:
        return
    keys = dict(zip(map(id, records.items), records.shared(_texts), strict=True))
    whole = {keys[id(item)]: item for item in reversed(evaluation)}
    prompts = {normalise(item.prompt): item for item in reversed(evaluation) if item.prompt.strip()}
    nearly: dict[str, tuple[Item, float]] = {}
    for pair, one, other in records.shared(_near):
        if one.split != other.split:
            train, held = (one, other) if one.split == "train" else (other, one)
            nearly.setdefault(keys[id(train)], (held, pair.similarity))
    # All of them are named, copies too: what is left out of the training data then leaves no leak.
    for item in records.of("train"):
        key = keys[id(item)]
        if not key:
            continue
        for found, what in ((whole.get(key), "the record"), (prompts.get(normalise(item.prompt)), "the prompt")):
            if found is not None:
                yield Hit(item, f"{what} is evaluated on too, {found.source}", short(item.text))
                break
        else:
            if key in nearly:
                held, similarity = nearly[key]
                what = f"nearly is a record to evaluate on, {held.source} (similarity {similarity:.2f})"
                yield Hit(item, what, f"{short(item.text)} ↔ {short(held.text)}")


@over("torn-text", "warning", "hold out whole texts: `eval_split`, or `eval_data` of their own")
def torn_text(records: Records) -> Iterator[Hit]:
    """Some windows of a text are evaluated on, others are trained on."""
    for item in records.of("eval"):
        if item.torn:
            yield Hit(item, f"windows of it to evaluate on: {len(item.samples)}; the others are trained on")


@over("contradiction", "warning", "decide for one answer, unless several are right")
def contradiction(records: Records) -> Iterator[Hit]:
    """The same prompt with different answers, or the same text with different labels."""
    first: dict[tuple[str, str], Item] = {}
    for item, key in zip(records.items, records.shared(_texts), strict=True):
        prompt = key if item.label is not None else normalise(item.prompt)
        if not prompt:
            continue
        other = first.setdefault((item.split, prompt), item)
        said = (item.label, other.label) if item.label is not None else (item.answer, other.answer)
        if other is item or said[0] is None or said[1] is None or normalise(said[0]) == normalise(said[1]):
            continue
        message = f"the same {'text' if item.label is not None else 'prompt'} as {other.source} is answered differently"
        yield Hit(item, message, f"{short(said[0])} ↔ {short(said[1])}")


@over("common-prompt", "warning", "thin these records out: one prompt drowns the rest")
def common_prompt(records: Records) -> Iterator[Hit]:
    """One prompt stands in too large a share of the training data."""
    yield from _common([item.prompt for item in records.of("train")], "prompt", most=5, share=_COMMON_SHARE)


@over("common-answer", "warning", "the model can learn to say this always: add records with other answers")
def common_answer(records: Records) -> Iterator[Hit]:
    """One answer stands in most of the training data."""
    yield from _common([item.answer for item in records.of("train")], "answer", most=1, share=_ONE_ANSWER)


def _common(texts: Sequence[str], what: str, *, most: int, share: float) -> Iterator[Hit]:
    """The ``most`` frequent texts that make up more than a ``share`` of all that are not blank."""
    keys = [normalise(text) for text in texts if text.strip()]
    for key, count in Counter(keys).most_common(most):
        if count > _COMMON_COUNT and count > share * len(keys):
            message = f"{count:,} of {len(keys):,} records ({100 * count / len(keys):.0f} %) have this {what}"
            yield Hit(None, message, short(key))


@over("one-class", "error", "add records of the other classes, or check the column that holds the label")
def one_class(records: Records) -> Iterator[Hit]:
    """Classification with one class only."""
    for split, counts in _classes(records).items():
        if len(counts) == 1:
            yield Hit(None, f"all {counts.total():,} {split} records have the label {next(iter(counts))!r}")


@over("class-imbalance", "warning", "add records of the rare classes, and judge by more than accuracy")
def class_imbalance(records: Records) -> Iterator[Hit]:
    """A class that is very rare, or nearly everything."""
    counts = _classes(records).get("train", Counter())
    total, ranked = counts.total(), counts.most_common()
    if len(counts) < 2 or total < _ENOUGH:
        return
    if ranked[0][1] > _MAJORITY * total:
        yield Hit(None, f"{100 * ranked[0][1] / total:.1f} % of the training records have the label {ranked[0][0]!r}")
    rare = [f"{label!r} ({count})" for label, count in ranked if count < _RARE_CLASS * total]
    if rare:
        more = f" and {len(rare) - 5} more" if len(rare) > 5 else ""
        yield Hit(None, f"rare labels, of {total:,} training records: {', '.join(rare[:5])}{more}")


@over("small-eval", "warning", "hold out more records: on so few a difference of losses is mostly chance")
def small_eval(records: Records) -> Iterator[Hit]:
    """Too few records to evaluate on."""
    trained = len(records.of("train"))
    wanted = max(_FEW, min(_ENOUGH, math.ceil(trained / 100)))
    for name, held in Counter(item.eval_set for item in records.of("eval")).items():
        if held < wanted and trained >= _FEW:
            what = f"{held} record{'s' * (held != 1)} to evaluate on{f' ({name})' * bool(name)}"
            yield Hit(None, f"{what}, beside {trained:,} to train on; {wanted} or more would do")


# ------------------------------------------------------------------------------------------------------------- shared


def _texts(records: Records) -> list[str]:
    """The normalised text of each record."""
    return [normalise(item.text) for item in records.items]


def _near(records: Records) -> list[tuple[Pair, Item, Item]]:
    """Pairs of records that nearly equal each other. Equal ones are not among them."""
    # One of several copies in a part is enough, and ``leak`` knows the pairs that are equal across the splits.
    first: dict[tuple[str, str], Item] = {}
    for item, text in zip(records.items, records.shared(_texts), strict=True):
        if text:
            first.setdefault((text, item.part), item)
    texts, kept = [text for text, _ in first], list(first.values())
    return [
        (pair, kept[pair.first], kept[pair.second]) for pair in near(texts) if texts[pair.first] != texts[pair.second]
    ]


def _classes(records: Records) -> dict[str, Counter[str]]:
    """The count of each label in each part."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in records.items:
        if item.label is not None:
            counts[item.part][item.label] += 1
    return counts
