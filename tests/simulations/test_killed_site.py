"""A site killed with SIGKILL at every step towards its disk: the books are right and it goes on."""

import itertools
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest

from fedward.client.app import client_app
from fedward.server.rounds import RoundEngine
from fedward.server.store import Phase, RunStore
from fedward.simulations.grid import FIRST_NODE, LocalGrid
from tests.client.desk import LAYOUT, PLAN, RUN, SITES, START, Desk
from tests.simulations.killed_site import SITE, KilledSite

RESERVATIONS = PLAN.rounds.count + PLAN.rounds.spare


def run_killed(folder: Path, instants: Iterable[int], *, late: bool = False) -> KilledSite:
    """Run all rounds over two sites here and one that dies at its instants; check the books."""
    desk, store = Desk(folder / "sites"), RunStore(folder / "store")
    for file in desk.files.pop(SITE):
        file.close()
    site = KilledSite(desk, folder / "scratch", instants, late=late)
    grid = LocalGrid({n + FIRST_NODE: partial(client_app, desk.agents[n]) for n in range(SITES)})
    grid._apps[SITE + FIRST_NODE] = site  # type: ignore[assignment]  # it takes a message as they do
    engine = RoundEngine(
        plan=PLAN,
        run=RUN,
        identity=desk.identity,
        roster=desk.roster,
        nodes={number: number + FIRST_NODE for number in range(SITES)},
        store=store,
        start=START,
        layout=LAYOUT,
        observer=lambda attempt, phase, number, facts: site.check(RESERVATIONS),
    )
    try:
        engine.run(grid)
        check_end(site, store)
    finally:
        grid.close()
        site.close()
        store.close()
        desk.close()
    return site


def check_end(site: KilledSite, store: RunStore) -> None:
    """Every round is committed once with all sites, and the ledger has what left, each once."""
    events = store.events(RUN)
    committed = [event for event in events if event.phase is Phase.COMMITTED]
    assert [event.attempt.round for event in committed] == [1, 2, 3]
    path = site.desk.folder / str(SITE) / "ledger.jsonl"
    entries = [json.loads(line)["entry"] for line in path.read_text().splitlines()]
    sent = [
        (entry["round"], entry["session"], entry["attempt"])
        for entry in entries
        if entry["kind"] == "sent"
    ]
    assert len(sent) == len(set(sent)) <= RESERVATIONS
    assert set(site.left) <= set(sent)
    assert {event.attempt.order for event in committed} <= set(site.left)
    assert len(set(sent) - set(site.left)) <= site.deaths, "a death costs one reservation at most"


@pytest.mark.parametrize("instant", [2, 9, 20, 22, 24, 38, 61, 97])
def test_a_site_killed_once_goes_on_and_counts_right(tmp_path, instant):
    assert run_killed(tmp_path, [instant]).deaths == 1


def test_a_site_that_is_killed_again_while_it_recovers(tmp_path):
    assert run_killed(tmp_path, [6, 2, 5]).deaths == 3


def test_a_site_that_marks_too_late_is_found_out(tmp_path):
    """Negative control: killed between the answer and the mark, an update is out unspent."""

    def check(instant: int) -> bool:
        try:
            run_killed(tmp_path / str(instant), [instant], late=True)
        except AssertionError as error:
            return "an update left that was not spent" in str(error)
        return False

    assert any(check(instant) for instant in range(26, 34))  # around its first masked answer


@pytest.mark.slow
def test_a_site_killed_at_every_instant_of_three_rounds(tmp_path):
    killed = 0
    for instant in itertools.count(1):
        if run_killed(tmp_path / str(instant), [instant]).deaths == 0:
            break
        killed += 1
    assert killed >= 60
