"""Lower bounds hold as often as they say, come near the truth, and agree with the accountant."""

import math

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]  # no py.typed

from fedward.errors import InvalidValue
from fedward.privacy.accounting import SampledGaussian, epsilon
from fedward.privacy.audit_bound import (
    Scores,
    _routes,
    _sampled,
    attack_releases,
    gaussian_epsilon,
    lower_bound,
    upper_limit,
)
from fedward.privacy.audit_sensitivity import micro_pairs
from fedward.privacy.optimizer import Mechanism

DELTA = 1e-5


def gaussians(mu: float, n: int, seed: int) -> tuple[Scores, Scores]:
    """One attack's scores against a Gaussian mechanism."""
    generator = np.random.default_rng(seed)
    return generator.normal(mu, 1, (1, n)), generator.normal(0, 1, (1, n))


def responses(truth: float, n: int, seed: int) -> tuple[Scores, Scores]:
    """One attack's scores against randomised response of an epsilon: no bound can be tighter."""
    generator = np.random.default_rng(seed)
    share = math.exp(truth) / (1 + math.exp(truth))
    draws = generator.random((2, 1, n)) < share
    return draws[0].astype(float), 1.0 - draws[1].astype(float)


@pytest.mark.parametrize(
    ("hits", "trials", "limit"), [(0, 10, 0.3085), (3, 10, 0.6525), (10, 10, 1)]
)
def test_the_limit_is_clopper_and_pearsons(hits, trials, limit):
    """The two-sided 95 % table of their paper: 2.5 % on this side."""
    assert float(upper_limit(hits, trials, 0.025)) == pytest.approx(limit, abs=1e-4)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("rate", [1.0, 0.5, 0.1])
def test_one_step_of_known_distance_costs_what_the_accountant_says(sigma, rate):
    event = SampledGaussian(noise_multiplier=sigma, sampling_rate=rate, steps=1)
    variation = rate * (2 * stats.norm.cdf(1 / (2 * sigma)) - 1)
    assert _sampled(variation, rate, DELTA) == pytest.approx(epsilon([event], DELTA), abs=0.02)
    assert gaussian_epsilon(1 / sigma, DELTA) >= _sampled(variation, rate, DELTA) - 1e-9


def test_no_noise_explains_worlds_further_apart_than_the_rate():
    assert _sampled(0.5, 0.5, DELTA) == math.inf
    assert gaussian_epsilon(0.0, DELTA) == gaussian_epsilon(-1.0, DELTA) == 0.0
    assert gaussian_epsilon(1e-6, DELTA) == 0.0


@pytest.mark.parametrize("rate", [None, 1.0])
@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_bounds_of_a_gaussian_hold_as_often_as_they_say(rate, mu):
    """At confidence 0.9 a few of 100 may fail; a truth that is half as large fails most."""
    found = np.array(
        [
            lower_bound(*gaussians(mu, 1000, seed), delta=DELTA, confidence=0.9, rate=rate)
            for seed in range(100)
        ]
    )
    truth = gaussian_epsilon(mu, DELTA)
    assert (found > truth).mean() <= 0.15
    if rate == 1.0:
        assert (found > gaussian_epsilon(mu / 2, DELTA)).mean() > 0.5
        assert np.median(found) > 0.7 * truth


@pytest.mark.parametrize("truth", [0.5, 2.0])
def test_bounds_of_randomised_response_hold_and_come_near(truth):
    found = np.array(
        [
            lower_bound(*responses(truth, 1000, seed), delta=DELTA, confidence=0.9)
            for seed in range(100)
        ]
    )
    assert (found > truth).mean() <= 0.15
    assert np.median(found) > 0.7 * truth
    assert (found > truth / 2).mean() > 0.5


def test_equal_worlds_are_told_apart_by_nobody():
    for seed in range(20):
        scores = gaussians(0.0, 1000, seed)
        assert lower_bound(*scores, delta=DELTA, confidence=0.999) < 0.3


def test_the_best_of_several_attacks_counts():
    useless, good = gaussians(0.0, 1000, 1), gaussians(3.0, 1000, 2)
    present, absent = (np.concatenate(sides) for sides in zip(useless, good, strict=True))
    found = lower_bound(present, absent, delta=DELTA, confidence=0.99)
    assert found == lower_bound(*good, delta=DELTA, confidence=0.99) > 1


@pytest.mark.parametrize("confidence", [0.5, 1.0, math.nan])
def test_a_confidence_that_says_nothing_is_refused(confidence):
    with pytest.raises(InvalidValue, match="confidence = "):
        lower_bound(*gaussians(1.0, 100, 0), delta=DELTA, confidence=confidence)


def test_too_few_releases_are_refused():
    with pytest.raises(InvalidValue, match="at least 40"):
        lower_bound(*gaussians(1.0, 39, 0), delta=DELTA, confidence=0.95)


def test_sides_of_different_size_are_refused():
    """With ten times as many on one side, always guessing it would "tell" equal worlds."""
    present, absent = np.zeros((1, 1000)), np.zeros((1, 10_000))
    with pytest.raises(InvalidValue, match="as many with the unit: 1000"):
        lower_bound(present, absent, delta=DELTA, confidence=0.95)
    wrong = _routes((1000, 1000), (0, 10_000), delta=DELTA, error=0.05, rate=None)
    assert wrong.max() > 2, "the twin: what it would have claimed"


def test_without_noise_there_is_no_claim():
    quiet = Mechanism(
        sampling_rate=1.0, normaliser=1.0, clip=1.0, noise_multiplier=0.0, records_per_unit=1
    )
    with pytest.raises(InvalidValue, match="nothing is claimed"):
        attack_releases(next(micro_pairs(quiet)), quiet, delta=DELTA, confidence=0.95)
