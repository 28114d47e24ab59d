"""The one-run bound is the theorem's, holds as often as it says, and sees what leaves a trace."""

import math

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]  # no py.typed

from fedward.errors import InvalidValue
from fedward.privacy.audit_canaries import (
    CHANCE_EXPOSURE,
    Included,
    Scores,
    area,
    curve,
    exposure,
    judge_canaries,
    one_run_bound,
)

DELTA = 1e-5


def responses(truth: float, m: int, generator: np.random.Generator) -> tuple[Scores, Included]:
    """Randomised response of every canary by itself: scores and coins."""
    included = generator.random(m) < 0.5
    honest = generator.random(m) < math.exp(truth) / (1 + math.exp(truth))
    return (included == honest) + generator.random(m) / 1000, included


def brute_force(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 as it is written: a sum for every i."""
    share = math.exp(epsilon) / (1 + math.exp(epsilon))
    pmf = [math.comb(r, k) * share**k * (1 - share) ** (r - k) for k in range(r + 1)]
    beta = sum(pmf[v:])
    alpha = max(2 / i * sum(pmf[max(0, v - i) : v]) for i in range(1, m + 1))
    return min(1.0, beta + alpha * m * delta)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize(("guesses", "right"), [(20, 20), (20, 17), (40, 33)])
def test_the_bound_is_the_theorems(guesses, right, delta):
    found = one_run_bound(40, guesses, right, delta=delta, confidence=0.95)
    assert found > 0
    assert brute_force(40, guesses, right, found, delta) == pytest.approx(0.05, abs=1e-4)


def test_luck_proves_nothing_and_delta_weakens():
    assert one_run_bound(400, 200, 100, delta=DELTA, confidence=0.95) == 0.0
    bounds = [one_run_bound(400, 200, 190, delta=d, confidence=0.95) for d in (0.0, 1e-5, 1e-3)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[2]


@pytest.mark.parametrize(
    ("truth", "times"),
    [(2.0, 40), *(pytest.param(each, 100, marks=pytest.mark.slow) for each in (0.5, 2.0))],
)
def test_bounds_of_randomised_response_hold_and_come_near(truth, times):
    generator = np.random.default_rng(0)
    found = np.array(
        [
            judge_canaries(
                *responses(truth, 1000, generator), claim=truth, delta=0.0, confidence=0.9
            ).lower
            for _ in range(times)
        ]
    )
    assert (found > truth).mean() <= 0.15
    assert np.median(found) > 0.7 * truth
    # Negative control: a claim of half of the truth is refuted.
    assert (found > truth / 2).mean() > 0.8


def test_canaries_that_leave_no_trace_look_like_luck():
    generator = np.random.default_rng(1)
    included = generator.random(400) < 0.5
    found = judge_canaries(
        generator.random(400), included, claim=1.0, delta=DELTA, confidence=0.999
    )
    assert found.lower < 0.1
    assert found.holds
    assert found.auc == pytest.approx(0.5, abs=0.1)
    assert found.exposure == pytest.approx(CHANCE_EXPOSURE, abs=0.4)


def test_canaries_that_all_show_are_wholly_exposed_and_refute():
    included = np.arange(400) % 2 == 0
    given = {"claim": 2.0, "delta": DELTA}
    assert not judge_canaries(included + 0.0, included, confidence=0.999, **given).holds
    found = judge_canaries(included + 0.0, included, confidence=0.95, **given)
    assert (found.auc, found.right) == (1.0, found.guesses)
    assert found.exposure == pytest.approx(found.most_exposure)
    assert found.lower > 3
    assert not found.holds
    assert found.roc == (1.0,) * 101


def test_chance_at_95_percent_refutes_nothing():
    """Only the surer bound does, and it is the one that a higher confidence gives."""
    included = np.arange(400) % 2 == 0
    given = {"scores": included + 0.0, "included": included, "delta": DELTA}
    usual = judge_canaries(claim=2.0, confidence=0.95, **given)
    sure = judge_canaries(claim=2.0, confidence=0.999, **given)
    assert usual.surely == sure.surely == sure.lower < usual.lower
    between = (usual.lower + usual.surely) / 2
    assert judge_canaries(claim=between, confidence=0.95, **given).holds
    assert not judge_canaries(claim=usual.surely - 0.01, confidence=0.95, **given).holds


def test_area_is_mann_and_whitneys():
    generator = np.random.default_rng(2)
    positive = generator.integers(1, 10, 50).astype(np.float64)
    negative = generator.integers(0, 9, 40).astype(np.float64)
    statistic = stats.mannwhitneyu(positive, negative).statistic
    assert area(positive, negative) == pytest.approx(statistic / (50 * 40))
    assert exposure(np.array([5.0]), np.arange(5.0) - 1) == pytest.approx(math.log2(6))


def test_the_curve_never_exceeds_the_false_positives_it_names():
    negative = np.arange(100.0)
    rates = curve(np.array([98.5, 50.5, -1.0]), negative)
    assert rates[0] == 0.0
    assert rates[1] == pytest.approx(1 / 3)
    assert rates[49] == pytest.approx(2 / 3)
    assert rates[100] == 1.0


@pytest.mark.parametrize("included", [np.zeros(400, bool), np.ones(400, bool), np.ones(4, bool)])
def test_canaries_that_cannot_be_told_apart_are_refused(included):
    with pytest.raises(InvalidValue, match="canaries = "):
        judge_canaries(np.zeros(len(included)), included, claim=1.0, delta=0.0, confidence=0.9)


@pytest.mark.parametrize(("guesses", "right"), [(401, 10), (10, 11), (10, -1)])
def test_impossible_counts_are_refused(guesses, right):
    with pytest.raises(InvalidValue, match="right = "):
        one_run_bound(400, guesses, right, delta=0.0, confidence=0.9)
