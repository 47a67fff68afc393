"""Reports: differences with their tests, flips, no-ops, forgetting, costs, what the figures say, and the files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tests.evaluate.made import FACTS, QUIZ, TEXT, make_run, quiz_items, results, simple, text_items, write

from weft.errors import UserError
from weft.evaluate.report.comparison import MCNEMAR, PERMUTATION
from weft.evaluate.report.markdown import markdown
from weft.evaluate.report.page import page
from weft.evaluate.report.report import Report, make_report
from weft.evaluate.report.sources import find_sources
from weft.evaluate.report.svg import Axis, axis_of, beside
from weft.evaluate.report.writing import write_report
from weft.evaluate.results import Contestant, Item, Results, Score, TaskRecord
from weft.evaluate.statistics import holm, mcnemar_p


def report_of(folder: Path, found: Results, **settings: str) -> Report:
    return make_report(find_sources([write(folder, found)]), **settings)


def whole() -> Results:
    """A base, adapters of which one changes nothing, a prompt, and general text."""
    generator = np.random.default_rng(0)
    base = (generator.random(200) < 0.5).astype(int)
    losses = generator.normal(2.0, 0.3, 50)
    contestants = [Contestant("base", "base", FACTS)]
    items = [*quiz_items("base", base), *text_items("base", losses)]
    for name, turned, more in (("lora", 0.3, 0.2), ("ia3", 0.1, 0.01), ("asleep", 0.0, 0.0)):
        right = [1 if not one and u < turned else int(one) for one, u in zip(base, generator.random(200), strict=True)]
        facts = {**FACTS, "method": "lora", "bytes": 5_000, "largest_change": 1.5 if turned else 0.0}
        contestants.append(Contestant(name, "adapter", facts))
        items += [*quiz_items(name, right), *text_items(name, losses + more)]
    contestants.append(Contestant("5 examples", "prompt", {"template": TEMPLATE_OF_PROMPT, "stops": "</s>"}))
    items += [replace(item, prompt_tokens=220) for item in quiz_items("5 examples", base)]
    return results(contestants, [QUIZ, TEXT], items)


TEMPLATE_OF_PROMPT = "five examples, then {{ messages[0]['content'] }}"


def test_a_reports_p_values_are_the_tests_of_its_flips(tmp_path: Path) -> None:
    found = report_of(tmp_path / "a", simple({"lora": range(50, 80), "ia3": [0, 1, 99], "same": []}))
    raw = {}
    for figure in found.comparison.figures[1:]:
        one = figure.difference
        assert one is not None
        assert one.test == MCNEMAR
        raw[figure.contestant] = float(mcnemar_p(len(one.lost), len(one.gained)))
        assert one.p == raw[figure.contestant]
    lora = found.comparison.figure("lora", "quiz")
    assert lora is not None
    assert lora.difference is not None
    assert lora.difference.lost == tuple(map(str, range(50, 60)))
    assert lora.difference.gained == tuple(map(str, range(60, 80)))
    assert lora.difference.value == pytest.approx(0.10)
    assert lora.difference.low < 0.10 < lora.difference.high
    corrected = [one.difference.p_holm for one in found.comparison.figures if one.difference is not None]
    assert corrected == holm(list(raw.values()))


def test_a_task_whose_scores_are_better_low_gains_where_they_fall(tmp_path: Path) -> None:
    contestants = [Contestant("base", "base"), Contestant("lora", "adapter")]
    items = [*text_items("base", [2.0, 2.0, 2.0, 3.0]), *text_items("lora", [1.5, 2.5, 1.0, 3.0])]
    (_, lora) = report_of(tmp_path / "a", results(contestants, [TEXT], items)).comparison.figures
    assert lora.difference is not None
    assert lora.difference.test == PERMUTATION
    assert lora.difference.gained == ("0", "2")
    assert lora.difference.lost == ("1",)
    # Signs of 0.5, 0.5 and 1: six of the eight arrangements are as far from zero as -1.
    assert lora.difference.p == pytest.approx(6 / 8, abs=0.02)


def test_a_report_made_again_is_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", whole())
    one, two = (make_report(find_sources([folder])).summary() for _ in range(2))
    assert one == two


def test_another_contestant_can_be_the_reference(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", whole())
    found = make_report(find_sources([folder]), reference="lora")
    assert {one.difference.reference for one in found.comparison.figures if one.difference} == {"lora"}
    assert found.comparison.figure("lora", "quiz").difference is None  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"no contestant is named 'loro'\. Did you mean 'lora'\? There are: base"):
        make_report(find_sources([folder]), reference="loro")


def test_a_no_op_is_told_by_its_logits_or_by_its_answers(tmp_path: Path) -> None:
    found = report_of(tmp_path / "a", whole())
    assert list(found.idle) == ["asleep"]
    assert "no logit differs" in found.idle["asleep"]
    untold = report_of(tmp_path / "b", simple({"lora": [0], "asleep": []}))
    assert list(untold.idle) == ["asleep"]
    assert "all 100 answers" in untold.idle["asleep"]


def test_forgetting_is_the_change_of_cross_entropy_on_general_text_alone(tmp_path: Path) -> None:
    found = report_of(tmp_path / "a", whole())
    changes = {one.contestant: one.change for one in found.forgetting}
    assert changes == pytest.approx({"lora": 0.2, "ia3": 0.01, "asleep": 0.0})
    assert {one.contestant for one in found.trades} == {"lora", "ia3", "asleep"}
    assert all(one.tasks == ("quiz",) for one in found.trades)
    special = replace(whole(), tasks=[QUIZ, replace(TEXT, facts={})])
    assert report_of(tmp_path / "b", special).forgetting == ()


def test_a_perplexity_becomes_a_cross_entropy(tmp_path: Path) -> None:
    task = TaskRecord("wiki", "perplexity", "perplexity", higher_is_better=False, facts={"general": True})
    contestants = [Contestant("base", "base"), Contestant("lora", "adapter")]
    items = [
        Item(contestant=name, task="wiki", item=str(i), scores={"perplexity": value})
        for name, value in (("base", 8.0), ("lora", 10.0))
        for i in (0, 1)
    ]
    (one,) = report_of(tmp_path / "a", results(contestants, [task], items)).forgetting
    assert one.change == pytest.approx(np.log(10 / 8))


def test_a_figure_that_is_no_mean_of_its_items_has_a_test_and_no_interval(tmp_path: Path) -> None:
    task = TaskRecord("wiki", "perplexity", "perplexity", higher_is_better=False)
    contestants = [Contestant("base", "base"), Contestant("lora", "adapter")]
    generator = np.random.default_rng(1)
    losses = generator.normal(2, 1, 40)
    items = [
        Item(contestant=name, task="wiki", item=str(i), scores={"perplexity": float(np.exp(one + more))})
        for name, more in (("base", 0.0), ("lora", -0.1))
        for i, one in enumerate(losses)
    ]
    whole_text = [
        Score(contestant=name, task="wiki", metric="perplexity", value=value, stderr=0.5, n=40)
        for name, value in (("base", 8.0), ("lora", 7.25))
    ]
    found = replace(results(contestants, [task], items), scores=whole_text)
    made = report_of(tmp_path / "a", found)
    one = made.comparison.figure("lora", "wiki").difference  # type: ignore[union-attr]
    assert one is not None
    assert (one.value, one.low, one.stderr) == (-0.75, None, None)
    assert one.p < 0.001
    assert any("worked out over all items at once" in line for line in made.says)
    assert "−0.750" in page(made)


def test_an_infinite_loss_is_left_out_of_the_differences(tmp_path: Path) -> None:
    contestants = [Contestant("base", "base"), Contestant("lora", "adapter")]
    items = [*text_items("base", [2.0, 2.0, float("inf")]), *text_items("lora", [1.5, 2.5, 1.0])]
    found = Results(contestants=contestants, tasks=[TEXT], items=items, scores=[])
    made = report_of(tmp_path / "a", found)
    (_, lora) = made.comparison.figures
    assert lora.difference is not None
    assert lora.difference.n == 2
    files = write_report(made, tmp_path / "out")
    json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    assert files[0].is_file()


def test_costs_come_from_facts_and_else_from_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write(run / "evaluation" / "first", simple({"lora": [0], "ia3": [1]}))
    found = make_report(find_sources([run]))
    base, lora, _ = found.costs
    assert (base.trainable_parameters, base.seconds) == (None, None)
    # 8 · 4 numbers, without the optimizer's; 2,000 tokens at 50 a second
    assert (lora.trainable_parameters, lora.seconds, lora.peak_bytes) == (32, 40.0, 500_000_000)
    assert (lora.prompt_tokens, lora.answer_tokens) == (20, 3)


def test_flips_have_their_texts_and_are_limited(tmp_path: Path) -> None:
    found = report_of(tmp_path / "a", simple({"lora": range(40, 80)}))
    lost = [one for one in found.flips if not one.gained]
    assert len(lost) == 12
    assert (lost[0].item, lost[0].asked, lost[0].before, lost[0].after, lost[0].expected) == (
        "40",
        "Question 40?",
        "A",
        "B",
        "A",
    )
    lora = found.comparison.figure("lora", "quiz")
    assert lora is not None
    assert lora.difference is not None
    assert len(lora.difference.lost) == 20, "all are named"


# ------------------------------------------------------------------------------------------------ what the figures say


def test_the_sentences_depend_on_the_figures(tmp_path: Path) -> None:
    few = report_of(tmp_path / "a", simple({"lora": [5, 99]}, base=(1,) * 50 + (0,) * 50))
    told = " ".join(few.says)
    assert "± 9.8 points on quiz (100 items)" in told  # 1.96 · √(0.25 / 99)
    assert "One difference was tested" in told
    assert "was not found" in told
    assert "What was forgotten was not measured" in told
    many = " ".join(report_of(tmp_path / "b", whole()).says)
    # lora, ia3, asleep and the prompt on the quiz, the adapters on the text
    assert "7 differences were tested" in many
    assert "What was forgotten" not in many
    assert "On quiz lora is best, and a paired test tells it from each of the others" in many
    assert "wiki: fewer than 100 items" in many


def test_the_smallest_gain_that_would_have_been_found_is_named(tmp_path: Path) -> None:
    # 20 lost and 20 gained of 100 items: (1.96 √0.4 + 0.84 √(0.4 - gain²)) / 10 = 0.175
    found = report_of(tmp_path / "a", simple({"lora": range(40, 80)}))
    assert any("40 % of the items came out otherwise" in one and "below 17.5 points" in one for one in found.says)
    hardly = report_of(tmp_path / "b", simple({"lora": [0, 99]}))
    assert any("the test finds hardly any difference" in one for one in hardly.says)


def test_contestants_that_the_items_do_not_tell_apart_are_named(tmp_path: Path) -> None:
    found = report_of(tmp_path / "a", simple({"lora": range(60, 80), "dora": range(60, 81), "ia3": range(20)}))
    (leaders,) = found.comparison.leaders
    assert leaders.best == "dora"
    assert leaders.near == ("lora",)
    assert any("dora has the best figure, but these items do not tell it from lora" in one for one in found.says)
    assert any("best partly by luck" in one for one in found.says)


def test_without_a_base_that_is_said(tmp_path: Path) -> None:
    contestants = [Contestant(name, "adapter") for name in ("a", "b")]
    items = [*quiz_items("a", [1, 0]), *quiz_items("b", [1, 1])]
    found = report_of(tmp_path / "a", results(contestants, [QUIZ], items))
    assert found.comparison.tests == 0
    assert any("--reference NAME" in one for one in found.says)


def test_other_templates_are_said(tmp_path: Path) -> None:
    found = whole()
    one = found.contestants[1]
    turned = replace(one, facts={**one.facts, "template": "other"})
    told = report_of(tmp_path / "a", replace(found, contestants=[found.contestants[0], turned, *found.contestants[2:]]))
    assert any("asked with 2 different templates" in line for line in told.says)
    assert not any("templates" in line for line in report_of(tmp_path / "b", found).says), "a prompt has its own anyway"


# ------------------------------------------------------------------------------------------------------------- files


class Tags(HTMLParser):
    """The tags of a page, and those that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.addresses += [f"{key}={value}" for key, value in attrs if key in ("src", "href", "action", "data")]
        if tag not in ("meta", "br", "wbr", "img", "input", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def hostile() -> Results:
    """Names and texts that would be HTML, Markdown or mathematics."""
    bad = "<script>alert(1)</script>![x](http://evil/x.png) $a$ | `"
    contestants = [Contestant("base", "base", FACTS), Contestant(bad, "adapter", {"template": bad})]
    task = TaskRecord(bad, "generation", "exact_match", facts={"sha256": bad, "note": {"a": [1, True]}})
    items = [*quiz_items("base", [1, 0] * 5, bad, "exact_match"), *quiz_items(bad, [0, 1] * 5, bad, "exact_match")]
    return results(contestants, [task], [replace(one, output=bad, asked=bad, reference=bad) for one in items])


@pytest.mark.parametrize("make", [whole, hostile])
def test_the_page_stands_alone_and_is_well_formed(tmp_path: Path, make: object) -> None:
    text = page(report_of(tmp_path / "a", make()))  # type: ignore[operator]
    tags = Tags()
    tags.feed(text)
    assert tags.wrong == []
    assert tags.open == []
    assert tags.addresses == []
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(tags.names)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_shows_what_the_report_holds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ("lora", "ia3", "asleep"))
    write(run / "evaluation" / "first", whole())
    found = make_report(find_sources([run]))
    text = page(found)
    lora = found.comparison.figure("lora", "quiz")
    assert lora is not None
    assert lora.difference is not None
    for shown in (
        f"<b>{100 * lora.value:.1f}</b>", f"+{100 * lora.difference.value:.1f}", f"+{len(lora.difference.gained)} −",
        "no-op", "Gain against forgetting", "Items that came out otherwise", "Question ", "5.0 KB",
        "Template and end tokens", "five examples, then", "What the figures can and cannot say", "num_fewshot",
        "learning_rate 0.001", 'class="curve train"',
    ):  # fmt: skip
        assert shown in text, shown


def test_places_in_drawings_are_shares(tmp_path: Path) -> None:
    """Text in a drawing keeps its size on a phone because no drawing with text is stretched."""
    text = page(report_of(tmp_path / "a", whole()))
    for drawing in re.findall(r"<svg [^>]*viewBox.*?</svg>", text):
        assert "<text" not in drawing
    for place in re.findall(r' (?:cx|cy|x1|x2|y1|y2)="([^"]*)"', text):
        assert re.fullmatch(r"-?[\d.]+%", place)
        assert -5 <= float(place[:-1]) <= 105


def test_markdown_holds_the_same_and_no_pictures_of_others(tmp_path: Path) -> None:
    found = report_of(tmp_path / "a", whole())
    text = markdown(found, ["figures.png"])
    lora = found.comparison.figure("lora", "quiz")
    assert lora is not None
    assert lora.difference is not None
    assert f"**+{100 * lora.difference.value:.1f}**" in text
    assert "![figures](figures.png)" in text
    for line in found.says:
        assert line.replace("[", "\\[") in text
    turned = re.sub(r"(?ms)^(`{3,})$.*?^\1$", "", markdown(report_of(tmp_path / "b", hostile())))
    assert "alert" in turned
    assert "![x](" not in turned
    assert "<script" not in turned


def test_all_files_are_written_and_older_pictures_go(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", eval_key="eval_domain_loss")
    write(run / "evaluation" / "first", whole())
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    files = write_report(make_report(find_sources([run])), out)
    assert [one.name for one in files] == [
        "report.html", "report.md", "report.json", "figures.png", "gain_forgetting.png", "losses.png",
    ]  # fmt: skip
    assert all(one.read_bytes().startswith(b"\x89PNG") for one in files[3:])
    data = json.loads((out / "report.json").read_text())
    assert data["figures"][1]["difference"]["p_holm"] <= 1
    assert data["runs"][0]["jobs"][0]["evals"]["domain"][0] == [0, 3.0]
    write_report(make_report(find_sources([write(tmp_path / "plain", simple())])), out)
    assert {one.name for one in out.iterdir()} == {"report.html", "report.md", "report.json", "figures.png", "mine.txt"}


def test_hostile_names_can_be_drawn(tmp_path: Path) -> None:
    assert (tmp_path / "out" / "figures.png") in write_report(report_of(tmp_path / "a", hostile()), tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------- drawings


def test_an_axis_places_its_ends_and_its_ticks() -> None:
    axis = axis_of([0.2, 0.7])
    assert 0 < axis.place(0.2) < axis.place(0.7) < 1
    assert all(0 <= axis.place(tick) <= 1 for tick in axis.ticks())
    assert Axis(0.1, 10, log=True).place(1.0) == pytest.approx(0.5)
    assert all(0.1 <= tick <= 10 for tick in Axis(0.1, 10, log=True).ticks())
    assert 0 < axis_of([3.0]).place(3.0) < 1
    assert axis_of([5.0, 6.0], zero=True).low < 0
    assert Axis(1.5, 1.7, log=True).ticks(), "an axis has ticks, however short it is"


def test_numbers_stand_on_no_point_and_on_no_other_number() -> None:
    places = [(50.0, 50.0), (51.0, 50.5), (50.5, 52.0), (20.0, 20.0)]
    found = beside(places)
    taken = [*places, *found]
    assert all(
        abs(a - x) >= 2.8 or abs(b - y) >= 3.6
        for number, (a, b) in enumerate(found)
        for other, (x, y) in enumerate(taken)
        if other != len(places) + number
    )
