"""What a step costs whose noise is the sum of the sites' discrete shares (``pooled`` mode).

Nobody holds the whole noise: each site adds a share before its input is masked, and the guarantee
rests on the shares that neither colluders know nor dropouts took away. The noise is discrete and
its sum only nearly a discrete Gaussian, so numerical composition (PRV, PLD) is not licensed. Rényi
moments at integer orders are: ``docs/distributed-noise.md`` derives each formula used here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fedward.errors import InvalidValue

LEAST_SIGMA = 4.0
"""Least deviation of one share, in grid steps; below, a sum of shares is no discrete Gaussian."""

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)
"""Rényi orders that are tried; integers, because only there the expansion is exact."""

COARSEST = 0.01
"""Widest grid step, as a share of clip / sqrt(dimension): rounding then adds at most so much to the
sensitivity."""


def share_of(sigma: float, *, minimum: int, colluders: int) -> float:
    """The deviation of one site's share, so that those nobody knows add up to sigma.

    Args:
        sigma: Deviation of the noise that must cover the sum, in any unit, > 0.
        minimum: ``U_min``: fewest sites in the sum.
        colluders: ``T``: sites that tell the coordinator their share; below the minimum.

    Guarantees:
        The sum over any ``minimum`` sites or more, less the shares of any ``colluders`` of them,
        keeps a variance of at least sigma^2.

    >>> share_of(6.0, minimum=5, colluders=1)
    3.0
    """
    if not 0 <= colluders < minimum:
        raise InvalidValue(
            "colluders", colluders, f"0 to {minimum - 1} with a minimum of {minimum}"
        )
    if not 0 < sigma < math.inf:
        raise InvalidValue("sigma", sigma, "a number above 0")
    return sigma / math.sqrt(minimum - colluders)


@dataclass(frozen=True, kw_only=True)
class SharedGaussian:
    """Steps of the Poisson-sampled mechanism with shared discrete noise.

    Args:
        clip: L2 bound ``C`` of one unit's part in a site's sum, > 0.
        grid_step: ``gamma``, in the unit of ``clip``; at most 0.01 · clip / sqrt(dimension), and
            the sum is rounded once.
        dimension: Coordinates ``d``, 1 or more.
        share: Deviation of one site's share, in the unit of ``clip``; at least 4 grid steps.
        shares: Shares that the adversary does not know: minimum less colluders, 1 or more. One
            share gives what a site's own noise is worth alone.
        sampling_rate: Probability that a step draws a unit, 0 < rate <= 1.
        steps: Sums that are released, 0 or more.
    """

    clip: float
    grid_step: float
    dimension: int
    share: float
    shares: int
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        """Check every limit."""
        coarsest = COARSEST * self.clip / math.sqrt(max(1, self.dimension))
        least = LEAST_SIGMA * self.grid_step
        checks: tuple[tuple[str, float, bool, str], ...] = (
            ("clip", self.clip, 0 < self.clip < math.inf, "a number above 0"),
            ("dimension", self.dimension, self.dimension >= 1, "1 or more"),
            ("grid_step", self.grid_step, 0 < self.grid_step <= coarsest, f"up to {coarsest:.3g}"),
            ("share", self.share, least <= self.share < math.inf, f"at least {least:.3g}"),
            ("shares", self.shares, self.shares >= 1, "1 or more"),
            ("sampling_rate", self.sampling_rate, 0 < self.sampling_rate <= 1, "0 < rate <= 1"),
            ("steps", self.steps, self.steps >= 0, "0 or more"),
        )
        for key, value, holds, allowed in checks:
            if not holds:
                raise InvalidValue(key, value, allowed)

    def times(self, n: int) -> "SharedGaussian":
        """The event of doing this ``n`` times."""
        return replace(self, steps=self.steps * n)

    @property
    def sensitivity(self) -> float:
        """``C + gamma sqrt(d)``: how far one unit moves a sum that is rounded at random."""
        return self.clip + self.grid_step * math.sqrt(self.dimension)

    @property
    def noise_multiplier(self) -> float:
        """Deviation of the noise nobody knows, over the sensitivity."""
        return math.sqrt(self.shares) * self.share / self.sensitivity

    @cached_property
    def slack(self) -> float:
        """How far the log of the shares' density is from a discrete Gaussian's, all coordinates."""
        exponent = -2 * math.pi**2 * (self.share / self.grid_step) ** 2
        terms = (math.exp(exponent * k / (k + 1)) for k in range(1, self.shares))
        return 5 * self.dimension * math.fsum(terms)

    @property
    def zcdp(self) -> tuple[float, float]:
        """(rho, xi) of one step without sampling: loss <= order · rho + xi from order 2 on."""
        return 0.5 / self.noise_multiplier**2, 3 * self.slack

    def loss(self, order: int) -> float:
        """Rényi loss of all steps at an integer order, both directions, 2 or more.

        The expansion of Mironov, Talwar and Zhang (2019, arXiv 1908.10530, section 3.3), whose
        terms are exact for a discrete Gaussian and an integer shift.
        """
        terms = [self._log_term(order, j) for j in range(order + 1)]
        highest = max(terms)
        moment = highest + math.log(math.fsum(math.exp(term - highest) for term in terms))
        return self.steps * max(0.0, moment) / (order - 1)

    def _log_term(self, order: int, j: int) -> float:
        q = self.sampling_rate
        if q == 1 and j < order:
            return -math.inf
        log_q = j * math.log(q) + ((order - j) * math.log1p(-q) if j < order else 0.0)
        gaussian = 0.5 * j * (j - 1) / self.noise_multiplier**2
        return math.log(math.comb(order, j)) + log_q + gaussian + (2 * j - 1) * self.slack * (j > 1)


def epsilon(events: Sequence[SharedGaussian], delta: float) -> float:
    """Upper bound of epsilon at the best order (Balle et al. 2020, arXiv 1905.09982, Thm 21).

    Args:
        events: What was or will be released; how many there are was fixed in advance.
        delta: 0 < delta < 1.

    >>> step = SharedGaussian(
    ...     clip=1.0, grid_step=1e-7, dimension=1, share=1.0, shares=4, sampling_rate=0.2, steps=100
    ... )
    >>> round(epsilon([step], delta=1e-5), 2)
    5.56
    """
    if not 0 < delta < 1:
        raise InvalidValue("delta", delta, "above 0 and below 1")
    if not any(event.steps for event in events):
        return 0.0
    return max(0.0, min(_converted(order, events, delta) for order in ORDERS))


def _converted(order: int, events: Sequence[SharedGaussian], delta: float) -> float:
    loss = math.fsum(event.loss(order) for event in events)
    return loss + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
