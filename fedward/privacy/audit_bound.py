"""Layer B of the audit: an epsilon that an attack on released numbers proves to be exceeded.

An attacker who knows everything but whether one unit is there looks at one release and guesses.
How often such guesses are wrong bounds epsilon from below, at a confidence that is chosen before
(Jagielski et al. 2020, arXiv 2006.07709; Nasr et al. 2023, arXiv 2302.07956). It can refute a
claim; it proves no privacy.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import optimize, stats  # type: ignore[import-untyped]  # no py.typed

from fedward.errors import InvalidValue
from fedward.privacy.accounting import epsilon
from fedward.privacy.audit_sensitivity import Neighbours, difference, releases
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism

Scores = npt.NDArray[np.float64]

_CALL = 100  # steps of one call: a site trains in rounds, each with a stream of its own
_LEARNED = 4  # one release in so many chooses how to attack
_FEWEST = 40

REFUTING = 0.999
"""Least confidence at which a bound refutes a claim: a good bound lies so close below it that at
95 % one right engine in twenty would be refuted."""


@dataclass(frozen=True, kw_only=True)
class ReleaseBound:
    """What an attack on single steps found.

    Args:
        claim: Epsilon that the accountant claims for one step.
        lower: Epsilon that one step has at least, at the confidence; see :func:`lower_bound`.
        surely: The same at :data:`REFUTING` or more; it alone refutes the claim.
        sampling_rate: Rate at which the units were drawn.
        others: Units beside the one that made the difference.
        releases: Steps of each of the two neighbours.
        repeated: Steps whose numbers were, to the last bit, those of another step. Noise that comes
            twice can be subtracted, so one is too many.
    """

    claim: float
    lower: float
    surely: float
    sampling_rate: float
    others: int
    releases: int
    repeated: int

    @property
    def holds(self) -> bool:
        """Whether nothing contradicts the claim."""
        return self.surely <= self.claim and self.repeated == 0


def attack_releases(
    pair: Neighbours,
    mechanism: Mechanism,
    *,
    delta: float,
    confidence: float,
    count: int = 2000,
    stream: SecureStream | None = None,
) -> ReleaseBound:
    """Attack many steps with and without one unit.

    Args:
        pair: The neighbours. Below a rate of 1 best without other units, whose draws would blur
            the attack.
        mechanism: With noise.
        delta: The delta of claim and bound.
        confidence: Probability that the bound holds, above 0.5 and below 1.
        count: Steps of each neighbour, at least 40.
        stream: Source of all draws and noise; left out, the operating system.

    Raises:
        InvalidValue: There is no noise, or the confidence or the count is out of range.
    """
    if mechanism.noise_multiplier == 0:
        raise InvalidValue("noise_multiplier", 0.0, "above 0: without noise nothing is claimed")
    stream = stream or SecureStream()
    without, moved = difference(pair, mechanism)
    present, absent = (
        _many(pair, mechanism, canary=canary, count=count, stream=stream)
        for canary in (True, False)
    )
    attacks = [
        _scores(rows.double() * mechanism.normaliser / mechanism.clip, without, moved)
        for rows in (present, absent)
    ]
    rate = mechanism.sampling_rate
    lower, surely = (
        lower_bound(*attacks, delta=delta, confidence=level, rate=rate)
        for level in (confidence, max(confidence, REFUTING))
    )
    return ReleaseBound(
        claim=epsilon([mechanism.event(1)], delta),
        lower=lower,
        surely=surely,
        sampling_rate=rate,
        others=len(pair.units),
        releases=count,
        repeated=sum(len(rows) - len(np.unique(rows, axis=0)) for rows in (present, absent)),
    )


def _many(
    pair: Neighbours, mechanism: Mechanism, *, canary: bool, count: int, stream: SecureStream
) -> torch.Tensor:
    """Releases of many steps, ``(count, d)``."""
    rows = []
    for start in range(0, count, _CALL):
        own = stream.child("with" if canary else "without", str(start))
        steps = min(_CALL, count - start)
        rows.append(releases(pair, mechanism, canary=canary, steps=steps, stream=own))
    return torch.cat(rows)


def _scores(rows: torch.Tensor, without: torch.Tensor, moved: torch.Tensor) -> Scores:
    """Three ways to guess from each step, ``(3, steps)``: higher means that the unit is there.

    How far it lies in the direction in which the unit moves the sum: the likelihood ratio grows
    with it, whatever the rate. And how far it lies from the sum without the unit in any direction,
    both ways, which shows where the amount of noise depends on who is there. Where one of the
    neighbours releases nothing, only whether there is a release.
    """
    if not bool(moved.isfinite().all()):
        there = rows.isfinite().all(1).double().numpy()
        return np.stack([there, -there])
    along = (rows - without) @ moved
    away = (rows - without).square().sum(1)
    scores: Scores = np.nan_to_num(torch.stack([along, away, -away]).numpy(), nan=-math.inf)
    return scores


def lower_bound(
    present: Scores, absent: Scores, *, delta: float, confidence: float, rate: float | None = None
) -> float:
    """A lower bound of epsilon from an attacker's scores.

    A quarter of the scores chooses attack, threshold and formula; the rest alone, which the choice
    has not seen, gives the error rates, bounded by Clopper and Pearson (1934).

    Args:
        present: ``(attacks, n)`` scores with the unit; higher means more likely there.
        absent: ``(attacks, n)`` scores without it, as many: one route takes both error rates
            together, and whoever always guesses the larger side would seem to know something.
        delta: 0 < delta < 1.
        confidence: Probability that the bound holds, above 0.5 and below 1.
        rate: The sampling rate, where the claim is that of one step of the sampled Gaussian. The
            bound may then also be the epsilon of that mechanism with as little noise as the attack
            needs to succeed. That refutes the claim as well, at errors that are far from rare; but
            where another bug than missing noise helped the attack, epsilon itself may be less.

    Returns:
        Epsilon >= 0; ``inf`` where no noise at all would explain the attack at this rate.

    Raises:
        InvalidValue: Confidence or number of scores is out of range, or the numbers differ.
    """
    if not 0.5 < confidence < 1:
        raise InvalidValue("confidence", confidence, "above 0.5 and below 1")
    if (fewest := min(present.shape[-1], absent.shape[-1])) < _FEWEST:
        raise InvalidValue("count", fewest, f"at least {_FEWEST}")
    if present.shape != absent.shape:  # the mean error rate would lean to the larger side
        raise InvalidValue("count", absent.shape[-1], f"as many with the unit: {present.shape[-1]}")

    def bounds(sides: tuple[Scores, Scores], thresholds: Scores) -> Scores:
        """Epsilon by each route at each threshold, ``(routes, thresholds)``."""
        missed, below = (np.searchsorted(np.sort(side), thresholds) for side in sides)
        return _routes(
            (missed, len(sides[0])),
            (len(sides[1]) - below, len(sides[1])),
            delta=delta,
            error=1 - confidence,
            rate=rate,
        )

    best, lower = -1.0, 0.0
    for sides in zip(present, absent, strict=True):
        learned, kept = sides[0][::_LEARNED], sides[1][::_LEARNED]
        thresholds = np.unique(np.concatenate([learned, kept]))
        table = bounds((learned, kept), thresholds)
        if table.max() > best:
            best = float(table.max())
            route, place = np.unravel_index(int(table.argmax()), table.shape)
            rest = [np.delete(side, np.s_[::_LEARNED]) for side in sides]
            lower = float(bounds((rest[0], rest[1]), thresholds[[place]])[route, 0])
    return max(0.0, lower)


def upper_limit(hits: npt.ArrayLike, trials: int, error: float) -> Scores:
    """Clopper and Pearson's upper limit of a probability that showed ``hits`` times."""
    hits = np.asarray(hits, dtype=np.float64)
    limit = stats.beta.ppf(1 - error, hits + 1, np.maximum(trials - hits, 1))
    return np.where(hits >= trials, 1.0, limit)


def _routes(
    missed: tuple[npt.ArrayLike, int],
    alarms: tuple[npt.ArrayLike, int],
    *,
    delta: float,
    error: float,
    rate: float | None,
) -> Scores:
    """Epsilon from wrong guesses and trials of both kinds, each route at the whole error.

    The first two follow from the definition, with half of the error for each rate. The third takes
    all guesses together: their mean error rate is at least ``(1 - delta) / (1 + e^epsilon)``, and
    a sum over two rates spreads less than a binomial of their mean (Hoeffding 1956). The fourth
    compares that rate with the total variation of the sampled Gaussian.
    """
    miss, alarm = (upper_limit(hits, trials, error / 2) for hits, trials in (missed, alarms))
    hits = np.asarray(missed[0]) + np.asarray(alarms[0])
    wrong = upper_limit(hits, missed[1] + alarms[1], error)
    with np.errstate(divide="ignore"):
        routes = [
            np.log(np.maximum(1 - delta - miss, 0) / alarm),
            np.log(np.maximum(1 - delta - alarm, 0) / miss),
            np.log(np.maximum((1 - delta) / wrong - 1, 0)),
        ]
    if rate is not None:  # it grows as the errors fall, so only the least of them matters
        best, route = int(np.argmin(wrong)), np.zeros(len(wrong))
        route[best] = _sampled(1 - 2 * float(wrong[best]), rate, delta)
        routes.append(route)
    return np.stack(routes)


def _sampled(variation: float, rate: float, delta: float) -> float:
    """Epsilon of one step of the sampled Gaussian whose worlds lie so far apart."""
    if variation >= rate:
        return math.inf
    mu = 2 * float(stats.norm.ppf((1 + max(variation, 0.0) / rate) / 2))
    return math.log1p(rate * math.expm1(gaussian_epsilon(mu, delta / rate)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism whose sensitivity over deviation is ``mu``.

    Balle and Wang 2018 (arXiv 1805.06530), Theorem 8; 0 where ``mu`` is not above 0.

    >>> round(gaussian_epsilon(0.5, 1e-5), 2)
    1.99
    """
    if not mu > 0:
        return 0.0

    def excess(epsilon: float) -> float:
        tail = stats.norm.logcdf(-epsilon / mu - mu / 2)
        return float(stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + tail) - delta)

    if excess(0.0) <= 0:
        return 0.0
    root: Any = optimize.brentq(excess, 0.0, mu * mu / 2 + 40 * mu)
    return float(root)
