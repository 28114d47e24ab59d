"""Works through the book of runs over Flower's grid, some of them side by side.

Each run has a thread, and their attempts take turns at the sites (:mod:`fedward.server.turns`). So
a run that is paused, or waits for its sites, holds up no other. Before each attempt the engine
waits until the sites are there, so that an outage costs no attempt. A run that fails is paused with
the reason, never lost; one that a kill interrupted goes on where its events end.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fedward import typed_toml
from fedward.aggregation.participants import another_sample_has, asked_sites
from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.errors import CohortTooSmall, FedwardError
from fedward.identity import Roster
from fedward.plan import Plan
from fedward.server.central.job import Step
from fedward.server.coordinator_folder import CoordinatorFolder
from fedward.server.fallback import train_apart
from fedward.server.gate import loss_apart
from fedward.server.members import open_members
from fedward.server.registry import Registry
from fedward.server.registry_entries import add_run
from fedward.server.rounds import RoundEngine
from fedward.server.runs import Run, RunBook, RunState
from fedward.server.store import ROUND_ENDS, Phase, RunStore
from fedward.server.superlink import LinkGrid, admit_nodes, end_left_runs, open_state
from fedward.server.turns import Turns

_LOG = logging.getLogger(__name__)

FRESH_SECONDS = 15.0
"""A run whose last sign of life is older than this is not shown as running."""

_LOOK_SECONDS = 0.2


class _Stopped(Exception):  # no error: somebody asked for it
    """The open run has to stop here; the book says why."""


@dataclass(frozen=True, kw_only=True)
class _Sign:
    """A sign of life: what the engine does, in words, at ``time.monotonic()``."""

    activity: str
    at: float


class Engine:
    """The worker of one coordinator.

    Args:
        folder: The coordinator's.
        stop: Ends the work at the next look; open runs go on at the next start.
    """

    def __init__(self, folder: CoordinatorFolder, stop: threading.Event) -> None:
        config = folder.config()
        self._folder, self._stop, self._away = folder, stop, config.away
        self._at_once = config.runs_at_once
        self._book, self._turns = RunBook(folder.runs), Turns()
        self._state = open_state(folder.fleet_database)
        self._signs = dict[str | None, _Sign]()
        self._beat(None, "starting")

    def activity(self, run: str | None = None) -> str | None:
        """What the engine does for a run (or, without one, at all), in words.

        None if there was no sign of life for :data:`FRESH_SECONDS`: it is then not running.
        """
        sign = self._signs.get(run)
        fresh = sign is not None and time.monotonic() - sign.at < FRESH_SECONDS
        return sign.activity if sign is not None and fresh else None

    def work(self) -> None:
        """Work through the book until told to stop.

        What a run's thread did not expect is raised here, after all others have stopped.
        """
        end_left_runs(self._state)
        running = dict[str, Future[None]]()
        with ThreadPoolExecutor(self._at_once, thread_name_prefix="run") as threads:
            try:
                while not self._stop.is_set():
                    for done in [name for name, work in running.items() if work.done()]:
                        running.pop(done).result()
                    self._beat(None, f"{len(running)} runs are open")
                    free = len(running) < self._at_once
                    name = self._book.next(besides=running) if free else None
                    if name is None:
                        self._stop.wait(_LOOK_SECONDS)
                    else:
                        running[name] = threads.submit(self._one, name)
            finally:
                self._stop.set()

    def _one(self, name: str) -> None:
        """Work on a run until it ends, somebody stops it, or it cannot go on."""
        self._beat(name, "opening")
        try:
            run = self._book.change(name, RunState.RUNNING)
            self._execute(run)
            self._register(run)
            self._book.change(name, RunState.FINISHED)
        except _Stopped:
            _LOG.info("run %r stops here", name)
        except FedwardError as error:
            _LOG.warning("run %r: %s", name, error)
            if self._book.state(name) is RunState.RUNNING:
                self._book.change(name, RunState.PAUSED, str(error))
        finally:
            self._turns.leave(name)
            self._signs.pop(name, None)

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
                self._wait_for_turn(run, grid, nodes, attempt, roster)
                if self._roster().epoch != roster.epoch:
                    raise _Stopped  # and go on at once, with the sites of the new roster
                self._stop_unless(run.name, RunState.RUNNING)
            elif phase in {*ROUND_ENDS, Phase.ABORTED}:
                self._turns.leave(run.name)

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
                fallback=lambda number, adapter: self._train_alone(run, number, adapter),
                gate=lambda adapter: self._try(run, adapter),
            ).run(grid)
        finally:
            store.close()
            grid.close()

    def _train_alone(self, run: Run, number: int, adapter: bytes) -> bytes:
        """The job of a run's ``[fallback]``, on from an adapter."""
        base = self._base(run.plan)
        step = typed_toml.load(Step, self._folder.fallback_job(run.plan))

        def look() -> None:
            self._beat(run.name, f"round {number}: the coordinator trains alone")
            self._stop_unless(run.name, RunState.RUNNING)

        return train_apart(run.plan, step, base, adapter, self._folder.runs / "fallback", look)

    def _try(self, run: Run, adapter: bytes) -> float:
        """The loss of an adapter on the records of a run's ``[gate]``."""
        data, base = self._folder.gate_data(run.plan), self._base(run.plan)

        def look() -> None:
            self._beat(run.name, "the gate tries an adapter")
            self._stop_unless(run.name, RunState.RUNNING, RunState.PAUSED, RunState.QUEUED)

        return loss_apart(run.plan, data, base, adapter, self._folder.runs / "gate", look)

    def _base(self, plan: Plan) -> Path:
        return Registry(self._folder.registry).base(str(plan.model.sha256))

    def _register(self, run: Run) -> None:
        """Put what the run has made into the registry."""
        with contextlib.closing(RunStore(self._folder.runs)) as store:
            add_run(Registry(self._folder.registry), run.plan, run.name, store)

    def _roster(self) -> Roster:
        with open_members(self._folder) as members:
            return members.roster()

    def _wait_for_turn(
        self,
        run: Run,
        grid: LinkGrid,
        nodes: Mapping[int, int],
        attempt: Attempt,
        roster: Roster,
    ) -> None:
        """Wait for the minimum of sites as long as it takes, for the others a while; then in line.

        Only those count that the attempt asks. A run whose sites leave while it stands there lets
        the others go first.

        Raises:
            CohortTooSmall: Not within the plan's deadline, where the plan has a ``[fallback]``; or
                too few of the attempt's sample are there, and enough of another attempt's.
            InvalidValue: The roster has fewer members than the plan asks.
        """
        asked, number = asked_sites(run.plan, roster, attempt), attempt.round
        began, deadline = time.monotonic(), run.plan.rounds.deadline_seconds
        minimum, last = run.plan.cohort.minimum, began + self._away
        while True:
            self._stop_unless(run.name, RunState.RUNNING)
            online = set(grid.get_node_ids())
            up = {site for site, node in nodes.items() if node in online}
            there, late = len(up.intersection(asked)), time.monotonic() > last
            if there == len(asked) or (there >= minimum and late):
                self._beat(run.name, f"round {number}: waiting for its turn")
                if self._turns.wait(run.name, _LOOK_SECONDS):
                    return
                continue
            self._turns.leave(run.name)
            needed = f"{there} of {len(asked)} sites are there, {minimum} are needed"
            sampled = run.plan.rounds.participants is not None
            if sampled and late and another_sample_has(run.plan, roster, attempt, up):
                raise CohortTooSmall(f"round {number}: of those asked, {needed}")
            if run.plan.fallback is not None and time.monotonic() - began > deadline:
                raise CohortTooSmall(f"round {number}: {needed}, for {run.plan.rounds.deadline}")
            self._beat(run.name, f"round {number}: waiting for sites ({needed})")
            self._stop.wait(_LOOK_SECONDS)

    def _look(self, name: str) -> None:
        """In the middle of an exchange: show life, and stop if the run is aborted."""
        sign = self._signs[name]
        if time.monotonic() - sign.at > _LOOK_SECONDS:
            self._beat(name, sign.activity)
            # Paused, and perhaps queued again: the round in hand is finished all the same.
            self._stop_unless(name, RunState.RUNNING, RunState.PAUSED, RunState.QUEUED)

    def _stop_unless(self, name: str, *states: RunState) -> None:
        if self._stop.is_set() or self._book.state(name) not in states:
            raise _Stopped

    def _beat(self, name: str | None, activity: str) -> None:
        self._signs[name] = _Sign(activity=activity, at=time.monotonic())


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
    Phase.REFUSED: "refused by the gate",
    Phase.FALLBACK: "completed by the coordinator",
}
"""What the engine does when an event of this phase was the last."""
