"""Who was in the training data: membership inference by RMIA, and what its success means.

The robust attack of Zarifzadeh, Liu and Shokri 2024 (arXiv 2312.03262), offline: reference models
that have seen neither group say how easy a unit is for any model; a member is one that the target
finds easier than that, compared with many units of the population.
"""

from dataclasses import dataclass

import numpy as np

from fedward.privacy.audit_canaries import Scores, area, curve

_OFFLINE = 0.3  # their a: reference models that saw a unit would find it easier by so much


@dataclass(frozen=True, kw_only=True)
class Membership:
    """How well members are told from others.

    Args:
        auc: Chance that a member scores above a non-member; 0.5 is luck.
        deviation: Standard error of ``auc`` (Hanley and McNeil 1982).
        at_one_percent: Share of the members found at one false alarm in a hundred; 0.01 is luck.
        members: How many were attacked.
        others: How many non-members.
        roc: True positive rate at false positive rates 0, 0.01, ... 1.
    """

    auc: float
    deviation: float
    at_one_percent: float
    members: int
    others: int
    roc: tuple[float, ...]


def rmia_scores(
    target: Scores, references: Scores, *, population: Scores, reference: Scores
) -> Scores:
    """RMIA's score of each unit: how much of the population it beats.

    Args:
        target: ``(n,)`` mean loss of each unit under the attacked model.
        references: ``(models, n)`` the same under models that have not seen it.
        population: ``(z,)`` mean losses of other units under the attacked model.
        reference: ``(models, z)`` the same under the reference models.

    Returns:
        ``(n,)``, 0 to 1; their gamma is 1.
    """
    units, others = _ratio(target, references), np.sort(_ratio(population, reference))
    ranks = np.searchsorted(others, units, side="right") / len(others)
    # Ratios are below 2 / (1 - a): they only part units that beat equally many.
    scores: Scores = ranks + 1e-6 * units
    return scores


def _ratio(losses: Scores, references: Scores) -> Scores:
    """Likelihood under the target over that under a model drawn at random."""
    outside = np.exp(-references).mean(axis=0)
    ratio: Scores = np.exp(-losses) / (((1 + _OFFLINE) * outside + 1 - _OFFLINE) / 2)
    return ratio


def judge_membership(members: Scores, others: Scores) -> Membership:
    """How well scores tell ``(n,)`` members from ``(m,)`` others."""
    auc, roc = area(members, others), curve(members, others)
    alike, both = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    spread = auc * (1 - auc) + (len(members) - 1) * (alike - auc**2)
    spread += (len(others) - 1) * (both - auc**2)
    return Membership(
        auc=auc,
        deviation=float(np.sqrt(max(0.0, spread) / (len(members) * len(others)))),
        at_one_percent=roc[1],
        members=len(members),
        others=len(others),
        roc=roc,
    )
