"""Layer C of the audit: canaries in one run of the whole training.

Many canaries, each in the training data with probability 1/2, are told apart after one single run.
How many of the surest guesses are right bounds epsilon from below (Steinke, Nasr and Jagielski
2023, arXiv 2305.08846). Unlike the other layers it attacks everything at once: sampling, optimizer,
rounds.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats  # type: ignore[import-untyped]  # no py.typed

from fedward.errors import InvalidValue
from fedward.privacy.audit_bound import REFUTING

Scores = npt.NDArray[np.float64]
Included = npt.NDArray[np.bool_]

_SHARES = (0.1, 0.3, 0.8)
"""Shares of the canaries that are guessed, fixed before anything is seen: few sure guesses show a
large epsilon, many unsure ones a small."""

CHANCE_EXPOSURE = 1 / math.log(2)
"""Mean exposure in bits of canaries that nobody has seen."""


@dataclass(frozen=True, kw_only=True)
class CanaryBound:
    """What canaries in one run showed.

    Args:
        claim: Epsilon that the accountant claims for the run.
        lower: Epsilon that the run has at least, at the confidence.
        surely: The same at :data:`REFUTING` or more; it alone refutes the claim.
        canaries: How many there were, in or out.
        included: How many were in.
        guesses: How many were guessed for ``lower``.
        right: How many of these guesses were right.
        auc: Chance that a canary that was in scores higher than one that was not; 0.5 is luck.
        exposure: Mean exposure of those that were in, in bits (Carlini et al. 2019, arXiv
            1802.08232): by how much the run narrows the search for one. 1.44 is luck.
        most_exposure: The most that so many canaries could show.
        roc: True positive rate at false positive rates 0, 0.01, ... 1.
    """

    claim: float
    lower: float
    surely: float
    canaries: int
    included: int
    guesses: int
    right: int
    auc: float
    exposure: float
    most_exposure: float
    roc: tuple[float, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing contradicts the claim."""
        return self.surely <= self.claim


def judge_canaries(
    scores: Scores, included: Included, *, claim: float, delta: float, confidence: float
) -> CanaryBound:
    """Guess which canaries a run saw, and bound its epsilon.

    Args:
        scores: ``(m,)`` one for each canary; higher means more likely in.
        included: ``(m,)`` whether it was, by independent fair coins that decided nothing else.
        claim: Epsilon of the run, at ``delta``.
        delta: 0 <= delta < 1.
        confidence: Probability that the bound holds, above 0.5 and below 1.

    Raises:
        InvalidValue: Confidence out of range, or fewer than 20 canaries, or none in or none out.
    """
    count = len(scores)
    if count < 20 or included.all() or not included.any():
        raise InvalidValue("canaries", count, "at least 20, some in and some out")
    order = np.argsort(scores, kind="stable")
    levels = [  # each share is a test of its own
        1 - (1 - level) / len(_SHARES) for level in (confidence, max(confidence, REFUTING))
    ]
    tests: list[tuple[float, float, int, int]] = []
    for share in _SHARES:
        half = round(share * count / 2)
        right = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
        lower, surely = (
            one_run_bound(count, 2 * half, right, delta=delta, confidence=each) for each in levels
        )
        tests.append((lower, surely, 2 * half, right))
    lower, _, guesses, right = max(tests)
    return CanaryBound(
        claim=claim,
        lower=lower,
        surely=max(surely for _, surely, _, _ in tests),
        canaries=count,
        included=int(included.sum()),
        guesses=guesses,
        right=right,
        auc=area(scores[included], scores[~included]),
        exposure=exposure(scores[included], scores[~included]),
        most_exposure=math.log2(1 + int((~included).sum())),
        roc=curve(scores[included], scores[~included]),
    )


def one_run_bound(
    canaries: int, guesses: int, right: int, *, delta: float, confidence: float
) -> float:
    """Epsilon that so many right guesses prove, by Theorem 5.2 of Steinke et al. 2023.

    Args:
        canaries: How many were in or out by a coin.
        guesses: How many of them were guessed, fixed before, at most ``canaries``.
        right: Right guesses.
        delta: 0 <= delta < 1.
        confidence: Probability that the bound holds, above 0.5 and below 1.

    >>> round(one_run_bound(400, 200, 200, delta=0.0, confidence=0.95), 2)
    4.19
    """
    if not 0.5 < confidence < 1:
        raise InvalidValue("confidence", confidence, "above 0.5 and below 1")
    if not 0 <= right <= guesses <= canaries:
        raise InvalidValue("right", right, f"0 to {guesses} guesses of {canaries} canaries")

    def excess(epsilon: float) -> float:
        return _chance(canaries, guesses, right, epsilon, delta) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    root: Any = optimize.brentq(excess, 0.0, 50.0, xtol=1e-6)
    return float(root)


def _chance(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Most probability of so many right guesses under (epsilon, delta).

    Without delta, right guesses are dominated by a binomial with ``e^epsilon / (e^epsilon + 1)``.
    Delta adds at most ``2 * canaries * delta`` times the largest mean chance, over i, of lacking 1
    to i right guesses.
    """
    law: Any = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    chance = float(law.sf(right - 1))
    if delta > 0 and right > 0:
        lacking = np.cumsum(law.pmf(np.arange(right - 1, -1, -1))) / np.arange(1, right + 1)
        chance += 2 * canaries * delta * float(lacking.max())
    return min(1.0, chance)


def area(positive: Scores, negative: Scores) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties half."""
    order = np.sort(negative)
    below = np.searchsorted(order, positive, "left") + np.searchsorted(order, positive, "right")
    return float(below.mean() / (2 * len(negative)))


def curve(positive: Scores, negative: Scores) -> tuple[float, ...]:
    """True positive rates at most false positive rates 0, 0.01, ... 1."""
    order = np.sort(negative)[::-1]
    rates = []
    for percent in range(101):
        allowed = percent * len(order) // 100
        threshold = order[allowed] if allowed < len(order) else -math.inf
        rates.append(float((positive > threshold).mean()))
    return tuple(rates)


def exposure(positive: Scores, negative: Scores) -> float:
    """Mean of ``log2(m + 1) - log2(rank)`` of each positive among the ``m`` negatives."""
    order = np.sort(negative)
    ranks = 1 + len(order) - np.searchsorted(order, positive, "left")
    return float((math.log2(len(order) + 1) - np.log2(ranks)).mean())
