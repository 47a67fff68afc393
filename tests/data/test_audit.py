"""The audit finds every planted bug, in the record where it is, and nothing in clean data."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import kit
from tests.data.planted import BUGS, CLEAN, Bug, DataSet, clean_rows

from weft.data import Message, Renderer
from weft.data.auditing.audit import audit, findings_json, grouped
from weft.data.auditing.base import CHECKS, Facts, Item
from weft.data.auditing.items import collect
from weft.data.pipeline import TextRecipe, outcomes
from weft.data.rendering.served import served_template
from weft.errors import UserError
from weft.models.load import load_tokenizer

# What a bug brings with it besides.
BESIDES = {
    "eos-never-learned": {"answer-not-learned"},
    "pad-masks-eos": {"eos-never-learned"},
    "pad-learned": {"eos-not-learned"},  # pads stand behind the end
    "prompt-learned": {"eos-not-learned"},  # and so does what the template writes there
    "double-bos": {"served-elsewhere"},
    "serve-differs": {"served-elsewhere"},
    "unknown-tokens": {"served-elsewhere"},  # the plain template writes no BOS
    "near-duplicate": {"contradiction"},
    "common-prompt": {"contradiction"},
    "common-answer": {"near-duplicate"},
    "torn-text": {"small-eval"},
    "contrary-verdicts": {"contradiction", "near-duplicate", "duplicate"},
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.code} {bug.name}".strip())
def test_planted_bug(bug: Bug, tmp_path: Path) -> None:
    items, facts = bug.make().items(tmp_path)
    findings = audit(items, facts)
    mine = [finding for finding in findings if finding.code == bug.code]
    assert tuple(place(finding.source) for finding in mine) == bug.where, [str(f) for f in findings]
    for finding in mine:
        assert finding.message
        assert finding.mend
        assert finding.severity == CHECKS[bug.code].severity
    others = {finding.code for finding in findings} - {bug.code}
    assert others <= BESIDES.get(bug.code, set()), [str(f) for f in findings if f.code in others]


def place(source: str) -> str:
    """``train:3`` of ``/…/train.jsonl:3``."""
    path, _, line = source.rpartition(":")
    return f"{Path(path).stem}:{line}" if source else ""


def test_every_check_has_a_planted_bug() -> None:
    assert {bug.code for bug in BUGS} == set(CHECKS)


@pytest.mark.parametrize("name", CLEAN)
def test_silent_on_clean_data(name: str, tmp_path: Path) -> None:
    items, facts = CLEAN[name]().items(tmp_path)
    assert len(items) >= 10
    assert all(item.samples for item in items)
    assert [str(finding) for finding in audit(items, facts)] == []


def read(path: Path, renderer: Renderer, limit: int | None = None) -> list[Item]:
    return collect(outcomes(path, TextRecipe(renderer=renderer, watched=True), limit=limit), renderer)[0]


REAL = {"sft/gsm8k_train.jsonl": 400, "sft/huatuo_med_zh.json": 200, "sft/openai_messages.jsonl": 128,
        "sft/alpaca_en.json": 280, "sft/alpaca_gpt4_zh.json": 50, "sft/lima.json": 100}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "limit", "tokenizer"),
    kit.in_turn([pytest.param(file, limit, id=file) for file, limit in REAL.items()], ["llama2", "minimind"]),
)
def test_silent_on_real_data(shared: Path, tokenizer: str, file: str, limit: int) -> None:
    renderer = Renderer(load_tokenizer(str(shared / "tokenizers" / tokenizer)))
    items = read(shared / file, renderer, limit=limit)
    if tokenizer == "llama2":
        # The plain template writes no BOS, and transformers would add none. The form that `weft merge` saves does.
        assert {finding.code for finding in audit(items, Facts(renderer))} == {"served-elsewhere"}
        samples = [item.samples for item in items]
        template = served_template(renderer, "causal_lm", [[Message("user", "Why?")]])
        renderer = Renderer(renderer.tokenizer, chat_template=str(template))
        items = read(shared / file, renderer, limit=limit)
        assert [item.samples for item in items] == samples
    assert [str(finding) for finding in audit(items, Facts(renderer))] == []


@pytest.mark.long
def test_true_findings_in_real_data(shared: Path) -> None:
    """The identity set waits for its names to be filled in; alpaca_gpt4_zh holds copies."""
    renderer = Renderer(load_tokenizer(str(shared / "tokenizers" / "minimind")))
    items = read(shared / "sft" / "identity.json", renderer)
    found = {group.check.code: len(group.findings) for group in grouped(audit(items, Facts(renderer)))}
    assert found["template-variable"] == 85
    items = read(shared / "sft" / "alpaca_gpt4_zh.json", renderer)
    assert sum(finding.code == "duplicate" for finding in audit(items, Facts(renderer))) == 8


def test_errors_come_first_and_a_check_can_be_left_out(tmp_path: Path) -> None:
    rows = clean_rows()
    rows[5] = {**rows[5], "output": "As an AI language model, I cannot cook."}
    rows[9] = {**rows[9], "output": "N/A"}
    items, facts = DataSet(rows=rows).items(tmp_path)
    assert [finding.code for finding in audit(items, facts)] == ["placeholder-answer", "refusal"]
    assert [finding.code for finding in audit(items, facts, ignore=["placeholder-answer"])] == ["refusal"]
    assert [finding.code for finding in audit(items, facts, only=["placeholder-answer"])] == ["placeholder-answer"]
    (row,) = findings_json(audit(items, facts, only=["refusal"]))
    assert row["source"].endswith("train.jsonl:6")
    assert row["severity"] == "warning"
    with pytest.raises(UserError, match=r"no check 'refusl'.*refusal"):
        audit(items, facts, ignore=["refusl"])


def test_nothing_at_all() -> None:
    assert audit([], Facts(Renderer(DataSet().tokenizer))) == []


def test_a_secret_is_never_shown(tmp_path: Path) -> None:
    rows = clean_rows()
    rows[0] = {**rows[0], "output": "Ask maria.lopez82@gmail.com or 13812345679."}
    items, facts = DataSet(rows=rows).items(tmp_path)
    (finding,) = audit(items, facts)
    assert "lopez" not in str(finding)
    assert "2345679" not in str(finding)


def test_every_check_says_what_it_finds_and_how_to_mend_it() -> None:
    for check in CHECKS.values():
        assert check.about.endswith("."), check.code
        assert check.mend[0].islower() or check.mend[0] == "`", check.code
        assert not check.mend.endswith("."), check.code
