"""The graph: the figures of the specification, and no way to cut a group of sites off."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward.aggregation import graph as module
from fedward.aggregation.cohort import Cohort
from fedward.aggregation.graph import Graph, Thresholds, thresholds
from fedward.errors import ProtocolError

SESSION = bytes(32)


@pytest.mark.parametrize(
    ("sites", "colluders", "dropouts", "degree", "threshold"),
    [
        (200, 0, 20, 28, 16),
        (200, 10, 10, 42, 33),
        (200, 10, 20, 56, 40),
        (200, 20, 20, 80, 62),
        (1000, 0, 100, 36, 20),
        (1000, 50, 50, 98, 79),
        (1000, 50, 100, 134, 100),
        (1000, 100, 100, 180, 139),
    ],
)
def test_the_specification_s_table(sites, colluders, dropouts, degree, threshold):
    found = thresholds(sites, colluders, dropouts)
    assert (found.neighbours, found.threshold) == (degree, threshold)


@pytest.mark.parametrize(
    ("sites", "colluders", "quorum", "may_vanish"),
    [(3, 0, 2, 1), (3, 1, 3, 0), (4, 1, 3, 1), (7, 2, 5, 2), (10, 3, 7, 3), (1000, 100, 551, 449)],
)
def test_quorums(sites, colluders, quorum, may_vanish):
    found = thresholds(sites, colluders, 0)
    assert (found.quorum, sites - found.quorum) == (quorum, may_vanish)


@given(st.integers(3, 2000), st.data())
def test_two_certificates_share_an_honest_signer(sites, data):
    colluders = data.draw(st.integers(0, sites - 2))
    quorum = (sites + colluders) // 2 + 1
    assert 2 * quorum - sites > colluders
    assert quorum <= sites
    if sites <= 128:
        found = thresholds(sites, colluders, 0)
        assert colluders < found.threshold <= found.quorum == quorum
        assert found.neighbours == sites - 1


@settings(max_examples=30)
@given(st.integers(5, 60), st.data())
def test_tails_against_fractions(population, data):
    marked = data.draw(st.integers(0, population))
    draws = data.draw(st.integers(0, population))
    odds = data.draw(st.sampled_from([2, 1000, 2**40]))

    def probability(condition: Callable[[int], bool]) -> Fraction:
        ways = (
            math.comb(marked, x) * math.comb(population - marked, draws - x)
            for x in range(draws + 1)
            if condition(x)
        )
        return Fraction(sum(ways), math.comb(population, draws))

    upper = module._upper(population, marked, draws, odds)
    assert probability(lambda x: x > upper) <= Fraction(1, odds)
    assert upper == 0 or probability(lambda x: x > upper - 1) > Fraction(1, odds)
    lower = module._lower(population, marked, draws, odds)
    assert probability(lambda x: x < lower) <= Fraction(1, odds)
    reachable = lower == min(marked, draws)
    assert reachable or probability(lambda x: x < lower + 1) > Fraction(1, odds)


def test_the_ring_begins_above_128_sites():
    assert thresholds(128, 0, 12) == Thresholds(quorum=65, neighbours=127, threshold=65)
    assert thresholds(129, 0, 12) == Thresholds(quorum=65, neighbours=22, threshold=13)


def tail(population: int, marked: int, draws: int) -> Callable[[int], Fraction]:
    """P[X > t] of a hypergeometric X, by the definition."""

    def above(t: int) -> Fraction:
        ways = sum(
            math.comb(marked, x) * math.comb(population - marked, draws - x)
            for x in range(t + 1, draws + 1)
        )
        return Fraction(ways, math.comb(population, draws))

    return above


def by_the_page(n: int, colluders: int, dropouts: int) -> tuple[int, int]:
    """Degree and threshold, word by word from docs/secagg.md, section 5."""

    def upper(marked: int, m: int, bits: int) -> int:
        above, p = tail(n - 1, marked, m), Fraction(1, 2**bits * n)
        return next(t for t in range(n) if above(t) <= p)

    def lower(marked: int, m: int, bits: int) -> int:
        above, p = tail(n - 1, marked, m), Fraction(1, 2**bits * n)
        return max(t for t in range(m + 1) if 1 - above(t - 1) <= p)

    for k in range(4, n - 1, 2):
        c = upper(colluders, k // 2, 82)
        t = max(k // 2 + c + 2, upper(colluders, k, 81) + 1)
        if lower(n - 1 - dropouts, k, 20) >= t - 1:
            return k, t
    return n - 1, max(colluders + 1, n // 2 + 1)


@pytest.mark.parametrize(
    ("colluders", "dropouts"), [*((t, d) for t in (0, 2) for d in range(8)), (40, 4)]
)
def test_the_ring_s_rule_against_the_page(colluders, dropouts):
    found = thresholds(131, colluders, dropouts)
    assert (found.neighbours, found.threshold) == by_the_page(131, colluders, dropouts)


def test_a_ring_of_everybody_is_none():
    """k = n - 1 would do, but k ends at n - 2."""
    assert thresholds(129, 20, 43) == Thresholds(quorum=75, neighbours=128, threshold=65)


def test_too_many_losses_fall_back_to_everybody():
    assert thresholds(129, 60, 60).neighbours == 128


def ring(size: int, degree: int, session: bytes = SESSION) -> Graph:
    return Graph(session, range(size), degree)


def test_neighbourhood_is_mutual_and_as_large_as_asked():
    graph = ring(200, 28)
    for site in range(200):
        assert len(graph.neighbours(site)) == 28
        assert site not in graph.neighbours(site)
        assert all(site in graph.neighbours(other) for other in graph.neighbours(site))
    complete = Graph(SESSION, (5, 1, 9), 2)
    assert complete.neighbours(5) == (1, 9)


def test_the_order_of_the_ring_depends_on_the_session():
    assert ring(200, 28).neighbours(0) != ring(200, 28, bytes([1]) * 32).neighbours(0)
    assert ring(200, 28).neighbours(0) == ring(200, 28).neighbours(0)


def test_points_are_ranks():
    graph = Graph(SESSION, (5, 1, 9), 2)
    assert [graph.point(5, holder) for holder in (1, 5, 9)] == [1, 2, 3]
    for dealer, holder in ((1, 7), (7, 1)):
        with pytest.raises(ProtocolError):
            graph.point(dealer, holder)


def cohort_of(size: int, need: Thresholds) -> Cohort:
    graph = ring(size, need.neighbours)
    return Cohort(session=SESSION, hellos={}, need=need, minimum=need.quorum, graph=graph)


def cut_is_noticed(cohort: Cohort, size: int, corrupt: set[int]) -> bool:
    """Whether some honest site refuses, for every arc that adversarial gaps could cut off.

    The coordinator declares all neighbours of an arc dead, but for the colluders among them, who
    stay and answer on both sides.
    """
    order = cohort.graph._order
    for start in range(0, size, 7):
        for length in (1, cohort.need.threshold, size // 3):
            arc = {order[(start + step) % size] for step in range(length)}
            gap = {
                other
                for site in arc
                for other in cohort.graph.neighbours(site)
                if other not in arc and other not in corrupt
            }
            alive = frozenset(range(size)) - gap
            honest = arc - corrupt
            if honest and not any(refuses(cohort, alive, site) for site in honest):
                return False
    return True


def refuses(cohort: Cohort, alive: frozenset[int], site: int) -> bool:
    try:
        cohort.check_held(alive, site, "U3")
    except ProtocolError:
        return True
    return False


@pytest.mark.parametrize("colluders", [0, 20])
def test_no_arc_can_be_cut_off(colluders):
    size, need = 200, thresholds(200, colluders, 20)
    corrupt = set(range(0, size, size // colluders)) if colluders else set()
    assert cut_is_noticed(cohort_of(size, need), size, corrupt)


def test_twin_with_half_the_neighbours_as_threshold():
    """Negative control: t = k/2 + 1, enough against the curious, lets an arc be cut off."""
    need = thresholds(200, 0, 20)
    weak = Thresholds(
        quorum=need.quorum, neighbours=need.neighbours, threshold=need.neighbours // 2 + 1
    )
    assert not cut_is_noticed(cohort_of(200, weak), 200, set())


@given(st.integers(3, 400), st.data())
def test_every_session_has_thresholds(sites, data):
    colluders = data.draw(st.integers(0, sites - 1))
    dropouts = data.draw(st.integers(0, 2 * sites))
    found = thresholds(sites, colluders, dropouts)
    assert colluders < found.threshold <= found.neighbours + 1 <= sites
