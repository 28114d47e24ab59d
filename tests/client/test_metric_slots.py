"""Metric sums are clipped per unit, noised at the scale that is charged, and absent by default."""

import dataclasses
import math

import numpy as np
import pytest

from fedward.client.metric_slots import metric_slots
from fedward.plan import Metrics as MetricsPlan
from fedward.plan import Model, Plan, Privacy
from fedward.privacy.accounting import epsilon
from fedward.privacy.noise import SecureStream
from fedward.privacy.planned import metric_event
from fedward.tuning.metrics import Metrics
from tests.simulations import tiny

PLAN = Plan(
    name="p",
    model=Model(path="m"),
    rounds=tiny.make_rounds(),
    privacy=Privacy(epsilon=8.0, delta=1e-5),
    metrics=MetricsPlan(epsilon=2.0, loss_bound=4.0),
)
NAKED = dataclasses.replace(PLAN, privacy=Privacy(epsilon=math.inf, delta=1e-5))
WITHOUT = dataclasses.replace(PLAN, metrics=None)


def stream(number: int = 0) -> SecureStream:
    return SecureStream(bytes([number]) * 32)


def metrics(losses: list[float], correct: list[int] | None = None) -> Metrics:
    found = None if correct is None else np.array(correct, dtype=np.float64)
    return Metrics(loss=0.0, losses=np.array(losses, dtype=np.float64), correct=found)


def exact(
    losses: list[float], units: list[list[int]], correct: list[int] | None = None
) -> list[float]:
    """The sums before noise."""
    found: list[float] = metric_slots(metrics(losses, correct), units, NAKED, stream()).tolist()
    return found


def test_without_metrics_there_is_no_slot_and_no_cost():
    assert metric_event(WITHOUT) is None
    assert metric_slots(metrics([1.0]), [[0]], WITHOUT, stream()).shape == (0,)


def test_a_unit_counts_once_with_the_mean_of_its_records():
    assert exact([1.0, 3.0, 4.0], [[0, 1], [2]], [1, 0, 1]) == [0.5 + 1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    ("loss", "counted"),
    [(-1.0, 0.0), (0.0, 0.0), (4.0, 1.0), (400.0, 1.0), (math.inf, 1.0), (math.nan, 1.0)],
)
def test_a_loss_is_clipped_to_the_bound(loss, counted):
    assert exact([loss], [[0]], [0]) == [counted, 0.0, 1.0]


def test_the_bound_is_the_plans():
    plan = dataclasses.replace(NAKED, metrics=MetricsPlan(epsilon=2.0, loss_bound=8.0))
    assert metric_slots(metrics([4.0]), [[0]], plan, stream())[0] == 0.5


def test_one_unit_changes_the_sum_by_at_most_root_three():
    extremes = [exact([loss], [[0]], [c]) for loss in (0.0, 99.0, math.nan) for c in (0, 1)]
    norms = [float(np.linalg.norm(one)) for one in extremes]
    assert max(norms) == math.sqrt(3)


def test_the_event_is_the_smallest_noise_that_keeps_to_the_plans_metrics_epsilon():
    event = metric_event(PLAN)
    assert event is not None
    rounds = PLAN.rounds.count + PLAN.rounds.spare
    sigma, delta = event.noise_multiplier, PLAN.privacy.delta
    less = dataclasses.replace(event, noise_multiplier=sigma - 0.001)
    assert epsilon([event.times(rounds)], delta) <= 2.0 < epsilon([less.times(rounds)], delta)


def scale(factor: float) -> float:
    """Standard deviation of the noise that nobody's metrics get, over ``factor`` of the charge."""
    event = metric_event(PLAN)
    assert event is not None
    noise = np.concatenate([metric_slots(None, [], PLAN, stream(n)) for n in range(256)])
    return float(noise.std()) / (math.sqrt(3) * event.noise_multiplier * factor)


def test_the_noise_has_the_scale_that_is_charged():
    tolerance = 5 / math.sqrt(2 * 3 * 256)
    assert abs(scale(1.0) - 1) < tolerance
    for factor in (2 / 3, 3 / 2):
        assert abs(scale(factor) - 1) > tolerance, "negative control"


def test_the_noise_does_not_depend_on_the_records():
    """The same stream gives the same noise beside any metrics, at every size of site."""
    nobody = metric_slots(None, [], PLAN, stream())
    somebody = metric_slots(metrics([2.0] * 9, [1] * 9), [[n] for n in range(9)], PLAN, stream())
    assert np.abs(somebody - nobody - [4.5, 9.0, 9.0]).max() < 1e-9


def test_every_slot_has_noise_of_its_own():
    assert len(set(metric_slots(None, [], PLAN, stream()).tolist())) == 3
    assert (
        metric_slots(None, [], PLAN, stream(1)).tolist()
        != metric_slots(None, [], PLAN, stream(2)).tolist()
    )
