"""Intervals and tests hold what they say where rows come in units; without units they do not."""

import numpy as np
import pytest

from fedward.errors import DataError
from fedward.tuning.resampling import Indices, Units, bootstrap, each_row, swap_test, units_of

PATIENTS, NOTES = 40, 5
BY_PATIENT = units_of([f"p{i % PATIENTS}" for i in range(PATIENTS * NOTES)])
BY_ROW = each_row(PATIENTS * NOTES)


def draw(seed: int, mean: float = 0.0) -> np.ndarray:
    """Scores that are nearly the same for all notes of a patient."""
    generator = np.random.default_rng(seed)
    own = np.tile(generator.normal(size=PATIENTS), NOTES)
    return mean + own + 0.3 * generator.normal(size=own.size)


def covered(units: Units) -> float:
    """How often the interval of the mean holds the true one, 1."""
    hits = 0
    for seed in range(200):
        values = draw(seed, 1.0)

        def mean(rows: Indices, values: np.ndarray = values) -> np.ndarray:
            return np.array([values[rows].mean()])

        (low,), (high,) = bootstrap(mean, units, resamples=200)
        hits += low <= 1.0 <= high
    return hits / 200


def called_different(units: Units, mean: float = 0.0) -> float:
    """How often the test says that scores which differ by ``mean`` are not alike."""
    found = 0
    for seed in range(200):
        values = draw(seed, mean)

        def difference(swapped: np.ndarray, values: np.ndarray = values) -> float:
            return float(np.where(swapped, -values, values).mean())

        found += swap_test(difference, units, seed=seed, resamples=99) < 0.05
    return found / 200


def test_intervals_hold_by_unit():
    assert 0.88 <= covered(BY_PATIENT) <= 0.99


def test_intervals_are_too_narrow_where_units_are_taken_apart():
    assert covered(BY_ROW) < 0.8


def test_alike_is_called_different_in_five_of_a_hundred():
    assert called_different(BY_PATIENT) <= 0.05 + 2 * 0.0154  # two standard errors


def test_without_units_alike_is_called_different_far_too_often():
    assert called_different(BY_ROW) > 0.2


def test_a_difference_is_found():
    assert called_different(BY_PATIENT, 0.6) > 0.9


def test_drawn_rows_are_whole_units():
    units = units_of(["a", "b", "a", None, "", "b", "b"])
    assert units.size.tolist() == [2, 3, 1, 1]
    drawn = units.draw(np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=7)
    assert counts[0] == counts[2]
    assert counts[1] == counts[5] == counts[6]
    heads = units.toss(np.random.default_rng(1))
    assert heads[0] == heads[2]
    assert heads[1] == heads[5] == heads[6]


def test_a_figure_that_no_draw_has_is_not_a_number():
    (low, other), (high, _) = bootstrap(
        lambda rows: np.array([np.nan, float(rows.mean())]), each_row(5), resamples=100
    )
    assert np.isnan(low)
    assert np.isnan(high)
    assert np.isfinite(other)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="at least one row"):
        each_row(0)
