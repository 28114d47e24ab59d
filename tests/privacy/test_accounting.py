import math
from typing import Any

import pytest
from dp_accounting import dp_event
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

from fedward.errors import InvalidValue
from fedward.privacy import accounting
from fedward.privacy.accounting import (
    SampledGaussian,
    admits,
    epsilon,
    filter_order,
    merged,
    noise_multiplier,
    renyi_epsilon,
)


def event(sigma: float, rate: float, steps: int) -> SampledGaussian:
    return SampledGaussian(noise_multiplier=sigma, sampling_rate=rate, steps=steps)


def theirs(events: list[SampledGaussian]) -> dp_event.DpEvent:
    composed: list[dp_event.DpEvent] = [
        dp_event.SelfComposedDpEvent(
            dp_event.PoissonSampledDpEvent(
                e.sampling_rate, dp_event.GaussianDpEvent(e.noise_multiplier)
            ),
            e.steps,
        )
        for e in events
    ]
    return dp_event.ComposedDpEvent(composed)


def pld(events: list[SampledGaussian], delta: float) -> float:
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
    return float(accountant.compose(theirs(events)).get_epsilon(delta))


CASES = [
    ([event(1.0, 0.02, 100)], 1e-5),
    ([event(1.2, 0.1, 200)], 1e-5),
    ([event(0.6, 0.01, 1000)], 1e-5),
    ([event(2.0, 1.0, 20)], 1e-5),
    ([event(50.0, 1.0, 20)], 1e-6),
    ([event(0.62, 0.02, 220), event(20.0, 1.0, 22)], 1e-6),
    ([event(8.0, 0.3, 30)], 1e-6),
]


@pytest.mark.parametrize(("events", "delta"), CASES)
def test_prv_agrees_with_googles_pld(events, delta):
    ours, other = epsilon(events, delta), pld(events, delta)
    assert other - 1e-3 * len(events) < ours < other + 0.015
    # Negative control: a tenth less noise, and the two no longer agree.
    weaker = [event(0.9 * e.noise_multiplier, e.sampling_rate, e.steps) for e in events]
    assert pld(weaker, delta) > ours


@pytest.mark.parametrize(("events", "delta"), CASES)
def test_renyi_is_an_upper_bound_near_googles(events, delta):
    other = RdpAccountant().compose(theirs(events)).get_epsilon(delta)
    assert epsilon(events, delta) <= renyi_epsilon(events, delta)
    assert other * 0.999 <= renyi_epsilon(events, delta) < other * 1.05 + 0.01


def test_edge_cases():
    assert epsilon([], 1e-6) == 0 == epsilon([event(1.0, 0.5, 0)], 1e-6)
    assert epsilon([event(1.0, 0.1, 5), event(0.0, 0.1, 1)], 1e-6) == math.inf
    assert renyi_epsilon([event(0.0, 0.1, 1)], 1e-6) == math.inf
    assert renyi_epsilon([], 1e-6) == 0
    assert epsilon([event(0.01, 0.1, 5)], 1e-6) > 1e4  # no crash and no full memory
    assert 0 <= epsilon([event(5000.0, 0.01, 1)], 1e-6) < 0.02


def test_cost_grows_with_steps_and_rate_and_falls_with_noise_and_delta():
    middle = epsilon([event(1.0, 0.1, 20)], 1e-6)
    assert middle < epsilon([event(1.0, 0.1, 21)], 1e-6)
    assert middle < epsilon([event(1.0, 0.11, 20)], 1e-6)
    assert middle > epsilon([event(1.01, 0.1, 20)], 1e-6)
    assert middle > epsilon([event(1.0, 0.1, 20)], 2e-6)


def test_order_and_cutting_of_events_do_not_matter():
    whole = [event(1.0, 0.1, 20), event(5.0, 1.0, 3)]
    cut = [event(5.0, 1.0, 2), *[event(1.0, 0.1, 5)] * 4, event(5.0, 1.0, 1), event(7.0, 1.0, 0)]
    assert merged(cut) == tuple(whole) == merged(whole)
    assert epsilon(cut, 1e-6) == epsilon(whole, 1e-6)
    assert event(1.0, 0.1, 5).times(4) == whole[0]


@pytest.mark.parametrize(
    ("target", "rate", "steps"),
    [(8.0, 0.02, 220), (3.0, 0.1, 100), (0.1, 1.0, 20), (1.0, 1.0, 1)],
)
def test_noise_is_the_least_on_the_grid(target, rate, steps):
    sigma = noise_multiplier(epsilon=target, delta=1e-6, sampling_rate=rate, steps=steps)
    assert round(sigma * 1000) / 1000 == sigma
    assert epsilon([event(sigma, rate, steps)], 1e-6) <= target
    assert epsilon([event(sigma - 0.001, rate, steps)], 1e-6) > target


def test_noise_does_not_depend_on_what_was_asked_before():
    arguments: dict[str, Any] = {
        "epsilon": 2.0, "delta": 1e-5, "sampling_rate": 1.0, "steps": 4
    }  # fmt: skip
    first = noise_multiplier(**arguments)
    accounting._noise_multiplier.cache_clear()
    accounting._epsilon.cache_clear()
    assert noise_multiplier(**arguments) == first


def test_noise_at_the_ends():
    given: dict[str, Any] = {"delta": 1e-6, "sampling_rate": 0.1, "steps": 10}
    assert noise_multiplier(epsilon=math.inf, **given) == 0.0
    assert noise_multiplier(epsilon=1e9, **given) < 0.01
    with pytest.raises(InvalidValue, match="no noise reaches it"):
        noise_multiplier(epsilon=1e-4, **given)


@pytest.mark.parametrize(
    "change",
    [{"epsilon": 0.0}, {"epsilon": math.nan}, {"delta": 0.0}, {"delta": 1.0}, {"steps": 0},
     {"sampling_rate": 0.0}, {"sampling_rate": 1.1}],
)  # fmt: skip
def test_values_out_of_range_are_refused(change):
    given: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-6, "sampling_rate": 0.1, "steps": 10}
    given |= change
    with pytest.raises(InvalidValue, match=f"^{next(iter(change))} = "):
        noise_multiplier(**given)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "key"),
    [(-1.0, 0.1, 1, "noise_multiplier"), (math.nan, 0.1, 1, "noise_multiplier"),
     (math.inf, 0.1, 1, "noise_multiplier"), (1.0, math.nan, 1, "sampling_rate"),
     (1.0, 0.1, -1, "steps")],
)  # fmt: skip
def test_events_that_cannot_be_are_refused(sigma, rate, steps, key):
    with pytest.raises(InvalidValue, match=f"^{key} = "):
        event(sigma, rate, steps)


def test_the_filter_admits_up_to_its_cap_and_not_beyond():
    plan = [event(2.0, 0.05, 100)]
    order = filter_order(plan, epsilon=8.0, delta=1e-6)
    fits = {"order": order, "epsilon": 8.0, "delta": 1e-6}
    history: list[SampledGaussian] = []
    while admits(history, plan, **fits):
        history += plan
    # Filling it up by single steps ends at the same place, and below what PRV would still allow.
    assert len(history) > 3
    assert renyi_epsilon(history, 1e-6) <= 8.0
    assert epsilon(history, 1e-6) < 8.0
    spent = [e.times(1) for e in history]
    while admits(spent, [event(2.0, 0.05, 1)], **fits):
        spent.append(event(2.0, 0.05, 1))
    assert len(merged(spent)) == 1
    assert merged(spent)[0].steps < merged(history)[0].steps + 100


def test_the_filter_refuses_what_prv_only_allows_in_advance():
    # Negative control: the same events, judged as if they had been fixed before the first.
    sigma = noise_multiplier(epsilon=4.0, delta=1e-6, sampling_rate=0.05, steps=200)
    half = [event(sigma, 0.05, 100)]
    order = filter_order(half, epsilon=4.0, delta=1e-6)
    assert epsilon(half + half, 1e-6) <= 4.0
    assert admits([], half, order=order, epsilon=4.0, delta=1e-6)
    assert not admits(half, half, order=order, epsilon=4.0, delta=1e-6)


def test_the_filter_at_its_ends():
    anything = [event(0.0, 1.0, 10)]
    assert admits(anything, anything, order=2.0, epsilon=math.inf, delta=1e-6)
    assert not admits([], anything, order=2.0, epsilon=100.0, delta=1e-6)
