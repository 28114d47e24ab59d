"""Every run of the symbolic model, with all checks in force and with one of them taken out."""

from pathlib import Path

import pytest

from tests.aggregation.model import (
    PROPERTIES,
    WHOLE,
    broken,
    cases,
    certified,
    explore,
    readable,
    rules,
    runs,
    table,
)

PAGE = Path(__file__).parents[2] / "docs" / "secagg-model" / "README.md"
BREAKS = {
    "quorum of a majority, not (n + T) / 2": set(PROPERTIES),
    "a second survivor set is signed": set(PROPERTIES),
    "the request lists whose shares to release (A3)": {"secrecy", "privacy"},
    "a threshold of 1 (A4)": {"secrecy", "privacy"},
    "no self mask, uploads come late (A2)": {"secrecy", "privacy"},
    "unsigned keys, the coordinator in the middle (A5)": {"secrecy", "privacy"},
    "complaints open what no dealer signed": {"secrecy", "privacy"},
    "two corrupt sites where T = 0": set(PROPERTIES),
}


@pytest.mark.parametrize("case", cases())
def test_the_specification_holds_and_each_weakening_is_found(case):
    _, found = explore(cases()[case])
    assert set(found) == BREAKS.get(case, set())


@pytest.mark.parametrize(("sites", "colluders"), WHOLE)
def test_the_model_can_also_succeed(sites, colluders):
    """Not vacuous: some run ends in the sum of all honest sites, some in nothing."""
    r = rules(sites, colluders)
    ends = [(certified(r, run), readable(r, run)) for run in runs(r)]
    assert any(found == [r.honest] for good, found in ends if good)
    assert all(not found for good, found in ends if not good)


def test_a_dropout_is_left_out_of_the_sum():
    r = rules(4, 1)
    sums = {group for run in runs(r) for group in readable(r, run)}
    assert sums == {frozenset({0, 1, 2}), frozenset({0, 1}), frozenset({0, 2}), frozenset({1, 2})}
    assert all(not broken(r, run) for run in runs(r))


def test_the_page_shows_what_is_found():
    assert table() in PAGE.read_text()
