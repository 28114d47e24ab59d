"""The accounting of shared discrete noise, against enumeration of the distributions themselves."""

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant

from fedward.errors import InvalidValue
from fedward.privacy import distributed
from fedward.privacy.distributed import SharedGaussian, epsilon, share_of

Masses = npt.NDArray[np.float64]


def event(**changes: Any) -> SharedGaussian:
    fields: dict[str, Any] = {
        "clip": 1.0,
        "grid_step": 1e-3,
        "dimension": 2,
        "share": 0.5,
        "shares": 4,
        "sampling_rate": 0.2,
        "steps": 1,
    }
    return SharedGaussian(**{**fields, **changes})


def one_share(sigma: float, reach: int) -> Masses:
    k = np.arange(-reach, reach + 1)
    weights = np.exp(-(k**2) / (2 * sigma**2))
    masses: Masses = weights / weights.sum()
    return masses


def summed(sigma: float, shares: int, reach: int) -> Masses:
    """The sum of discrete Gaussians on -reach .. reach, by convolution."""
    one, total = one_share(sigma, reach), one_share(sigma, reach)
    for _ in range(shares - 1):
        total = np.convolve(total, one)[reach : 3 * reach + 1]
    return total


def exact_loss(sigma: float, shares: int, shift: tuple[int, int], rate: float, order: int) -> float:
    """The larger Rényi divergence of both directions, by enumeration of the plane."""
    reach = 260  # moments of order 8 lie as far out as eight shifts
    one = summed(sigma, shares, reach)
    inside = slice(reach - reach // 2, reach + reach // 2)
    near = np.outer(one[inside], one[inside])
    rows, columns = (np.roll(one, step)[inside] for step in shift)
    far = np.outer(rows, columns)
    mixed = (1 - rate) * near + rate * far
    both = [np.sum(a * (a / b) ** (order - 1)) for a, b in ((mixed, near), (near, mixed))]
    return float(np.log(max(both)) / (order - 1))


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("order", [2, 3, 8])
@pytest.mark.parametrize("shift", [(6, 0), (5, 4), (-3, 6)])
def test_the_bound_holds_in_the_plane(rate, order, shift):
    """One unit moves the rounded sum by ``shift`` grid steps; both directions, all outcomes."""
    sigma, shares = 4.0, 3
    length = math.hypot(*shift)
    exact = exact_loss(sigma, shares, shift, rate, order)
    bound = with_sensitivity(length, sigma, shares, rate).loss(order)
    assert exact <= bound * (1 + 1e-9)
    assert exact >= bound * (1 - 1e-6), "and no more than rounding errors above the truth"
    shorter = with_sensitivity(length * 0.98, sigma, shares, rate)
    assert exact > shorter.loss(order), "negative control: a smaller sensitivity"
    fewer = with_sensitivity(length, sigma, shares + 1, rate)
    assert exact > fewer.loss(order), "negative control: one share more than there is"


class _Exactly(SharedGaussian):
    """Everything in grid steps, the sensitivity too, and too coarse to be accepted otherwise."""

    def __post_init__(self) -> None:
        pass

    @property
    def sensitivity(self) -> float:
        return self.clip


def with_sensitivity(length: float, sigma: float, shares: int, rate: float) -> SharedGaussian:
    return _Exactly(
        clip=length,
        grid_step=1.0,
        dimension=2,
        share=sigma,
        shares=shares,
        sampling_rate=rate,
        steps=1,
    )


@pytest.mark.parametrize(("sigma", "shares"), [(0.5, 3), (0.7, 5), (1.0, 3)])
def test_the_slack_of_a_sum_of_shares(sigma, shares):
    """Lemma 2 where it is large enough to be seen: the density against a discrete Gaussian's."""
    reach, near = 40, slice(32, 49)
    one = one_share(sigma * math.sqrt(shares), reach)
    seen = np.max(np.abs(np.log(summed(sigma, shares, reach)[near] / one[near])))
    mine = dataclasses.replace(with_sensitivity(1.0, sigma, shares, 1.0), dimension=1)
    assert seen <= mine.slack
    wider = dataclasses.replace(mine, share=1.5 * sigma)
    assert seen > wider.slack, "negative control: the slack of wider shares"


def test_shares_of_less_than_four_steps_are_refused_for_a_reason():
    """At 4 steps the slack of 10^8 coordinates is nothing, at 1 it is everything."""
    assert event(dimension=10**8, grid_step=1e-6, share=4e-6, shares=100).slack < 1e-55
    assert with_sensitivity(1.0, 1.0, 3, 1.0).slack > 1e-4
    with pytest.raises(InvalidValue, match="share"):
        event(share=3.9e-3)


def test_a_unit_moves_the_rounded_sum_by_the_sensitivity_at_most():
    """For each draw of the rounding bits, C + gamma sqrt(d); and C alone would be too little."""
    generator = np.random.default_rng(1)
    gamma, longest, d = 1.0, 0.0, 400
    clip = 100 * gamma * math.sqrt(d)
    for _ in range(200):
        total, bits = generator.normal(0, 50, d), generator.random(d)
        unit = generator.normal(0, 1, d)
        unit *= clip / np.linalg.norm(unit)
        moved = np.floor((total + unit) / gamma + bits) - np.floor(total / gamma + bits)
        longest = max(longest, float(np.linalg.norm(moved)) * gamma)
    assert clip < longest <= clip + gamma * math.sqrt(d)


def test_against_dp_accounting_at_integer_orders():
    mine = event(grid_step=1e-9, share=1.0, steps=100)
    step = dp_event.PoissonSampledDpEvent(0.2, dp_event.GaussianDpEvent(2.0))
    accountant = RdpAccountant(orders=list(distributed.ORDERS))
    accountant.compose(dp_event.SelfComposedDpEvent(step, 100))
    theirs = accountant.get_epsilon(1e-5)
    assert epsilon([mine], 1e-5) == pytest.approx(theirs, rel=1e-6)
    assert epsilon([mine], 1e-5) >= theirs, "never less than without slack"


def test_zcdp_without_sampling():
    mine = event(sampling_rate=1.0)
    rho, xi = mine.zcdp
    for order in (2, 3, 10, 200):
        assert mine.loss(order) == pytest.approx(order * rho + xi, rel=1e-9)
    accountant = RdpAccountant()
    accountant.compose(dp_event.ZCDpEvent(rho=rho, xi=xi))
    # Without sampling all orders are licensed there; integers cost little.
    assert (
        accountant.get_epsilon(1e-6) <= epsilon([mine], 1e-6) < 1.05 * accountant.get_epsilon(1e-6)
    )


def test_steps_and_events_add_up():
    one, many = event(), event(steps=7)
    assert many.loss(5) == pytest.approx(7 * one.loss(5))
    assert epsilon([one] * 7, 1e-5) == pytest.approx(epsilon([many], 1e-5))
    assert epsilon([event(steps=0)], 1e-5) == epsilon([], 1e-5) == 0.0


def test_colluders_and_dropouts_leave_the_promised_noise():
    sigma, minimum, colluders = 3.0, 7, 2
    share = share_of(sigma, minimum=minimum, colluders=colluders)
    for present in range(minimum, 12):
        assert (present - colluders) * share**2 >= sigma**2 * (1 - 1e-12)
    assert (minimum - 1 - colluders) * share**2 < sigma**2, "one site fewer is too few"
    mine = event(share=share, shares=minimum - colluders)
    assert mine.noise_multiplier == pytest.approx(sigma / mine.sensitivity)
    alone = dataclasses.replace(mine, shares=1)
    assert alone.loss(2) > mine.loss(2)
    assert alone.slack == 0, "one share is a discrete Gaussian"


@pytest.mark.parametrize(
    "change",
    [
        {"clip": 0.0},
        {"clip": math.nan},
        {"grid_step": 0.0},
        {"grid_step": 0.0072},
        {"dimension": 0},
        {"share": math.inf},
        {"shares": 0},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.1},
        {"steps": -1},
    ],
)
def test_impossible_steps(change):
    with pytest.raises(InvalidValue, match=next(iter(change))):
        event(**change)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_impossible_delta(delta):
    with pytest.raises(InvalidValue, match="delta"):
        epsilon([event()], delta)


@pytest.mark.parametrize(
    ("sigma", "minimum", "colluders"), [(1.0, 3, 3), (1.0, 3, -1), (0.0, 3, 1)]
)
def test_impossible_shares(sigma, minimum, colluders):
    with pytest.raises(InvalidValue):
        share_of(sigma, minimum=minimum, colluders=colluders)
