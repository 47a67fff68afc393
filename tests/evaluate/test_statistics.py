"""Statistics: against plain forms and known values, calibrated on simulated contestants, as powerful as is possible."""

from __future__ import annotations

import math

import numpy as np
import pytest

from weft.evaluate.statistics import (
    agreement_of,
    bootstrap_means,
    bootstrap_means_ref,
    holm,
    mcnemar_exact_p,
    mcnemar_p,
    mcnemar_p_ref,
    mcnemar_rejects,
    mean,
    paired_interval,
    permutation_p,
    permutation_p_ref,
    smallest_found,
    smallest_found_ref,
)

SIMULATIONS, ITEMS = 2_000, 400
# An adapter and its base are right on mostly the same items. The correlation of right and wrong that is assumed here;
# with a base that is right in 70 % of the items and a gain of 5 points, 89.8 % of the items come out alike.
CORRELATION, BASE, GAIN = 0.75, 0.70, 0.05


def answers(gain: float, generator: np.random.Generator, shape: tuple[int, ...] = (SIMULATIONS, ITEMS)) -> np.ndarray:
    """Right (1) or wrong (0) of a base and of a contestant, [2, simulations, items], so correlated."""
    changed = 1 - agreement_of(BASE, gain, CORRELATION)
    gained = (changed + gain) / 2
    base = generator.random(shape) < BASE
    # Of the items that the base has right, some are lost; of the others, some are gained.
    turned = generator.random(shape) < np.where(base, (gained - gain) / BASE, gained / (1 - BASE))
    return np.stack([base, base ^ turned]).astype(np.int8)


def p_values(right: np.ndarray) -> np.ndarray:
    """McNemar's p-value of each simulation, of [2, simulations, items]."""
    before, after = right.astype(bool)
    return mcnemar_p((before & ~after).sum(-1), (~before & after).sum(-1))


# --------------------------------------------------------------------------------------------- calibration and power


def test_the_simulated_contestants_are_as_correlated_as_is_said() -> None:
    right = answers(GAIN, np.random.default_rng(0), (500, 4000)).reshape(2, -1)
    assert np.corrcoef(right)[0, 1] == pytest.approx(CORRELATION, abs=0.005)
    assert right.mean(1) == pytest.approx([BASE, BASE + GAIN], abs=0.002)


def test_mcnemar_raises_few_false_alarms_in_2000_simulations() -> None:
    found = (p_values(answers(0.0, np.random.default_rng(1))) <= 0.05).mean()
    # Its true rate here is 4.87 % (computed below for all shares), and one of 2,000 simulations 0.5 points from it.
    assert 0.03 <= found <= 0.055


def test_a_planted_gain_of_five_points_in_400_items_is_found_four_times_in_five() -> None:
    found = (p_values(answers(GAIN, np.random.default_rng(2))) <= 0.05).mean()
    changed = 1 - agreement_of(BASE, GAIN, CORRELATION)
    exact = mcnemar_rejects(ITEMS, (changed - GAIN) / 2, (changed + GAIN) / 2)
    assert found >= 0.80
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / SIMULATIONS))


@pytest.mark.parametrize("items", [50, 100, 200, 400])
def test_mid_p_keeps_its_level_whatever_share_of_items_changes(items: int) -> None:
    """Not simulated: the false alarms of all shares from 0.5 % to 95 %, to the last digit."""
    rates = [mcnemar_rejects(items, share / 2, share / 2) for share in np.linspace(0.005, 0.95, 40)]
    assert max(rates) <= 0.051  # measured: at most 5.06 %, at 200 items
    exact = [mcnemar_rejects(items, share / 2, share / 2, mid=False) for share in (0.1, 0.3)]
    assert max(exact) < max(rates[4:12]), "mid-p would gain nothing over the exact test"


def test_power_depends_on_agreement_alone_and_is_enough_from_87_percent() -> None:
    power = {share: mcnemar_rejects(400, (share - 0.05) / 2, (share + 0.05) / 2) for share in (0.05, 0.13, 0.14, 0.5)}
    assert power[0.05] > 0.999
    assert power[0.13] >= 0.80 > power[0.14]
    # Two contestants that have nothing in common, at 50 %: no test finds 5 points in 400 items so often.
    assert power[0.5] == pytest.approx(0.29, abs=0.01)
    assert agreement_of(0.5, 0.05, 0.0) == pytest.approx(0.5)


@pytest.mark.parametrize("spread", ["normal", "heavy", "skewed pairs"])
def test_the_permutation_test_raises_few_false_alarms(spread: str) -> None:
    generator = np.random.default_rng(3)
    shape = (10_000, 60)
    if spread == "skewed pairs":  # two losses of one distribution: skewed each, their difference is symmetric
        differences = generator.exponential(size=shape) - generator.exponential(size=shape)
    else:
        differences = generator.normal(size=shape) if spread == "normal" else generator.standard_t(2, size=shape)
    found = np.mean([permutation_p(one, generator, 199) <= 0.05 for one in differences])
    # Its true rate is 10 / 200, for it is exact; 10,000 simulations have an error of 0.22 points.
    assert 0.042 <= found <= 0.055


def test_the_permutation_test_finds_what_is_there() -> None:
    generator = np.random.default_rng(4)
    # Power of a z-test at an effect of 2.8 standard errors: 80 %; 300 simulations know it to 2.3 points.
    differences = generator.normal(2.8 / math.sqrt(200), 1, (300, 200))
    assert np.mean([permutation_p(one, generator, 999) <= 0.05 for one in differences]) >= 0.73


def test_holm_keeps_the_chance_of_any_false_alarm_among_twelve_contestants() -> None:
    generator = np.random.default_rng(5)
    base = generator.random((SIMULATIONS, 1, ITEMS)) < BASE
    gained = (1 - agreement_of(BASE, 0.0, CORRELATION)) / 2
    share = np.where(base, gained / BASE, gained / (1 - BASE)).astype(np.float32)
    turned = generator.random((SIMULATIONS, 12, ITEMS), dtype=np.float32) < share
    p = mcnemar_p((base & turned).sum(-1), (~base & turned).sum(-1))
    raw = np.mean(p.min(1) <= 0.05)
    corrected = np.mean([min(holm(row.tolist())) <= 0.05 for row in p])
    assert raw > 0.2, "without a correction every fourth report would name somebody who is no better"
    assert corrected <= 0.055


# --------------------------------------------------------------------------------------------- against plain forms


def test_mcnemar_equals_whole_numbers() -> None:
    lost, gained = np.meshgrid(range(25), range(25))
    plain = [
        [float(mcnemar_p_ref(int(b), int(c))) for b, c in zip(*row, strict=True)]
        for row in zip(lost, gained, strict=True)
    ]
    np.testing.assert_allclose(mcnemar_p(lost, gained), plain, rtol=1e-10)
    assert mcnemar_p(700, 900) == pytest.approx(float(mcnemar_p_ref(700, 900)), rel=1e-9)


def test_mcnemar_of_known_tables() -> None:
    # b = 1, c = 7 (Fagerland, Lydersen & Laake, 2013, table 1): exact 0.0703, mid-p 0.0391
    assert mcnemar_exact_p(1, 7) == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar_p(1, 7) == pytest.approx(0.0391, abs=5e-5)
    assert mcnemar_p([0, 5], [0, 5]).tolist() == [1.0, 1.0]


def test_the_drawn_permutations_come_near_to_all_of_them() -> None:
    generator = np.random.default_rng(6)
    for size in (3, 8, 12):
        differences = generator.normal(0.5, 1, size)
        exact = float(permutation_p_ref(differences.tolist()))
        drawn = permutation_p(differences, generator)
        # The drawn share has a standard error of √(p (1 - p) / draws); the given arrangement adds one in 10,000.
        assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9_999) + 2e-4)


def test_no_difference_at_all_is_no_finding() -> None:
    assert permutation_p(np.zeros(50), np.random.default_rng(0)) == 1.0


@pytest.mark.parametrize("values", [[0.0] * 30 + [1.0] * 70, list(np.random.default_rng(7).exponential(size=100))])
def test_the_fast_bootstrap_has_the_plain_ones_distribution(values: list[float]) -> None:
    fast = bootstrap_means(values, np.random.default_rng(8), 20_000)
    plain = np.array(bootstrap_means_ref(values, np.random.default_rng(9), 4_000))
    spread = float(np.std(values)) / 10
    assert fast.mean() == pytest.approx(plain.mean(), abs=4 * spread / math.sqrt(4_000))
    assert fast.std() == pytest.approx(plain.std(), rel=4 / math.sqrt(2 * 4_000))
    assert np.quantile(fast, [0.025, 0.975]) == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.15 * spread)


def test_the_bootstrap_is_the_generators() -> None:
    one, two = (paired_interval([0.0, 1.0, -1.0, 0.5], np.random.default_rng(10)) for _ in range(2))
    assert one == two


def test_the_mean_and_its_error() -> None:
    found = mean([1, 0, 0, 1, 1, 0, 0, 0, 0, 0])
    assert (found.value, found.n) == (0.3, 10)
    assert found.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
    assert mean([2.0]).stderr is None
    with pytest.raises(ValueError, match="no values"):
        mean([])


@pytest.mark.parametrize(("items", "changed"), [(400, 0.12), (200, 0.3), (1000, 0.2), (100, 0.3)])
def test_the_smallest_gain_that_is_found_comes_near_to_the_exact_one(items: int, changed: float) -> None:
    assert smallest_found(items, changed) == pytest.approx(smallest_found_ref(items, changed), rel=0.02)


def test_where_too_few_items_change_no_gain_is_found() -> None:
    assert smallest_found(50, 0.05) is None
    assert smallest_found_ref(50, 0.05) is None


def test_holm_of_a_worked_example() -> None:
    # Ordered .005 · 4, .01 · 3, .03 · 2, .04 · 1, and never less than the one before (Holm, 1979).
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
