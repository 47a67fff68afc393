"""The ledger: whole lines are kept, torn ones are repaired and said, and what is no ledger is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.errors import UserError
from weft.generators import Failure, Generated, GeneratorRequest, Ledger, ScriptedGenerator, Usage
from weft.generators.budget import Cost
from weft.generators.request import draws_of

DRAWS = draws_of([GeneratorRequest(text) for text in "abc"], "m")
FOUND = Generated("yes\u2028no", usage=Usage(5, 2), model="m", money=0.25)


def filled(path: Path) -> None:
    with Ledger(path) as ledger:
        for draw in DRAWS:
            ledger.sent(draw, Cost(1.0, 100, 1))
        ledger.answer(DRAWS[0], FOUND, Cost(0.25, 7, 1))
        ledger.failure(DRAWS[1], Failure("empty", "nothing"), Cost(0.5, 9, 1))


def test_answers_are_found_again_and_failures_are_not_and_both_are_paid_for(tmp_path: Path) -> None:
    filled(tmp_path / "new" / "l.jsonl")
    with Ledger(tmp_path / "new" / "l.jsonl") as ledger:
        found = ledger.get(DRAWS[0])
        assert found is not None
        assert (found.text, found.usage, found.money, found.cached) == (FOUND.text, FOUND.usage, 0.25, True)
        assert ledger.get(DRAWS[1]) is None
        assert ledger.lost == 1
        assert ledger.spent == Cost(1.75, 116, 3)
        assert "1 requests were on their way" in ledger.notes[0]


def test_a_ledger_that_is_cut_anywhere_is_repaired_to_its_last_whole_line(tmp_path: Path) -> None:
    filled(tmp_path / "l.jsonl")
    whole = (tmp_path / "l.jsonl").read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole)):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:size])
        with Ledger(path) as ledger:
            assert (ledger.get(DRAWS[0]) is not None) == (size >= ends[4])
            kept = max((end for end in ends if end <= size), default=ends[0])
            assert path.read_bytes() == whole[:kept]
            assert any("repaired to its last whole line" in note for note in ledger.notes) == (size > kept)


def test_zeros_at_the_end_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(100) + b"\n" + bytes(50))
    with Ledger(path) as ledger:
        assert len(ledger) == 1
    assert path.read_bytes() == whole


def test_damage_in_the_middle_is_no_tear_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b"???\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"l\.jsonl:3"):
        Ledger(path)
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("content", ["mine\n", '{"prompt": "a"}\n', '{"prompt": "a"}', '{"ledger": 9}\n'])
def test_another_file_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"no ledger|is not known"):
        Ledger(path)
    assert path.read_text() == content


def test_one_process_at_a_time_has_the_file(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.jsonl"), pytest.raises(UserError, match="used by another process"):
        Ledger(tmp_path / "l.jsonl")
    Ledger(tmp_path / "l.jsonl").close()


def test_a_script_answers_through_the_same_ledger(tmp_path: Path) -> None:
    calls: list[str] = []

    def script(turns: object, seed: int) -> str:
        calls.append(str(seed))
        return f"seed {seed}"

    for _ in range(2):
        with ScriptedGenerator(script, ledger=Ledger(tmp_path / "l.jsonl")) as generator:
            found = generator.generate("hello", n=3, seed=4)
    assert len(calls) == 3
    assert [one.text for one in found if isinstance(one, Generated)] == [f"seed {seed}" for seed in calls]
    assert len(set(calls)) == 3


def test_a_conversation_without_a_turn_of_the_user_is_refused() -> None:
    from weft.data import Message

    with pytest.raises(UserError, match="last turn is the user's"):
        GeneratorRequest([Message("system", "be kind")])
