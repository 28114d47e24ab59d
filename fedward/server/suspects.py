"""Who stays away from an attempt, by what the run's attempts have shown of its sites.

Some failures prove a site at fault. Others show a group that holds at least one liar: the two of a
complaint that cannot be decided, or the cohort of a sum that is too long. Nobody of such a group is
put out; half of it stays away, the other half in the next round, so that a lie costs the liar what
it costs each of the others. What all groups together prove ends that (dispute control:
Beerliová-Trubíniová and Hirt 2006). A site for want of which an attempt ended stays away too.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedward.aggregation.packing import SumTooLong
from fedward.aggregation.transcript import SiteFault
from fedward.canonical import Json

Group = frozenset[int]
"""Sites of which at least one is corrupt; alone, a site is proven at fault."""

_STRIKES = 2  # attempts that a site may end by its silence before it stays away for the run


def proven(groups: Collection[Group], colluders: int) -> Group:
    """The sites that are corrupt, whoever else is.

    Args:
        groups: Of the whole run.
        colluders: ``T``. A group shows that somebody lies, so 0 counts as 1.

    Guarantees:
        No honest site is in it while at most ``max(1, T)`` sites are corrupt: the others of its
        pairs are, and a single liar is in every group.

    >>> pairs = [frozenset({1, 2}), frozenset({2, 3}), frozenset({2, 4})]
    >>> sorted(proven(pairs[:2], 1)), sorted(proven(pairs[:2], 2)), sorted(proven(pairs, 2))
    ([2], [], [2])
    """
    allowed = max(1, colluders)
    certain = [group for group in groups if len(group) == 1]
    if allowed == 1 and groups and len(common := frozenset.intersection(*groups)) == 1:
        certain.append(common)
    disputed = Counter(s for pair in set(groups) if len(pair) == 2 for s in pair)
    certain.append(frozenset(s for s, others in disputed.items() if others > allowed))
    return frozenset().union(*certain)


def blame(
    complaints: Iterable[Group], silent: Collection[int], error: Exception | None
) -> dict[str, Json]:
    """What an attempt shows of its sites, for its event; :meth:`Record.after` reads it.

    Args:
        complaints: The suspects of each complaint.
        silent: Who did not answer in the last exchange.
        error: What ended the attempt; None if it was committed.
    """
    groups, quiet = {tuple(sorted(group)) for group in complaints}, list[int]()
    if isinstance(error, SiteFault):
        groups.add((error.site,))
    elif isinstance(error, SumTooLong):
        groups.add(error.cohort)
    elif error is not None:
        quiet = sorted(silent)
    found: dict[str, Json] = {"suspects": sorted(groups), "silent": quiet}
    return {key: value for key, value in found.items() if value}


def joined(found: Iterable[Mapping[str, Any]]) -> dict[str, Json]:
    """What several of :func:`blame` show together: of a round whose groups have sessions each."""
    suspects, silent = set[tuple[int, ...]](), set[int]()
    for each in found:
        suspects |= set(each.get("suspects", ()))
        silent |= set(each.get("silent", ()))
    both: dict[str, Json] = {"suspects": sorted(suspects), "silent": sorted(silent)}
    return {key: value for key, value in both.items() if value}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the attempts of a run have shown so far.

    Args:
        groups: Every group of suspects, oldest first.
        silent: Round and site of every silence that ended an attempt.
    """

    groups: tuple[Group, ...] = ()
    silent: tuple[tuple[int, int], ...] = ()

    def after(self, number: int, facts: Mapping[str, Any]) -> "Record":
        """The record after an attempt at round ``number`` with these facts of its event."""
        return Record(
            groups=(*self.groups, *map(frozenset, facts.get("suspects", ()))),
            silent=(*self.silent, *((number, site) for site in facts.get("silent", ()))),
        )

    def away(
        self, sites: Collection[int], *, minimum: int, colluders: int, number: int
    ) -> frozenset[int]:
        """Who is asked last in the next attempt at a round, beside the proven who are not asked.

        As far as the minimum stays without them: half of each group of suspects, and those whose
        silence ended an attempt at this round, or two of the run.

        Args:
            sites: All that could be asked.
            minimum: Fewest sites in a sum.
            colluders: ``T``.
            number: The round's; suspects take turns by it.
        """
        liars = proven(self.groups, colluders)
        out, open_groups = set(liars), [group for group in self.groups if group.isdisjoint(liars)]
        if colluders <= 1 and open_groups:  # the one liar is in all of them
            open_groups = [frozenset.intersection(*open_groups) or open_groups[-1]]
        for group in reversed(open_groups):
            if group.isdisjoint(out):
                out |= _turn(sorted(group), number, len(set(sites) - out) - minimum)
        strikes = Counter(site for _, site in self.silent)
        now = {site for number_, site in self.silent if number_ == number}
        for site, times in strikes.most_common():
            if (site in now or times >= _STRIKES) and len(set(sites) - out) > minimum:
                out.add(site)
        return frozenset(out) - liars


def _turn(group: Sequence[int], number: int, seats: int) -> set[int]:
    """The half of a group, or as many as there are seats, whose turn it is to stay away."""
    size = min((len(group) + 1) // 2, max(seats, 0))
    return {group[(number * size + place) % len(group)] for place in range(size)}
