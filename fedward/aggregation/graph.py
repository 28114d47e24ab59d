"""Who shares masks with whom, and how many shares and signatures a session needs (§3, §5).

Up to 128 sites everybody is everybody's neighbour. Above, sites stand on a ring in an order that
nobody knows before all nonces are out, and neighbours are the nearest ``k``. All figures are
computed by each site from public parameters; none is taken from the wire.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from fedward.aggregation.transcript import party
from fedward.canonical import digest
from fedward.errors import ProtocolError

COMPLETE_UP_TO = 128
_SECURITY_BITS = 80  # 40, and 40 more because coordinator and colluders can grind the ring's order
_FAILURE_BITS = 20  # a session fails for want of shares at most once in 2^20


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What a session of ``n`` sites needs.

    Args:
        quorum: ``q``: signatures in the survivor certificate.
        neighbours: ``k``: sites that each site shares masks and secrets with; n - 1 is everybody.
        threshold: ``t``: shares that give a secret back, of k + 1.
    """

    quorum: int
    neighbours: int
    threshold: int


@functools.lru_cache(maxsize=256)
def thresholds(sites: int, colluders: int, dropouts: int) -> Thresholds:
    """Derive quorum, degree and threshold.

    Args:
        sites: ``n = |U1|``.
        colluders: ``T``, 0 to n - 1.
        dropouts: ``D``: sites expected to vanish; only the ring's degree depends on it.

    Guarantees:
        Two certificates of one session share more than T signers, so some honest site would have
        signed twice, and it never does. On the ring, whoever the coordinator declares dead, no
        group of sites can be cut off from the rest without an honest site noticing, but for a
        chance of 2^-80.

    >>> thresholds(10, 3, 0)
    Thresholds(quorum=7, neighbours=9, threshold=6)
    >>> thresholds(1000, 50, 50)
    Thresholds(quorum=526, neighbours=98, threshold=79)
    """
    quorum = (sites + colluders) // 2 + 1
    ring = _ring(sites, colluders, dropouts) if sites > COMPLETE_UP_TO else None
    if ring is not None:
        return Thresholds(quorum=quorum, neighbours=ring[0], threshold=ring[1])
    threshold = max(colluders + 1, sites // 2 + 1)
    return Thresholds(quorum=quorum, neighbours=sites - 1, threshold=threshold)


def _ring(sites: int, colluders: int, dropouts: int) -> tuple[int, int] | None:
    """The smallest degree k whose threshold is safe and still reached after the dropouts.

    An isolated arc's end site sees at most k/2 neighbours inside and c colluders outside, so a
    threshold of k/2 + c + 2 makes it refuse every cut; t1 keeps a site's own neighbours from
    holding enough shares.
    """
    alive = max(0, sites - 1 - dropouts)
    for degree in range(4, sites - 1, 2):
        outside = _upper(sites - 1, colluders, degree // 2, sites << (_SECURITY_BITS + 2))
        around = _upper(sites - 1, colluders, degree, sites << (_SECURITY_BITS + 1))
        threshold = max(degree // 2 + outside + 2, around + 1)
        if _lower(sites - 1, alive, degree, sites << _FAILURE_BITS) >= threshold - 1:
            return degree, threshold
    return None


def _upper(population: int, marked: int, draws: int, odds: int) -> int:
    """Smallest t with P[X > t] ≤ 1/odds, X hypergeometric; exact integers, no float tail."""
    allowed, tail = math.comb(population, draws), 0
    for t in range(min(marked, draws), 0, -1):
        tail += math.comb(marked, t) * math.comb(population - marked, draws - t)
        if tail * odds > allowed:
            return t
    return 0


def _lower(population: int, marked: int, draws: int, odds: int) -> int:
    """Largest t with P[X < t] ≤ 1/odds, X hypergeometric."""
    allowed, tail = math.comb(population, draws), 0
    for t in range(min(marked, draws) + 1):
        tail += math.comb(marked, t) * math.comb(population - marked, draws - t)
        if tail * odds > allowed:
            return t
    return min(marked, draws)


class Graph:
    """The neighbours of every site of one session.

    Args:
        session: ``sid``, which orders the ring.
        sites: The ids of U1.
        neighbours: ``k`` of :class:`Thresholds`.
    """

    def __init__(self, session: bytes, sites: Iterable[int], neighbours: int) -> None:
        self._order = sorted(sites)
        self._complete = neighbours == len(self._order) - 1
        self._reach = neighbours // 2
        if not self._complete:
            self._order.sort(key=lambda site: digest("ring", session, party(site)))
        self._places = {site: place for place, site in enumerate(self._order)}
        self._circles: dict[int, tuple[int, ...]] = {}

    def circle(self, site: int) -> tuple[int, ...]:
        """The site and its neighbours, ordered by id: the holders of its shares.

        Raises:
            ProtocolError: The site is not in the session.
        """
        if site not in self._places:
            raise ProtocolError(f"site {site} is not in the session")
        if site not in self._circles:
            self._circles[site] = tuple(sorted(self._around(site)))
        return self._circles[site]

    def _around(self, site: int) -> Iterable[int]:
        if self._complete:
            return self._order
        place, size = self._places[site], len(self._order)
        steps = range(-self._reach, self._reach + 1)
        return (self._order[(place + step) % size] for step in steps)

    def neighbours(self, site: int) -> tuple[int, ...]:
        """The neighbours of a site, ordered by id."""
        return tuple(other for other in self.circle(site) if other != site)

    def point(self, dealer: int, holder: int) -> int:
        """``x`` of a holder's share: 1 + its rank among the dealer and the dealer's neighbours.

        Every receiver computes it; a point taken from the wire would let a dealer give two
        holders the same one.

        Raises:
            ProtocolError: The holder is not the dealer or one of its neighbours.
        """
        circle = self.circle(dealer)
        if holder not in circle:
            raise ProtocolError(f"site {holder} holds no share of site {dealer}")
        return circle.index(holder) + 1
