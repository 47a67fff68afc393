"""The checks before training find the same whether they look at all tokens at once or at a few after the other."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from tests.data.planted import (
    BUGS,
    CLEAN,
    Bug,
    DataSet,
    clean_rows,
    dropped_end,
    padded,
    twice_ended,
    weight_of,
    without_end,
)

from weft.data import Renderer, Sample
from weft.data.auditing import audit as auditing
from weft.data.auditing.audit import audit_before_training, early_findings
from weft.data.auditing.base import CHECKS, Facts, Finding, Records
from weft.data.store import SampleStore
from weft.data.views import chained
from weft.errors import UserError

EARLY = {check.code for check in CHECKS.values() if check.early}
PARTS = (1, 90, 700, 1 << 40)


def at_once(facts: Facts, train: list[Sample], held: list[Sample]) -> list[Finding]:
    """As ``weft preview`` makes them."""
    return auditing._findings(Records((), facts, (train, held)), (), EARLY)


def in_parts(facts: Facts, train: list[Sample], held: list[Sample], part: int) -> list[Finding]:
    """Once from lists, once from a store; both are the same."""
    store = SampleStore(0)
    for sample in (*train, *held):
        store.append(sample)
    sides = store[: len(train)], store[len(train) :]
    found = [finding for group in early_findings(facts, *sides, part) for finding in group.findings]
    again = [finding for group in early_findings(facts, train, held, part) for finding in group.findings]
    assert found == again
    return found


def sides(data: DataSet, folder: Path) -> tuple[Facts, list[Sample], list[Sample]]:
    items, facts = data.items(folder)
    train = [sample for item in items if item.split == "train" for sample in item.samples]
    return facts, train, [sample for item in items if item.split == "eval" for sample in item.samples]


@pytest.mark.long
@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.code in EARLY], ids=lambda bug: f"{bug.code} {bug.name}")
def test_every_planted_bug(bug: Bug, tmp_path: Path) -> None:
    facts, train, held = sides(bug.make(), tmp_path)
    whole = at_once(facts, train, held)
    if bug.code != "nothing-to-learn" or bug.name == "mask lost":  # the others become no samples
        assert bug.code in {finding.code for finding in whole}
    for part in PARTS:
        assert in_parts(facts, train, held, part) == whole
        assert in_parts(facts, held, train, part) == at_once(facts, held, train)


def test_every_early_check_is_planted() -> None:
    assert {bug.code for bug in BUGS} >= EARLY


@pytest.mark.parametrize("name", CLEAN)
def test_clean_data(name: str, tmp_path: Path) -> None:
    facts, train, held = sides(CLEAN[name](), tmp_path)
    for part in PARTS:
        assert in_parts(facts, train, held, part) == []


@pytest.mark.long
def test_many_bugs_in_one_file(tmp_path: Path) -> None:
    """With the end learned in no record, in the first alone, or in the last alone."""
    facts, train, _ = sides(DataSet(rows=clean_rows(60), options={"max_length": 400}), tmp_path)
    tokenizer = facts.tokenizer
    changes = [
        lambda s: without_end(s, tokenizer),
        lambda s: dropped_end(s, tokenizer),
        lambda s: padded(without_end(s, tokenizer), tokenizer),
        lambda s: replace(s, weights=[0.0] * len(s.weights)),
        lambda s: weight_of(without_end(s, tokenizer), list(range(1, s.answer or 2)), 1.0),
    ]
    twice = twice_ended(train[0], tokenizer)
    silent = [replace(sample, weights=[0.0] * len(sample.weights)) for sample in train[:3]]
    codes = set()
    ends = [[], [train[0]], [twice], silent], [[], [train[1]], [replace(twice)]]
    for first, last, kinds in itertools.product(*ends, [4, 5]):  # the fifth learns the end of the question
        bad = [change(sample) for sample, change in zip(train, itertools.cycle(changes[:kinds]), strict=False)]
        data = ([*first, *bad[:40]], [*bad[40:], *last])
        whole = at_once(facts, *data)
        codes |= {finding.code for finding in whole}
        for part in PARTS:
            assert in_parts(facts, *data, part) == whole
    assert codes == {
        "nothing-to-learn", "eos-never-learned", "eos-not-learned", "double-eos", "pad-learned", "prompt-learned"
    }  # fmt: skip


def test_findings_are_bounded_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts, train, _ = sides(DataSet(rows=clean_rows(20)), tmp_path)
    store = SampleStore()
    for number in range(2500):
        sample = replace(train[number % 20], source=f"d.json:{number}")
        store.append(sample if number % 2 else without_end(sample, facts.tokenizer))
    whole = at_once(facts, list(store), [])
    assert len(whole) == 1250
    findings = audit_before_training(facts.renderer, store, [], "warn", part=5000)
    assert findings == whole[:1000]
    assert any("eos-not-learned (1,250 records): d.json:0: " in message for message in caplog.messages)
    with pytest.raises(UserError, match=r"eos-not-learned \(1,250 records\)"):
        audit_before_training(facts.renderer, store, [], part=5000)


def test_samples_of_several_jobs_count_once(tmp_path: Path) -> None:
    facts, train, _ = sides(DataSet(rows=clean_rows(20)), tmp_path)
    store = SampleStore()
    for sample in train:
        store.append(without_end(sample, facts.tokenizer) if sample is train[2] else sample)
    jobs = chained([store, store[:9], store[1:]])
    assert [finding.source for finding in audit_before_training(facts.renderer, jobs, jobs, "warn", part=200)] == [
        train[2].source
    ]


def test_a_part_at_a_time_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more tokens are at hand than a part's and one sample's."""
    facts, train, _ = sides(DataSet(rows=clean_rows(40)), tmp_path)
    most = 0
    plain = auditing.Records

    def counted(items: object, facts: Facts, samples: tuple[list[Sample], list[Sample]], *ends: object) -> Records:
        nonlocal most
        most = max(most, sum(len(sample.input_ids) for side in samples for sample in side))
        return plain((), facts, samples, *ends)  # type: ignore[arg-type]

    monkeypatch.setattr(auditing, "Records", counted)
    early_findings(Facts(Renderer(facts.tokenizer)), train, train, 500)
    assert 500 <= most < 500 + max(len(sample.input_ids) for sample in train)
