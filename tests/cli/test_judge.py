"""``weft judge``: from two sets of answers to rates, biases and verdicts in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Run
from tests.kit.mock_server import MODEL, MockServer, mock_server

from weft.evaluate.results import Contestant, Item, Results, TaskRecord

Weft = Callable[..., Run]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockServer]:
    """It takes the longer answer for the better one, and says so as JSON or with a letter."""

    def verdict(prompt: str) -> str:
        if "[End of the answer]" in prompt:
            return json.dumps({"reason": "x", "right": 4}) if "JSON" in prompt else "4"
        first = prompt.split("[Answer A]\n")[1].split("\n[End of answer A]")[0]
        second = prompt.split("[Answer B]\n")[1].split("\n[End of answer B]")[0]
        letter = "A" if len(first) > len(second) else "B"
        return json.dumps({"reason": "longer", "verdict": letter}) if "JSON" in prompt else letter

    monkeypatch.setattr("tests.kit.mock_server.right_answer", verdict)
    with mock_server() as mock:
        yield mock


def rows(path: Path, texts: list[str], adapter: str = "lora", **more: Any) -> Path:
    lines = [
        {"index": i, "prompt": f"question {i}", "adapter": adapter, "text": text, **more}
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    long = ["a long answer"] * 3 + ["x"]
    return rows(tmp_path / "a.jsonl", long), rows(tmp_path / "b.jsonl", ["short"] * 4, "bitfit")


def test_two_files_are_compared_and_the_same_command_asks_nothing_twice(
    weft: Weft, server: MockServer, sides: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "very-secret")
    (tmp_path / "human.jsonl").write_text('{"item": 0, "label": "A"}\n{"item": 3, "label": "tie"}\n')
    words = ["judge", *sides, "--judge", f"{server.url}#{MODEL}", "--output", "out", "--api-key-env", "JUDGE_KEY",
             "--human", tmp_path / "human.jsonl", "--price-prompt", "1", "--price-answer", "2"]  # fmt: skip
    estimate = weft(*words[:-4], "--dry-run")
    assert estimate.code == 0, estimate.err
    assert "8 verdicts" in estimate.out
    assert server.posts == 0
    assert not Path("out").exists()
    found = weft(*words)
    assert found.code == 0, found.err
    assert "lora against bitfit: 3 wins, 0 ties, 1 losses in 4 items" in found.out
    for said in (
        "win rate",
        "75.0 ± 25.0 %",
        "length_controlled_minimal",
        "for the first place",
        "kappa",
        "8 requests",
    ):
        assert said in found.out, said
    assert server.posts == 8
    again = weft(*words, "--json")
    assert server.posts == 8
    told = json.loads(again.out)
    assert (told["wins"], told["losses"], told["cost"]["cached"]) == (3, 1, 8)
    assert told["longer"]["value"] == 1.0
    out = Path("out")
    verdicts = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert [one["winner"] for one in verdicts] == ["a", "a", "a", "b"]
    results = Results.read(out)
    assert [one.scores["win"] for one in results.items if one.contestant == "lora"] == [1, 1, 1, 0]
    assert all("very-secret" not in path.read_text() for path in out.iterdir())
    other = weft(*[word if word != sides[1] else sides[0] for word in words])
    assert other.code == 2
    assert "holds another evaluation" in other.err


def test_contestants_of_an_evaluation_are_judged(weft: Weft, server: MockServer, tmp_path: Path) -> None:
    said = (("base", "no"), ("tuned", "yes!"))
    items = [
        Item(contestant=who, task="t", item=str(i), scores={}, output=text, asked=f"q {i}")
        for who, text in said
        for i in range(3)
    ]
    tuned = Contestant(name="tuned", kind="adapter", facts={"model": MODEL})
    names, task = [Contestant(name="base", kind="base"), tuned], TaskRecord(name="t", kind="generation", metric="em")
    (tmp_path / "eval").mkdir()
    Results(contestants=names, tasks=[task], items=items, scores=[]).write(tmp_path / "eval")
    sides = f"{tmp_path}/eval#tuned", f"{tmp_path}/eval#base"
    found = weft("judge", *sides, "--judge", f"{server.url}#{MODEL}", "--output", "out", "--form", "letter")
    assert found.code == 0, found.err
    assert "tuned against base: 3 wins" in found.out
    assert "for its own model" in found.out
    missing = weft("judge", tmp_path / "eval", tmp_path / "eval", "--judge", f"{server.url}#{MODEL}", "--output", "o2")
    assert missing.code == 2
    assert "has answers of several: base, tuned" in missing.err


def test_answers_are_scored_by_a_rubric(
    weft: Weft, server: MockServer, sides: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text("criteria:\n  right: Is it right?")
    words = ["--judge", f"{server.url}#{MODEL}", "--rubric", tmp_path / "r.yaml", "--score", "--output", "out"]
    found = weft("judge", *sides, *words)
    assert found.code == 0, found.err
    assert "4.00 ± 0.00" in found.out
    assert Results.read(Path("out")).scores[0].value == 4.0


def test_a_cap_ends_between_items_and_a_larger_one_goes_on(
    weft: Weft, server: MockServer, sides: tuple[Path, Path]
) -> None:
    words = ["judge", *sides, "--judge", f"{server.url}#{MODEL}", "--output", "out", "--concurrency", "1"]
    found = weft(*words, "--max-requests", "5")
    assert found.code == 0, found.err
    assert "the budget is used up: 2 of 4 are not judged" in found.err
    assert "2 wins" in found.out
    assert server.posts == 5
    assert "3 wins" in weft(*words).out
    assert server.posts == 8


def test_an_unreachable_judge_is_named_and_the_call_goes_on_later(
    weft: Weft, sides: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with mock_server() as mock:
        url = mock.url
    monkeypatch.setattr("weft.generators.server._Call._back_off", _at_once)
    found = weft("judge", *sides, "--judge", f"{url}#{MODEL}", "--output", "out")
    assert found.code == 2
    assert f"{url}: the address does not answer (Connection refused)" in found.err
    assert "the same call goes on from there" in found.err
    assert not Path("out/summary.json").exists()


async def _at_once(*_: object) -> bool:
    return True


def test_a_refused_key_is_named(weft: Weft, server: MockServer, sides: tuple[Path, Path]) -> None:
    server.status = 401, "who are you"
    found = weft("judge", *sides, "--judge", f"{server.url}#{MODEL}", "--output", "out")
    assert found.code == 2
    assert "a key is needed (status 401: who are you)" in found.err


def test_a_model_on_this_machine_judges(weft: Weft, sides: tuple[Path, Path], tiny_llama_dir: Path) -> None:
    Path("mine").mkdir()
    Path("mine/compare.en.jinja").write_text("{{ first[:9] }} or {{ second[:9] }}?")
    words = ["--form", "letter", "--templates", "mine", "--json"]
    found = weft("judge", *sides, "--judge", tiny_llama_dir, "--output", "out", *words)
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert told["unparsed"] + told["wins"] + told["ties"] + told["losses"] == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [("{a} --judge {url}", "give B to compare"), ("{a} {b}", "--judge says who judges"),
     ("{a} {b} --judge {url} --score", "--score needs --rubric"), ("", "give the answers"),
     ("{a} {few} --judge {url}", "do not answer the same items"), ("{a} {empty} --judge {url}", "is empty"),
     ("{a} {other} --judge {url}", "another question in each"), ("{a} {b} --judge http://h/v1", "names no model"),
     ("{a} {b} --judge {url} --form jsn", "Did you mean 'json'"), ("{a} nowhere.jsonl --judge {url}", "nowhere.jsonl"),
     ("{a} {b}#lara --judge {url}", "there is no 'lara'"), ("{a} {b} --judge {url} --max-money 1", "--price-prompt"),
     ("{a} {b} --judge {url} --max-tokens -1", "more than 0"),
     ("{a} {b} --judge {url} --api-key-env NOT_SET_HERE", "NOT_SET_HERE is not set"),
     ("{a} {b} --judge tiny-llama --api-key-env HOME", "--api-key-env is for a server"),
     ("{a} {b} --judge {url} --language fr", "expected one of en, zh"),
     ("{a} {b} --judge {url} --rubric {a}", "a.jsonl"), ("{a} {b} --judge {url} --human {a}", "label"),
     ("{a} {bare} --judge {url} --prompts {few}", "no prompt of item 3")],
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_asked(
    weft: Weft, server: MockServer, sides: tuple[Path, Path], tmp_path: Path, words: str, said: str
) -> None:
    rows(tmp_path / "few.jsonl", ["short"] * 3)
    rows(tmp_path / "empty.jsonl", [""] * 4)
    rows(tmp_path / "other.jsonl", ["x"] * 4, prompt="else")
    (tmp_path / "bare.jsonl").write_text('{"text": "x"}\n' * 4)
    known = {"a": sides[0], "b": sides[1], "url": f"{server.url}#{MODEL}"}
    known |= {name: tmp_path / f"{name}.jsonl" for name in ("few", "empty", "other", "bare")}
    found = weft("judge", *words.format(**known).split(), "--output", "out")
    assert found.code == 2, found.out + found.err
    assert said in found.err
    assert server.posts == 0
    assert not Path("out").exists()


def test_without_an_output_nothing_is_paid(weft: Weft, sides: tuple[Path, Path]) -> None:
    assert "--output FOLDER is missing" in weft("judge", *sides, "--judge", "http://127.0.0.1:1/v1#m").err


def test_our_prompts_are_copied(weft: Weft) -> None:
    assert weft("judge", "--copy-templates", "mine").code == 0
    assert sorted(path.name for path in Path("mine").iterdir()) == [
        "compare.en.jinja", "compare.zh.jinja", "score.en.jinja", "score.zh.jinja",
    ]  # fmt: skip
    assert weft("judge", "--copy-templates", "mine").code == 2
