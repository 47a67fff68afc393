"""``weft chat``: several adapters side by side, lines of several parts, what is saved and what is kept."""

from __future__ import annotations

import io
import json
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from weft.cli.chat import Conversation
from weft.cli.columns import Columns
from weft.cli.lines import Turn, _history, joined
from weft.errors import UserError
from weft.generation.open import open_target
from weft.generation.request import Answer, Token
from weft.generation.sampling import Sampling


def test_several_answer_one_after_the_other_in_a_pipe(weft: Callable[..., Any], run_dir: Path) -> None:
    asked = "What comes after two?"
    alone = {
        name: weft("generate", run_dir, "--adapter", name, "--max-new-tokens", 8, "--prompt", asked).out
        for name in ("prefix_tuning", "base")
    }
    result = weft("chat", run_dir, "--max-new-tokens", 8, stdin=f"/compare prefix_tuning base\n{asked}\n")
    assert result.code == 0, result.err
    assert result.out == f"[prefix_tuning]\n{alone['prefix_tuning']}\n[base]\n{alone['base']}"
    assert "prefix_tuning, base answer side by side" in result.err
    for line in ("/compare lora", "/compare lora nobody"):
        assert weft("chat", run_dir, stdin=line).code == 2


def test_each_goes_on_with_its_own_answers(weft: Callable[..., Any], run_dir: Path) -> None:
    words = ("chat", run_dir, "--json", "--max-new-tokens", 6)
    lines = ["one", "/compare", "two", "three", "/save all.json", "/adapter base", "four", "/save base.jsonl"]
    result = weft(*words, stdin="\n".join(lines))
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["adapter"] for row in rows] == ["lora", *["lora", "prefix_tuning", None] * 2, None]
    saved = json.loads(Path("all.json").read_text())
    assert [record["adapter"] for record in saved] == ["lora", "prefix_tuning", "base"]
    for place, record in enumerate(saved):
        said = [message["content"] for message in record["messages"]]
        assert said[:2] == ["one", rows[0]["answer"]], "what was said before is everybody's"
        assert said[2:] == ["two", rows[1 + place]["answer"], "three", rows[4 + place]["answer"]]
    (last,) = [json.loads(line) for line in Path("base.jsonl").read_text().splitlines()]
    assert last["messages"][:6] == saved[2]["messages"]
    # The keys of what was said before are there: the conversation is not computed again.
    assert all(row["cached_tokens"] >= before["prompt_tokens"] - 16
               for before, row in zip(rows[1:4], rows[4:7], strict=True))  # fmt: skip
    again = weft(*words, stdin="one\n/save all.json\n")
    assert (again.code, "all.json is there already" in again.err) == (2, True)
    assert weft(*words, stdin="one\n/save --overwrite all.json\n").code == 0
    assert len(json.loads(Path("all.json").read_text())[0]["messages"]) == 2
    assert "nothing to save yet" in weft(*words, stdin="/save new.json\n").err
    assert weft("generate", run_dir, "--input", "base.jsonl", "--max-new-tokens", 2).code == 0, "it is data"


def test_ctrl_c_ends_all_answers_and_not_the_chat(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    iterate = Answer.__iter__

    def interrupted(self: Answer) -> Iterator[Token]:
        yield next(iterate(self))
        raise KeyboardInterrupt

    with open_target(run_dir) as opened, Conversation(opened, "lora", None, Sampling(), 200) as talk:
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        talk.take("/compare lora base")
        with monkeypatch.context() as patch:
            patch.setattr(Answer, "__iter__", interrupted)
            talk.take("Tell me a long story.")
        told = {name: messages[-1].content for name, messages in talk.lanes.items()}
        assert talk.engine.stats().running == 0
        talk.take("And now?")
        assert {name: messages[1].content for name, messages in talk.lanes.items()} == told
        assert all(len(messages) == 4 for messages in talk.lanes.values())
    assert capsys.readouterr().out.count("[base]") == 2


def turns(text: str, **how: Any) -> list[Turn]:
    lines = iter(text.split("\n"))
    return list(joined(lambda goes_on: next(lines, None), **how))


def test_messages_of_several_lines() -> None:
    assert turns('a\n\n"""b\n  c\n\n/help"""\n/help') == [
        Turn("a"),
        Turn("b\n  c\n\n/help", quoted=True),
        Turn("/help"),
    ]
    assert turns('"""one line"""\n"""\ntwo\nlines\n"""') == [Turn("one line", True), Turn("two\nlines", True)]
    assert turns("a\\\nb\\\nc\n/save C:\\\nd\\") == [Turn("a\nb\nc"), Turn("/save C:\\"), Turn("d")]
    with pytest.raises(UserError, match='begins with """a has no """ at its end'):
        turns('"""a\nb')
    assert turns('x\n"""a\nb', lenient=True) == [Turn("x")]


def test_lines_are_kept_for_the_next_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import readline

    monkeypatch.setenv("WEFT_CACHE_DIR", str(tmp_path / "cache"))
    kept = tmp_path / "cache" / "chat_history"
    with _history(False):
        readline.add_history("secret")
    assert not kept.exists()
    for line in ("织机?", "two"):
        with _history(True):
            readline.add_history(line)
    assert kept.read_text().split() == ["织机?", "two"]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    with _history(True):
        assert [readline.get_history_item(n + 1) for n in range(2)] == ["织机?", "two"]
    monkeypatch.setenv("WEFT_CACHE_DIR", "")
    with _history(True):
        assert readline.get_current_history_length() == 0


@pytest.mark.parametrize("width", [40, 80, 120])
def test_columns_stand_side_by_side(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, height=30, color_system=None, force_terminal=True)
    columns = Columns(["lora", "prefix_tuning", "base"], console)
    told = ["织机是一种用来织布的机器。" * 9, "A loom weaves. \x1b[2J" * 12, "短"]
    for place, text in enumerate(told):
        columns.add(place, text)
    with console.capture() as shown:
        console.print(columns.view())
    lines = shown.get().splitlines()
    assert all(cell_len(line) <= width for line in lines)
    ruled = [line for line in lines if "│" in line]
    assert len({tuple(cell_len(line[:at]) for at, c in enumerate(line) if c == "│") for line in ruled}) <= 2
    assert sum(line.count("│") > 0 for line in lines[:1]) == (width > 40)
    assert "".join(c for line in lines for c in line if c in told[0]).count("织") == told[0].count("织")
    assert "\x1b" not in shown.get()
    with console.capture() as shown:
        console.print(columns.view(20))
    ends = shown.get()
    assert len(ends.splitlines()) <= 20
    assert "机器。" in ends.replace("\n", "")
