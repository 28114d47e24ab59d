"""docs/faults.md has every pair and every failpoint, and says of them what a run says now."""

import re
from pathlib import Path

import pytest

from fedward.simulations.faults.matrix import ONCE, ROWS, pairs, try_pair
from fedward.simulations.faults.page import pair_lines
from fedward.simulations.faults.restores import RESTORES
from fedward.simulations.faults.schedule import AT_A_MESSAGE, POINTS, STAGES

PAGE = Path(__file__).parents[3] / "docs" / "faults.md"


def rows(part: str) -> list[list[str]]:
    """The cells of the table rows between two markers."""
    begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    text = PAGE.read_text("utf-8").partition(begin)[2].partition(end)[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def cells() -> dict[tuple[str, str], str]:
    """What the page says of each pair."""
    found = dict[tuple[str, str], str]()
    for name, *rest in rows("pairs"):
        if len(rest) == len(STAGES) + 1:
            found.update({(name, stage): cell for stage, cell in zip(STAGES, rest, strict=False)})
        else:
            found[name, rest[0]] = rest[2]
    return {pair: cell for pair, cell in found.items() if pair[1] != cell and "/" in cell}


def test_the_page_has_every_pair():
    expected = {(name, stage) for name, stage, _ in pairs()}
    assert len(expected) == len(ROWS) * len(STAGES) + len(ONCE) >= 60
    assert set(cells()) == expected


@pytest.mark.parametrize(
    "pair",
    [
        ("agent killed, letter read", "task"),
        ("answer lost", "masked"),
        ("coordinator's disk full", "consistency"),
        ("coordinator killed, sum known", "commit"),
    ],
)
def test_a_pair_comes_out_as_the_page_says(pair):
    (fault,) = (fault for name, stage, fault in pairs() if (name, stage) == pair)
    cell = try_pair(fault)
    assert not cell.outcome.violations
    assert str(cell) == cells()[pair]


@pytest.mark.slow
def test_every_pair_comes_out_as_the_page_says():
    text = "".join(f"{line}\n" for line in pair_lines())
    assert text in PAGE.read_text("utf-8")


def test_the_page_has_every_restore():
    said = {name: (sees, bool(sums)) for name, _, sums, _, sees in rows("restores")[1:]}
    assert said == {restore.name: (restore.sees, True) for restore in RESTORES}


def test_the_page_has_every_failpoint_and_each_failed_often():
    table = {name: int(times) for name, _, times in rows("schedules")[1:] if name != "to a letter"}
    letters = {kind: int(times) for name, kind, times in rows("schedules") if name == "to a letter"}
    assert set(table) == {f"`{name}`" for name in POINTS}
    assert set(letters) == {kind.value for kind in AT_A_MESSAGE}
    assert min([*table.values(), *letters.values()]) >= 20
    schedules, broken = re.findall(
        r"(\d+) schedules, seeds .*?; (\d+) violations", PAGE.read_text("utf-8"), re.DOTALL
    )[0]
    assert (int(schedules) >= 1000, int(broken)) == (True, 0)
