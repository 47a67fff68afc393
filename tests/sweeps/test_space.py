"""What a sweep tries: grids, draws, and the words that are refused."""

from __future__ import annotations

import math
import random

import pytest

from weft.errors import UserError
from weft.sweeps.halving import Rung, leaving, place, rungs_of
from weft.sweeps.space import Range, dimension, drawn, grid, swept
from weft.training.settings import JobConfig


def test_a_grid_has_all_combinations_in_order() -> None:
    found = grid([dimension("r=4,16"), dimension("learning_rate=1e-3,1e-4")])
    assert found == [(f"r={r}", f"learning_rate={rate}") for r in (4, 16) for rate in ("1e-3", "1e-4")]


@pytest.mark.parametrize(
    ("word", "several"),
    [("r=4,16", True), ("r=4", False), ("target_modules=[q_proj,v_proj]", False), ("lr=log:1e-5:1e-2", True),
     ("target_modules=[q_proj],[q_proj,v_proj]", True), ('data="a,b"', False), ("optim_args={a: 1, b: 2}", False),
     ("data=C:x:y.jsonl", True), ("run.yaml", False), ("x=12:30:45", False)],
)  # fmt: skip
def test_commas_outside_brackets_and_ranges_make_values(word: str, several: bool) -> None:
    assert swept(word) == several


def test_draws_are_the_seeds_and_each_is_another() -> None:
    space = [dimension("learning_rate=log:1e-5:1e-2"), dimension("r=int:1:64"), dimension("method=lora,dora")]
    found = drawn(space, 50, seed=3)
    assert found == drawn(space, 50, seed=3)
    assert found != drawn(space, 50, seed=4)
    assert len(set(found)) == 50
    assert drawn(space, 10, seed=3) == found[:10]


def test_a_logarithmic_range_draws_as_much_from_each_decade() -> None:
    generator, values = random.Random(0), Range(1e-5, 1e-2, log=True, whole=False)
    found = [float(values.draw(generator)) for _ in range(3000)]
    assert all(1e-5 <= value <= 1e-2 for value in found)
    counts = [sum(low <= math.log10(value) < low + 1 for value in found) for low in (-5, -4, -3)]
    # Each is binomial with n = 3000 and p = 1/3; five standard deviations.
    assert all(abs(count - 1000) < 5 * math.sqrt(3000 * 2 / 9) for count in counts)


def test_whole_numbers_reach_both_ends() -> None:
    for kind in ("int", "logint"):
        found = {words[0] for words in drawn([dimension(f"r={kind}:1:4")], 4, seed=0)}
        assert found == {"r=1", "r=2", "r=3", "r=4"}


@pytest.mark.parametrize(
    ("word", "told"),
    [("r=4,,8", "empty value"), ("r=", "empty value"), ("r=4,4", "twice"), ("x=1e-3,0.001", "twice"),
     ("r", "key=value"), ("=4", "key=value"), ("r=log:1:1", "not below"), ("r=log:0:1", "above 0"),
     ("r=int:1:2.5", "whole numbers"),
     ("r=lug:1:2", "Did you mean 'log'"), ("r=uniform:a:2", "two numbers")],
)  # fmt: skip
def test_words_that_are_refused(word: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        dimension(word)


def test_spaces_that_are_refused() -> None:
    many = dimension("a=" + ",".join(map(str, range(40))))
    with pytest.raises(UserError, match="1,600 trials"):
        grid([many, many])
    with pytest.raises(UserError, match="--random N"):
        grid([dimension("r=int:1:3")])
    with pytest.raises(UserError, match="make 40 different"):
        drawn([many], 41, seed=0)
    with pytest.raises(UserError, match="only 3 different"):
        drawn([dimension("r=int:1:3")], 4, seed=0)
    with pytest.raises(UserError, match="at most 1,000"):
        drawn([many], 2000, seed=0)


# -------------------------------------------------------------------------------------------------------------- halving


def jobs(count: int, steps: int | None = 270, **more: int) -> list[JobConfig]:
    return [JobConfig(name=f"t{n}", method="lora", steps=steps, **more) for n in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "factor", "steps", "every", "wanted"),
    [(16, 3, 270, None, [(30, 5), (90, 1)]), (16, 2, 160, None, [(10, 8), (20, 4), (40, 2), (80, 1)]),
     (27, 3, 270, 20, [(20, 9), (40, 3), (80, 1)]), (2, 3, 10, None, [(3, 1)]), (8, 2, 4, None, [(1, 2), (2, 1)])],
)  # fmt: skip
def test_rungs(count: int, factor: int, steps: int, every: int | None, wanted: list[tuple[int, int]]) -> None:
    more = {} if every is None else {"eval_steps": every}
    assert rungs_of(jobs(count, steps, **more), factor) == tuple(Rung(*one) for one in wanted)


def test_rungs_that_are_refused() -> None:
    for given, factor, told in [
        (jobs(4, None), 2, "needs steps=N"),
        ([*jobs(2, 10), *jobs(2, 20)], 2, "same number of steps"),
        ([*jobs(2, 10, eval_steps=2), *jobs(2, 10, eval_steps=5)], 2, "where all are evaluated"),
        (jobs(1), 2, "one trial"),
        (jobs(4), 1, "2 or more"),
        (jobs(4, 1), 2, "none is left"),
    ]:
        with pytest.raises(UserError, match=told):
            rungs_of(given, factor)


def test_the_best_stay_and_equal_ones_stay_in_order() -> None:
    figures = {"a": 2.0, "b": math.nan, "c": 1.0, "d": 1.0, "e": math.inf}
    assert place(figures, lower=True) == ["c", "d", "a", "b", "e"]
    assert place(figures, lower=False) == ["a", "c", "d", "b", "e"]
    left = leaving(figures, Rung(9, 2), "eval_loss", lower=True)
    assert list(left) == ["a", "b", "e"]
    assert left["a"] == "after 9 steps eval_loss was 2, place 3 of 5"
