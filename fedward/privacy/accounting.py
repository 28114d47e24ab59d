"""What training costs: immutable events, and the epsilon that they add up to.

Neighbours differ in one whole unit (add or remove one patient). A plan fixed before it starts is
judged by Opacus's PRV accountant (Gopi et al. 2021, arXiv 2106.02848). Plans that were chosen after
results had been seen are judged by a Rényi filter (Feldman and Zrnic 2021, arXiv 2008.11193),
because numerical composition is only proven for parameters that were fixed in advance. Noise that
is shared among sites (:mod:`fedward.privacy.distributed`) has Rényi moments only.
"""

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache

import numpy as np

from fedward.errors import InvalidValue
from fedward.privacy.distributed import SharedGaussian
from fedward.privacy.opacus_accountants import PRVAccountant, compute_rdp

_GRID = 1000  # noise multipliers are whole thousandths
_LARGEST = 100_000  # no noise multiplier is above this
_PRV_LIMIT = 50.0  # above this epsilon PRV's grid would fill the memory
_KNOTS = (1.1, 1.2, 1.3, 1.5, 1.75, *map(float, range(2, 65)), 96.0, 128.0, 256.0, 512.0)
_ORDERS = (*(x / 10 for x in range(11, 110)), *_KNOTS[14:])
"""Rényi orders that are tried."""


@dataclass(frozen=True, kw_only=True)
class SampledGaussian:
    """Steps of the Poisson-sampled Gaussian mechanism, all with the same public constants.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity, >= 0; 0 is no
            privacy at all.
        sampling_rate: Probability that a step draws a unit, 0 < rate <= 1.
        steps: How often the mechanism releases something, >= 0.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        """Check every limit."""
        sigma, rate = self.noise_multiplier, self.sampling_rate
        if not 0 <= sigma < math.inf:
            raise InvalidValue("noise_multiplier", sigma, "a number, 0 or more")
        if not 0 < rate <= 1:
            raise InvalidValue("sampling_rate", rate, "a rate above 0 and at most 1")
        if self.steps < 0:
            raise InvalidValue("steps", self.steps, "0 or more")

    def times(self, n: int) -> "SampledGaussian":
        """The event of doing this ``n`` times."""
        return SampledGaussian(
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            steps=self.steps * n,
        )


Event = SampledGaussian | SharedGaussian
"""What a mechanism released; immutable, and all that accounting ever looks at."""


def merged(events: Sequence[Event]) -> tuple[Event, ...]:
    """The same events with those of equal constants added up, sorted, none of 0 steps."""
    steps: dict[Event, int] = {}
    for event in events:
        key = replace(event, steps=0)
        steps[key] = steps.get(key, 0) + event.steps
    order = sorted(steps, key=lambda event: (type(event).__name__, astuple(event)))
    return tuple(replace(key, steps=steps[key]) for key in order if steps[key] > 0)


def epsilon(events: Sequence[Event], delta: float) -> float:
    """Upper bound of epsilon for events whose constants were fixed before the first of them.

    Args:
        events: What was or will be released, in any order.
        delta: 0 < delta < 1.

    Returns:
        Epsilon >= 0 by PRV accounting, about 0.01 above the truth; above 50, and with shared noise,
        the looser Rényi bound.

    Guarantees:
        ======================  ==============
        no events               0
        a noise multiplier of 0 inf
        ======================  ==============

    >>> step = SampledGaussian(noise_multiplier=1.0, sampling_rate=0.02, steps=100)
    >>> round(epsilon([step], delta=1e-5), 2)
    1.44
    """
    _check_delta(delta)
    return _epsilon(merged(events), delta)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise InvalidValue("delta", delta, "above 0 and below 1")


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[Event, ...], delta: float) -> float:
    if not events:
        return 0.0
    if any(event.noise_multiplier == 0 for event in events):
        return math.inf
    bound = renyi_epsilon(events, delta)
    sampled = [event for event in events if isinstance(event, SampledGaussian)]
    if bound > _PRV_LIMIT or len(sampled) < len(events):
        return bound
    accountant = PRVAccountant()
    accountant.history = [(e.noise_multiplier, e.sampling_rate, e.steps) for e in sampled]
    # ln(1 - rate) is -inf at rate 1, and exp overflows at the far ends of the grid: both are
    # limits that the formulas mean. The warnings tell that a helper bound could be tighter.
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is", UserWarning)
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        # The error is part of the result, so a small epsilon needs a small one.
        upper = accountant.get_epsilon(delta, eps_error=0.01 * min(1.0, bound))
    return min(max(0.0, float(upper)), bound)


def noise_multiplier(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier, in whole thousandths, that keeps to a target epsilon.

    Whoever computes it from the same plan gets the same number: rounding up to the grid swallows
    the last digits in which machines differ.

    Args:
        epsilon: Target, > 0; ``inf`` needs no noise.
        delta: 0 < delta < 1.
        sampling_rate: 0 < rate <= 1.
        steps: Every step that may ever be taken, >= 1.

    Returns:
        A multiplier whose :func:`epsilon` does not exceed the target.

    Raises:
        InvalidValue: A value is out of range, or no multiplier below 100000 reaches the target
            (epsilon below about 0.02).

    >>> noise_multiplier(epsilon=8.0, delta=1e-6, sampling_rate=0.02, steps=220)
    0.624
    """
    if not epsilon > 0:
        raise InvalidValue("epsilon", epsilon, "above 0, or inf for no privacy")
    _check_delta(delta)
    if steps < 1:
        raise InvalidValue("steps", steps, "1 or more")
    if math.isinf(epsilon):
        return 0.0
    return _noise_multiplier(epsilon, delta, sampling_rate, steps)


@lru_cache(maxsize=1024)
def _noise_multiplier(target: float, delta: float, rate: float, steps: int) -> float:
    def events(point: int) -> tuple[SampledGaussian]:
        sigma = point / _GRID
        return (SampledGaussian(noise_multiplier=sigma, sampling_rate=rate, steps=steps),)

    def cost(point: int) -> float:
        return epsilon(events(point), delta)

    # The Rényi bound is cheap and never below the cost: it brackets the answer from above.
    points = range(1, _LARGEST * _GRID)
    place = bisect_left(points, -target, key=lambda k: -renyi_epsilon(events(k), delta))
    if place == len(points):
        raise InvalidValue("epsilon", target, "more (no noise reaches it), or fewer steps")
    high = points[place]
    low = 3 * high // 4
    while low > 0 and cost(low) <= target:
        low, high = 3 * low // 4, low
    # From here on low costs too much and high does not.
    interpolate = True
    while high - low > 1:
        middle = _between(low, high, cost, target) if interpolate else (low + high) // 2
        low, high = (middle, high) if cost(middle) > target else (low, middle)
        interpolate = high - low > 8 and not interpolate
    return high / _GRID


def _between(low: int, high: int, cost: Callable[[int], float], target: float) -> int:
    """Where a power law through both ends meets the target, kept strictly between them."""
    left, right = cost(low), cost(high)
    share = math.log(left / target) / math.log(left / right) if low > 0 else 0.5
    return min(max(math.ceil(low + (high - low) * share), low + 1), high - 1)


def renyi_epsilon(events: Sequence[Event], delta: float) -> float:
    """Epsilon by Rényi accounting at its best order (Balle et al. 2020, arXiv 1905.09982, Thm 21).

    Looser than :func:`epsilon`, but each event may have been chosen after the earlier ones were
    seen, as long as how many there would be was not.
    """
    _check_delta(delta)
    if not merged(events):
        return 0.0
    loss = _renyi(merged(events), _ORDERS)
    return max(0.0, min(map(_conversion, _ORDERS, loss, [delta] * len(_ORDERS))))


def filter_order(first: Sequence[Event], *, epsilon: float, delta: float) -> float:
    """The Rényi order at which a first plan (with noise) fits most often below a finite cap."""
    losses = zip(_ORDERS, _renyi(merged(first), _ORDERS), strict=True)
    budgets = [
        (epsilon - _conversion(order, 0.0, delta)) / max(loss, 1e-300) for order, loss in losses
    ]
    return _ORDERS[budgets.index(max(budgets))]


def admits(
    history: Sequence[Event],
    new: Sequence[Event],
    *,
    order: float,
    epsilon: float,
    delta: float,
) -> bool:
    """Whether a Rényi filter lets new events follow a history, under a lifetime (epsilon, delta).

    Args:
        history: Everything released so far, and everything that still may be.
        new: What is to be released next; may depend on all results seen so far.
        order: Rényi order above 1, chosen before the first release and never changed: the theorem
            does not cover an order that was picked after results were seen.
        epsilon: Lifetime cap, > 0; ``inf`` admits everything.
        delta: Lifetime delta, 0 < delta < 1.

    Guarantees:
        Whoever asks before each release, and releases nothing that was not admitted, is
        (epsilon, delta)-DP, however noise, rates and steps were chosen on the way (Feldman and
        Zrnic 2021, Theorem 4.5).
    """
    if math.isinf(epsilon):
        return True
    (loss,) = _renyi(merged([*history, *new]), (order,))
    return _conversion(order, loss, delta) <= epsilon


def _renyi(events: tuple[Event, ...], orders: tuple[float, ...]) -> list[float]:
    """Total loss at each order. The moments are convex, so a chord bounds them from above."""
    if any(event.noise_multiplier == 0 for event in events):
        return [math.inf] * len(orders)
    moments = np.zeros(len(_KNOTS))
    for event in events:
        moments += event.steps * np.array(_step_moments(event))
    chords = np.interp(orders, _KNOTS, moments)
    return [float(chord) / (order - 1) for chord, order in zip(chords, orders, strict=True)]


def _step_moments(event: Event) -> tuple[float, ...]:
    """``(order - 1) * loss`` of one step at every knot."""
    if isinstance(event, SharedGaussian):
        return _shared_moments(replace(event, steps=1))
    return _log_moments(event.noise_multiplier, event.sampling_rate)


@lru_cache(maxsize=256)
def _shared_moments(step: SharedGaussian) -> tuple[float, ...]:
    """Only whole orders are proven; below 2 the chord from order 1, where the moment is 0."""
    return tuple((a - 1) * step.loss(max(2, int(a))) for a in _KNOTS)


@lru_cache(maxsize=4096)
def _log_moments(sigma: float, rate: float) -> tuple[float, ...]:
    """``(order - 1) * loss`` of one step (Mironov et al. 2019, arXiv 1908.10530, section 3.3)."""
    # Below order 2 the series converges slowly; with much noise the chord from 1 is as good.
    first = _KNOTS.index(2.0) if sigma > 4 else 0
    orders = list(_KNOTS[first:])
    losses = np.asarray(compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=orders))
    exact = [(a - 1) * max(0.0, float(loss)) for a, loss in zip(orders, losses, strict=True)]
    return (*((a - 1) * exact[0] for a in _KNOTS[:first]), *exact)


def _conversion(order: float, loss: float, delta: float) -> float:
    """Epsilon that a Rényi loss at one order stands for."""
    return loss + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
