"""What a judge leaves behind: ``verdicts.jsonl``, the record of an evaluation, and lines for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weft.errors import UserError
from weft.evaluate.judge.figures import Comparison, Rate
from weft.evaluate.judge.judging import Compared, Scored
from weft.evaluate.judge.rubric import Rubric
from weft.evaluate.results import SUMMARY, Contestant, Item, Results, Score, TaskRecord
from weft.files.whole import make_folder, write_whole
from weft.foreign import read_json
from weft.generators import Generator

VERDICTS, LEDGER = "verdicts.jsonl", "ledger.jsonl"
TASK = "judge"


def check_folder(folder: Path, asked: Mapping[str, object]) -> None:
    """Refuse a folder with another judgement in it.

    Raises:
        UserError: It holds one, or results of something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is no folder.")
    if not (folder / SUMMARY).is_file():
        return
    facts = read_json(folder / SUMMARY).get("facts")
    before = facts.get("asked") if isinstance(facts, dict) else None
    if before != dict(asked):
        known = before if isinstance(before, dict) else {}
        changed = [key for key in asked if known.get(key) != asked[key]] or ["all"]
        raise UserError(
            f"{folder} holds another evaluation ({', '.join(changed)} is not the same). Take another folder."
        )


def costs(generator: Generator, cached: int) -> dict[str, object]:
    """What judging has cost, over all calls with the same ledger."""
    spent = generator.account.spent
    return {"money": spent.money, "tokens": spent.tokens, "requests": spent.requests, "cached": cached}


@dataclass(frozen=True)
class Judgement:
    """One judging, ready to be written. ``facts`` are those of the whole."""

    results: Results
    verdicts: Sequence[Mapping[str, object]]

    def write(self, folder: Path) -> None:
        """Write the verdicts and the record, each file whole.

        Raises:
            WriteError: The machine refuses.
        """
        make_folder(folder)
        lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in self.verdicts)
        write_whole(folder / VERDICTS, lines)
        self.results.write(folder)


def comparison_record(
    judged: Sequence[Compared], found: Comparison, names: tuple[str, str], facts: Mapping[str, object]
) -> Judgement:
    """The record of a comparison of the contestants ``names``: each item has a ``win`` of 1, ½ or 0 for both."""
    verdicts = [
        {"item": one.pair.item, "winner": one.winner, "verdicts": list(one.verdicts), "said": list(one.said),
         "failures": list(one.failures), "length_a": len(one.pair.a), "length_b": len(one.pair.b)}
        for one in judged
    ]  # fmt: skip
    items, rate = [], found.win_rate
    for one in judged:
        for name, side, text in ((names[0], "a", one.pair.a), (names[1], "b", one.pair.b)):
            if one.winner is not None:
                win = 0.5 if one.winner == "tie" else float(one.winner == side)
                items.append(_item(name, one.pair.item, {"win": win}, text, one.pair.reference, one.pair.question))
    scores = []
    if rate.value is not None:
        control = found.length_controlled
        for name, turn in zip(names, (lambda x: x, lambda x: 1 - x), strict=True):
            scores.append(_score(name, "win", Rate(turn(rate.value), rate.stderr, rate.n)))
            if control.value is not None:
                at_one_length = Rate(turn(control.value), control.stderr, rate.n)
                scores.append(_score(name, "length_controlled_minimal", at_one_length))
    task = TaskRecord(name=TASK, kind="generation", metric="win", facts={"judge": found.entries()})
    return Judgement(_results(names, task, items, scores, facts), verdicts)


def score_record(
    scored: Mapping[str, Sequence[Scored]], rubric: Rubric, facts: Mapping[str, object]
) -> tuple[Judgement, dict[str, dict[str, Rate]]]:
    """The record of scores: name -> its answers; and name -> criterion -> the mean score."""
    verdicts, items, scores = [], [], []
    rates: dict[str, dict[str, Rate]] = {}
    for name, rows in scored.items():
        known = [one for one in rows if one.scores is not None]
        rates[name] = {key: Rate.of([(one.scores or {})[key] for one in known]) for key in rubric.criteria}
        rates[name]["mean"] = Rate.of([one.mean for one in known if one.mean is not None])
        for key, rate in rates[name].items():
            if rate.value is not None:
                scores.append(_score(name, key, rate))
        for one in rows:
            pair = one.pair
            verdicts.append({"item": pair.item, "contestant": name, "scores": one.scores, "said": one.said,
                             "failure": one.failure})  # fmt: skip
            if one.scores is not None and one.mean is not None:
                values = {**{key: float(value) for key, value in one.scores.items()}, "mean": one.mean}
                items.append(_item(name, pair.item, values, pair.a, pair.reference, pair.question))
    told = {"scale": list(rubric.scale), "criteria": dict(rubric.criteria)}
    task = TaskRecord(name=TASK, kind="generation", metric="mean", facts={"rubric": told})
    return Judgement(_results(list(scored), task, items, scores, facts), verdicts), rates


def _item(name: str, item: str, scores: Mapping[str, float], output: str, reference: str, asked: str) -> Item:
    return Item(contestant=name, task=TASK, item=item, scores=scores, output=output, reference=reference, asked=asked)


def _score(name: str, metric: str, rate: Rate) -> Score:
    assert rate.value is not None
    return Score(contestant=name, task=TASK, metric=metric, value=rate.value, stderr=rate.stderr, n=rate.n)


def _results(
    names: Sequence[str], task: TaskRecord, items: Sequence[Item], scores: Sequence[Score], facts: Mapping[str, object]
) -> Results:
    contestants = [Contestant(name=name, kind="model") for name in names]
    return Results(contestants=contestants, tasks=[task], items=items, scores=scores, facts=dict(facts))


def comparison_lines(found: Comparison, names: tuple[str, str]) -> list[str]:
    """A comparison for people: the rates, and the table of biases."""
    a, b = names
    lines = [
        f"{a} against {b}: {found.wins:,} wins, {found.ties:,} ties, {found.losses:,} losses in {found.items:,} items"
        + _left_out(found)
    ]
    control = found.length_controlled
    length = Rate(control.value, control.stderr, found.win_rate.n)
    weight = Rate(control.weight, control.weight_stderr, found.win_rate.n)
    rows = [
        ("win rate", _percent(found.win_rate), "a tie counts half"),
        ("length_controlled_minimal", _percent(length), "the same, if both answers were of one length"),
        ("bias", "", ""),
        ("  for the first place", _percent(found.first), "of all verdicts for one; 50 % is none"),
        ("  follows the place", _percent(found.follows_place), "of all items; the two orders contradict each other"),
        ("  for the longer", _percent(found.longer), "of all verdicts for one; it holds what they deserve, too"),
        ("  weight of length", _plain(weight), "in logits; above 0 the longer is taken for better"),
    ]
    if found.own is not None:
        rows.append(("  for its own model", _percent(found.own), "win rate of the judge's model; it may deserve it"))
    if found.agreement is not None and found.kappa is not None:
        rows.append(("agrees with people", _percent(found.agreement), f"in {found.agreement.n:,} items"))
        rows.append(("  kappa", _plain(found.kappa), "0: as by chance; 1: always"))
    return [*lines, *_table(rows)]


def score_lines(rates: Mapping[str, Mapping[str, Rate]], lost: Mapping[str, int]) -> list[str]:
    """Scores for people. ``lost``: answers of each that have none."""
    lines = []
    for name, found in rates.items():
        without = f"; {lost[name]:,} without a score" if lost[name] else ""
        lines.append(f"{name}: {found['mean'].n:,} answers{without}")
        lines += _table([(f"  {key}", _plain(rate), "") for key, rate in found.items()])
    return lines


def _left_out(found: Comparison) -> str:
    told = ""
    if found.unparsed:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(found.failures.items()))
        told += f"; {found.unparsed:,} without a whole verdict, which count for nothing ({kinds})"
    if found.unasked:
        told += f"; {found.unasked:,} not judged, for the budget is used up"
    return told


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    wide, wider = (max(len(row[part]) for row in rows) for part in (0, 1))
    return [f"  {name:<{wide}}  {value:<{wider}}  {note}".rstrip() for name, value, note in rows]


def _percent(rate: Rate) -> str:
    if rate.value is None:
        return "not known"
    error = "" if rate.stderr is None else f" ± {100 * rate.stderr:.1f}"
    return f"{100 * rate.value:.1f}{error} %"


def _plain(rate: Rate) -> str:
    if rate.value is None:
        return "not known"
    return f"{rate.value:.2f}" + ("" if rate.stderr is None else f" ± {rate.stderr:.2f}")
