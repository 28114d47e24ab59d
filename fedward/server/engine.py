"""Works through the book of runs, one run after the other, over Flower's grid.

Runs do not overlap: a site has one session at a time. Before each attempt the engine waits until
the sites are there, so that an outage costs no attempt. A run that fails is paused with the reason,
never lost; one that a kill interrupted goes on where its events end.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.errors import FedwardError
from fedward.identity import Roster
from fedward.server.coordinator_folder import CoordinatorFolder
from fedward.server.members import open_members
from fedward.server.rounds import RoundEngine
from fedward.server.runs import Run, RunBook, RunState
from fedward.server.store import Phase, RunStore
from fedward.server.superlink import LinkGrid, admit_nodes, open_state

_LOG = logging.getLogger(__name__)

FRESH_SECONDS = 15.0
"""A run whose last sign of life is older than this is not shown as running."""

_LOOK_SECONDS = 0.2


class _Stopped(Exception):  # no error: somebody asked for it
    """The open run has to stop here; the book says why."""


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A sign of life.

    Args:
        run: The run that the engine works on; None while it has nothing to do.
        activity: What it does, in words.
        at: ``time.monotonic()``.
    """

    run: str | None
    activity: str
    at: float


class Engine:
    """The worker of one coordinator.

    Args:
        folder: The coordinator's.
        stop: Ends the work at the next look; the open run goes on at the next start.
    """

    def __init__(self, folder: CoordinatorFolder, stop: threading.Event) -> None:
        self._folder, self._stop, self._away = folder, stop, folder.config().away
        self._book = RunBook(folder.runs)
        self._state = open_state(folder.fleet_database)
        self._sign = Sign(run=None, activity="starting", at=time.monotonic())

    @property
    def sign(self) -> Sign:
        """The last sign of life."""
        return self._sign

    def is_fresh(self) -> bool:
        """Whether the engine was alive a moment ago."""
        return time.monotonic() - self._sign.at < FRESH_SECONDS

    def work(self) -> None:
        """Work through the book until told to stop."""
        while not self._stop.is_set():
            name = self._book.next()
            if name is None:
                self._beat(None, "waiting for a run")
                self._stop.wait(_LOOK_SECONDS)
            else:
                self._one(name)

    def _one(self, name: str) -> None:
        """Work on a run until it ends, somebody stops it, or it cannot go on."""
        self._beat(name, "opening")
        try:
            run = self._book.change(name, RunState.RUNNING)
            self._execute(run)
            self._book.change(name, RunState.FINISHED)
        except _Stopped:
            _LOG.info("run %r stops here", name)
        except FedwardError as error:
            _LOG.warning("run %r: %s", name, error)
            if self._book.state(name) is RunState.RUNNING:
                self._book.change(name, RunState.PAUSED, str(error))

    def _execute(self, run: Run) -> None:
        with open_members(self._folder) as members:
            roster = members.roster()
            keys = {member.id: member.fleet_key for member in members.all() if not member.revoked}
        nodes = admit_nodes(self._state, keys)
        store = RunStore(self._folder.runs)
        grid = LinkGrid(self._state, grace=self._away, on_look=lambda: self._look(run.name))

        def observe(attempt: Attempt, phase: Phase, site: int, facts: Json) -> None:
            self._beat(run.name, f"round {attempt.round}: {_WORDS[phase]}")
            if phase is Phase.STARTED:
                if self._roster().epoch != roster.epoch:
                    raise _Stopped  # and go on at once, with the sites of the new roster
                self._stop_unless(run.name, RunState.RUNNING)
                self._wait_for_sites(run, grid, nodes, attempt.round)

        try:
            RoundEngine(
                plan=run.plan,
                run=run.name,
                identity=self._folder.identity(),
                roster=roster,
                nodes=nodes,
                store=store,
                start=run.start,
                layout=run.layout,
                observer=observe,
            ).run(grid)
        finally:
            store.close()
            grid.close()

    def _roster(self) -> Roster:
        with open_members(self._folder) as members:
            return members.roster()

    def _wait_for_sites(
        self, run: Run, grid: LinkGrid, nodes: Mapping[int, int], number: int
    ) -> None:
        """Wait for the minimum of sites for as long as it takes, and for the others a while."""
        minimum, last = run.plan.cohort.minimum, time.monotonic() + self._away
        while True:
            there = len(set(grid.get_node_ids()).intersection(nodes.values()))
            if there == len(nodes) or (there >= minimum and time.monotonic() > last):
                return
            needed = f"{there} of {len(nodes)} sites are there, {minimum} are needed"
            self._beat(run.name, f"round {number}: waiting for sites ({needed})")
            self._stop_unless(run.name, RunState.RUNNING)
            self._stop.wait(_LOOK_SECONDS)

    def _look(self, name: str) -> None:
        """In the middle of an exchange: show life, and stop if the run is aborted."""
        if time.monotonic() - self._sign.at > _LOOK_SECONDS:
            self._beat(name, self._sign.activity)
            self._stop_unless(name, RunState.RUNNING, RunState.PAUSED)

    def _stop_unless(self, name: str, *states: RunState) -> None:
        if self._stop.is_set() or self._book.state(name) not in states:
            raise _Stopped

    def _beat(self, name: str | None, activity: str) -> None:
        self._sign = Sign(run=name, activity=activity, at=time.monotonic())


_WORDS = {
    Phase.STARTED: "opening",
    Phase.INVITED: "sites train",
    Phase.READY: "sites train",
    Phase.LEFT_OUT: "sites answer",
    Phase.KEYS: "keys",
    Phase.SHARED: "shares",
    Phase.MASKED: "masked updates",
    Phase.CONSISTENT: "survivors",
    Phase.UNMASKED: "sum",
    Phase.ABORTED: "tried again",
    Phase.COMMITTED: "committed",
}
"""What the engine does when an event of this phase was the last."""
