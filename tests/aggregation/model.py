"""A symbolic model of ``secagg/1`` on the complete graph: every choice of an active coordinator.

Cryptography is perfect, sites follow the specification, corrupt sites sign and reveal everything.
The coordinator chooses for each honest site, independently of the others, whether it is brought to
complain of an envelope, or else which U2 it is shown, which survivor set it is asked to sign, and
whether it gets a certificate; it keeps every upload, late ones too. Its knowledge only grows and a
site's answers depend only on what it was itself shown, so runs may be reordered by exchange and all
releases given at once: enumerating the choices covers every interleaving.
``docs/secagg-model/README.md`` explains what is found.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from fedward.aggregation.graph import Thresholds, thresholds

Sites = frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """A session of n sites, and which of the specification's checks are in force.

    ``corrupt`` sites have the highest ids; the others are honest. ``colluders`` is the T that the
    sites computed their thresholds for.
    """

    sites: int
    colluders: int
    corrupt: int
    minimum: int
    need: Thresholds
    signed_hellos: bool = True
    signed_envelopes: bool = True
    one_vote: bool = True
    one_kind: bool = True
    self_mask: bool = True
    own_in_survivors: bool = True
    size_checked: bool = True

    @property
    def everybody(self) -> Sites:
        return frozenset(range(self.sites))

    @property
    def honest(self) -> Sites:
        return frozenset(range(self.sites - self.corrupt))


def rules(sites: int, colluders: int, minimum: int | None = None) -> Rules:
    """What the specification derives, with as many corrupt sites as it allows for."""
    return Rules(
        sites=sites,
        colluders=colluders,
        corrupt=colluders,
        minimum=max(3, colluders + 2) if minimum is None else minimum,
        need=thresholds(sites, colluders, 0),
    )


@dataclass(frozen=True, kw_only=True)
class Survivors:
    """What a vote signs: u2, U3, and which of its two inputs each corrupt survivor signed."""

    u2: Sites
    u3: Sites
    variant: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """The coordinator's choices for each honest site.

    Whose envelope it complains of and ends; for the others, the U2 shown and what each signed.
    """

    complained: Mapping[int, int]
    shown: Mapping[int, Sites]
    signed: Mapping[int, tuple[Survivors, ...]]


CORRUPT = -1  # the dealer of an envelope whose key the coordinator knows anyway

View = Sites | int
"""What a site is shown in R2: a cohort, or a bad envelope of this dealer."""


def subsets(sites: Sites, least: int) -> Iterator[Sites]:
    for size in range(least, len(sites) + 1):
        yield from map(frozenset, itertools.combinations(sorted(sites), size))


def least_size(r: Rules) -> int:
    return max(r.need.quorum, r.minimum) if r.size_checked else 1


def acceptable(r: Rules, site: int, shown: Mapping[int, Sites]) -> list[Survivors]:
    """Survivor sets whose headers verify at a site: honest ones signed them under the same u2."""
    u2 = shown[site]
    same = frozenset(j for j in u2 if j not in r.honest or shown.get(j) == u2)
    return [
        Survivors(u2=u2, u3=u3, variant=variant)
        for u3 in subsets(same, least_size(r))
        if site in u3 or not r.own_in_survivors
        for variant in ((0, 1) if u3 - r.honest else (0,))
    ]


def ballots(r: Rules, options: list[Survivors]) -> list[tuple[Survivors, ...]]:
    """What one site may have signed: one set, or any two where nothing remembers the first."""
    once = [(), *((option,) for option in options)]
    return once if r.one_vote else [*once, *itertools.combinations(options, 2)]


def runs(r: Rules) -> Iterator[Run]:
    """Every choice, up to renaming honest sites that were shown the same."""
    views = {site: list(shown_to(r, site)) for site in r.honest}
    order = sorted(r.honest)
    seen = set[frozenset[tuple[View, ...]]]()
    for choice in itertools.product(*(views[site] for site in order)):
        key = frozenset(renamed(r, choice))
        if key in seen:
            continue
        seen.add(key)
        pairs = list(zip(order, choice, strict=True))
        complained = {site: view for site, view in pairs if isinstance(view, int)}
        shown = {site: view for site, view in pairs if not isinstance(view, int)}
        options = [ballots(r, acceptable(r, site, shown)) for site in shown]
        for signed in itertools.product(*options):
            by_site = dict(zip(shown, signed, strict=True))
            yield Run(complained=complained, shown=shown, signed=by_site)


def shown_to(r: Rules, site: int) -> Iterator[View]:
    """Cohorts with the site, or an envelope that it complains of.

    An envelope changed on the way carries no signature: a site that checks tells no key of it.
    """
    yield from (u2 for u2 in subsets(r.everybody, least_size(r)) if site in u2)
    yield CORRUPT
    if not r.signed_envelopes:
        yield from r.honest - {site}


def renamed(r: Rules, choice: tuple[View, ...]) -> Iterator[tuple[View, ...]]:
    """A choice of views under every renaming of the honest sites."""
    for new in itertools.permutations(range(len(choice))):
        views: list[View] = [CORRUPT] * len(choice)
        for site, view in enumerate(choice):
            if isinstance(view, int):
                views[new[site]] = view if view == CORRUPT else new[view]
            else:
                views[new[site]] = frozenset(new[j] if j < len(choice) else j for j in view)
        yield tuple(views)


def certified(r: Rules, run: Run) -> set[Survivors]:
    """The survivor sets with a certificate: honest votes, and those of corrupt survivors."""
    votes: dict[Survivors, set[int]] = {}
    for site, signed in run.signed.items():
        for survivors in signed:
            votes.setdefault(survivors, set(survivors.u3 - r.honest)).add(site)
    return {s for s, by in votes.items() if len(by & s.u3) >= r.need.quorum}


def known_secrets(r: Rules, run: Run) -> tuple[Sites, Sites]:
    """The honest sites whose seed b, and whose mask key s, the coordinator can put together."""
    corrupt = r.everybody - r.honest
    holders = {(kind, site): set(corrupt) for kind in "bs" for site in r.honest}
    good = certified(r, run)
    for holder, dealer in run.complained.items():  # the key of one envelope opens both shares in it
        if dealer != CORRUPT:
            holders["b", dealer].add(holder)
            holders["s", dealer].add(holder)
    for holder, signed in run.signed.items():
        for survivors in set(signed) & good:
            for dealer in survivors.u2 & r.honest:
                holders["b" if dealer in survivors.u3 else "s", dealer].add(holder)
        if not r.one_kind:  # the request names who is alive and who is dead, and may name both
            for dealer in run.shown[holder] & r.honest:
                holders["b", dealer].add(holder)
                holders["s", dealer].add(holder)
    seeds, keys = (
        frozenset(s for s in r.honest if len(holders[kind, s]) >= r.need.threshold) for kind in "bs"
    )
    return (seeds if r.self_mask else r.honest), keys


def readable(r: Rules, run: Run) -> list[Sites]:
    """The smallest sets of honest sites whose inputs the coordinator can sum up.

    An unknown mask between two honest sites joins them: it cancels in their sum. One without its
    counterpart, or an unknown self mask, covers the whole group.
    """
    seeds, keys = known_secrets(r, run)
    joined = {site: {site} for site in run.shown}
    covered = set(run.shown) - seeds
    for one, other in itertools.product(run.shown, r.honest):
        if one == other or other not in run.shown[one]:
            continue
        if one in keys or other in keys or not r.signed_hellos:
            continue
        if run.shown.get(other) != run.shown[one]:
            covered.add(one)
        elif joined[one] is not joined[other]:
            joined[one] |= joined[other]
            for site in joined[one]:
                joined[site] = joined[one]
    groups = {frozenset(group) for group in joined.values()}
    return sorted((g for g in groups if not g & covered), key=sorted)


PROPERTIES = ("agreement", "secrecy", "privacy")


def broken(r: Rules, run: Run) -> frozenset[str]:
    """Which properties a run violates.

    *agreement*: at most one survivor set is certified. *secrecy*: nothing can be read but the sum
    of a certified set. *privacy*: no single site's input can be read.
    """
    good, found = certified(r, run), readable(r, run)
    allowed = [s.u3 & r.honest for s in good]
    checks = {
        "agreement": len(good) <= 1,
        "secrecy": all(group in allowed for group in found),
        "privacy": all(len(group) > 1 for group in found),
    }
    return frozenset(name for name, holds in checks.items() if not holds)


def explore(r: Rules) -> tuple[int, dict[str, Run]]:
    """How many runs there are, and the first that breaks each property."""
    count, found = 0, dict[str, Run]()
    for run in runs(r):
        count += 1
        for name in broken(r, run):
            found.setdefault(name, run)
        if len(found) == len(PROPERTIES):
            break
    return count, found


def cases() -> dict[str, Rules]:
    """The specification, and the specification less one check each."""
    four, five, honest = rules(4, 1), rules(5, 1), rules(4, 0)
    majority = replace(five.need, quorum=3)
    return {
        **{f"as specified, n = {n}, T = {t}": rules(n, t) for n, t in WHOLE},
        "without the own id in U3": replace(four, own_in_survivors=False),
        "without the size of U2 and U3": replace(four, size_checked=False),
        "quorum of a majority, not (n + T) / 2": replace(five, need=majority),
        "a second survivor set is signed": replace(honest, one_vote=False),
        "the request lists whose shares to release (A3)": replace(four, one_kind=False),
        "a threshold of 1 (A4)": replace(four, need=replace(four.need, threshold=1)),
        "no self mask, uploads come late (A2)": replace(honest, self_mask=False),
        "unsigned keys, the coordinator in the middle (A5)": replace(four, signed_hellos=False),
        "complaints open what no dealer signed": replace(four, signed_envelopes=False),
        "two corrupt sites where T = 0": replace(honest, corrupt=2),
    }


WHOLE = ((3, 0), (3, 1), (4, 0), (4, 1), (4, 2), (5, 1), (5, 2))


def table() -> str:
    """What exploring each case finds, as Markdown."""
    lines = ["| case | runs | " + " | ".join(PROPERTIES) + " |", "|---|---|---|---|---|"]
    for name, r in cases().items():
        count, found = explore(r)
        marks = ["**broken**" if p in found else "holds" for p in PROPERTIES]
        lines.append(f"| {name} | {count} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"
