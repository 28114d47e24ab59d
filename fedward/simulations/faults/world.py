"""A coordinator and its hospitals in one process, with faults where a schedule wants them.

Round engine, run book, store, agents, sessions, ledgers, memories, journals and the trainer's
service are the real ones; clock, network, the socket to the trainer, and what supervises processes
are not. A kill is an exception that nothing catches, thrown at a failpoint: whatever the party held
in memory is dropped, and it starts again from its files.
"""

import contextlib
import errno
import logging
import os
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from flwr.app import Message

from fedward import failpoints
from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.client.pulse import FRESH_SECONDS
from fedward.client.site_folder import SiteFolder
from fedward.errors import FedwardError
from fedward.plan import Plan
from fedward.server.rounds import RoundEngine
from fedward.server.runs import RunBook, RunState
from fedward.server.store import Phase, RunStore
from fedward.simulations.faults import ground
from fedward.simulations.faults.clock import VirtualClock
from fedward.simulations.faults.disk import RenamedFiles
from fedward.simulations.faults.history import History
from fedward.simulations.faults.hospital import BEAT_SECONDS, Hospital, new_context
from fedward.simulations.faults.network import BadNetwork
from fedward.simulations.faults.schedule import COORDINATOR, SITES, Fault, Kind
from fedward.simulations.faults.watch import CANARY, Watch

_WRITES = frozenset({"chain.write", "file.write", "store.record", "book.change"})
_AWAY_SECONDS = 5.0
_PATIENCE_SECONDS = 300.0
_RESTART_SECONDS = 3.0
_OPERATOR_SECONDS = 20.0
_MOST_STARTS = 20
_MOST_RESUMES = 4  # in one round


class Killed(BaseException):
    """The process of a party is gone.

    Args:
        fault: What killed it.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class World:
    """One federation and its schedule.

    Args:
        folder: New; everything of all parties lies below it.
        seed: Decides delays and what a power loss takes.
        plan: The run's.
    """

    def __init__(self, folder: Path, seed: int, plan: Plan = ground.PLAN) -> None:
        self._rng = np.random.default_rng([seed, 1])
        self.clock, self.history, self.root, self.plan = VirtualClock(), History(), folder, plan
        self._armed, self._visits = list[Fault](), list[int]()
        self._parties, self._letter = [COORDINATOR], ("", 0)
        self._full: dict[str, float] = {}
        self._late, self._trainer_died = 0.0, False
        self._resumes = self._committed = 0
        self.sites = [
            Hospital(
                site,
                SiteFolder(root=folder / f"site-{site}"),
                self.clock,
                self._rng,
                self._trainer_has_died,
                partial(self._acting, f"trainer-{site}"),
            )
            for site in range(SITES)
        ]
        self.watch = Watch(self.history, self.clock, folder / COORDINATOR, self.sites, plan)
        self._blobs = RenamedFiles(folder / COORDINATOR / "blobs", self._rng)
        self.network = BadNetwork(
            self.clock,
            self._rng,
            fate=self._fate,
            answer=self._answer,
            there=lambda site: self.sites[site].up,
            lateness=lambda _: self._late,
        )
        book = RunBook(folder / COORDINATOR, clock=self.clock.unix)
        book.submit(ground.RUN, plan, ground.start_of(plan), ground.layout_of(plan))
        self.clock.after(0.0, self._tick)
        for site in range(SITES):
            self.clock.after(0.0, partial(self.start, site))

    def arm(self, fault: Fault) -> None:
        """Let a fault happen at its next occasion."""
        self._armed.append(fault)
        self._visits.append(0)

    def live_for(self, events: int) -> None:
        """Let the coordinator be killed after so many more events."""
        self.arm(Fault(kind=Kind.KILL, party=COORDINATOR, point="store.recorded", visit=events))

    def run(self) -> History:
        """Go on until the run has ended, with an operator who resumes it when it is paused."""
        with self.at_work():
            for _ in range(_MOST_STARTS):
                if self.go():
                    break
            self.clock.sleep(FRESH_SECONDS + 2 * BEAT_SECONDS)  # what is shown afterwards
        return self.history

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Failpoints are this world's, and its logs are looked at instead of shown."""
        log = logging.getLogger("fedward")
        before, log.propagate = log.propagate, False
        log.addHandler(self.watch.logs)
        try:
            with failpoints.armed(self._hit):
                yield
        finally:
            log.removeHandler(self.watch.logs)
            log.propagate = before

    def go(self) -> bool:
        """One life of the coordinator's process; returns whether the run has ended."""
        down = _RESTART_SECONDS
        with self._acting(COORDINATOR):
            try:
                ended = self._coordinate()
            except Killed as killed:
                ended, down = False, killed.fault.seconds
                if killed.fault.kind is Kind.POWER:
                    self.say(f"coordinator: the power loss took {self._blobs.lose_power()}")
            except (OSError, sqlite3.Error) as error:
                ended = False
                self.say(f"coordinator: the process ends ({type(error).__name__}: {error})")
            self.network.forget()
        if ended:
            self.history.ended = self.clock.monotonic()
            self.say(f"coordinator: the run has ended ({self.watch.run_state()})")
        else:
            self.clock.sleep(down)
        self.watch.look_at_store()
        return ended

    def close(self) -> None:
        """Let every file go."""
        for site in self.sites:
            site.stop()

    def say(self, words: str) -> None:
        """Note something in the history."""
        self.history.lines.append((self.clock.monotonic(), words))

    def _coordinate(self) -> bool:
        book = RunBook(self.root / COORDINATOR, clock=self.clock.unix)
        if book.state(ground.RUN) is RunState.PAUSED:
            committed = len(self.watch.committed())
            self._resumes = self._resumes + 1 if committed == self._committed else 1
            self._committed = committed
            if self.watch.out_of_budget() or self._resumes > _MOST_RESUMES:
                return True
            self.clock.sleep(_OPERATOR_SECONDS)
            self.say("operator: starts the sites again and resumes the run")
            for site in range(SITES):
                if self.sites[site].up:
                    self.sites[site].stop()
                    self.start(site)
            book.change(ground.RUN, RunState.QUEUED)
        if book.state(ground.RUN) is RunState.FINISHED:
            return True
        run = book.change(ground.RUN, RunState.RUNNING)
        store = RunStore(self.root / COORDINATOR)
        try:
            RoundEngine(
                plan=run.plan,
                run=run.name,
                identity=ground.COORDINATOR_KEY,
                roster=ground.ROSTER,
                nodes={site: site + 2 for site in range(SITES)},
                store=store,
                start=run.start,
                layout=run.layout,
                observer=self._observe,
                clock=self.clock,
            ).run(self.network)
        except FedwardError as error:
            self.say(f"coordinator: pauses the run: {error}")
            book.change(run.name, RunState.PAUSED, str(error))
            return False
        finally:
            store.close()
        book.change(run.name, RunState.FINISHED)
        return True

    def _observe(self, attempt: Attempt, phase: Phase, site: int, facts: Json) -> None:
        """Before an attempt the coordinator waits for its sites; the rest is for the history."""
        where = f"round {attempt.round}, attempt {attempt.attempt}"
        if phase is Phase.STARTED:
            now, minimum, there = self.clock.monotonic(), self.plan.cohort.minimum, 0
            while there < SITES:
                there = len(list(self.network.get_node_ids()))
                waited = self.clock.monotonic() - now
                if waited > (_AWAY_SECONDS if there >= minimum else _PATIENCE_SECONDS):
                    break
                self.clock.sleep(0.2)
            self.say(f"{where}: starts with {there} sites there")
        elif isinstance(facts, dict) and phase is Phase.LEFT_OUT:
            self.say(f"{where}: site-{site} is left out at {facts['at']}: {facts['reason']}")
        elif isinstance(facts, dict) and phase is Phase.ABORTED:
            self.say(f"{where}: aborted: {facts['reason']}")
        elif isinstance(facts, dict) and phase is Phase.COMMITTED:
            self.say(f"{where}: committed with sites {facts['cohort']}")

    @contextlib.contextmanager
    def _acting(self, party: str) -> Iterator[None]:
        self._parties.append(party)
        try:
            yield
        finally:
            self._parties.pop()

    def _hit(self, point: str) -> None:
        """A party passes a failpoint."""
        party = self._parties[-1]
        if party.startswith("site-"):
            self.sites[_number(party)].disk.note(point)
        elif party == COORDINATOR:
            self._blobs.note(point)
        for fault in self._due(party, point, *self._where(party)):
            self._fire(fault)
        owner = party.replace("trainer", "site")
        if point in _WRITES and self.clock.monotonic() < self._full.get(owner, 0.0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _where(self, party: str) -> tuple[str, int]:
        return (self.network.stage, self.network.round) if party == COORDINATOR else self._letter

    def _due(self, party: str, point: str, stage: str, number: int) -> list[Fault]:
        """The armed faults whose occasion this is."""
        due = list[Fault]()
        for place, fault in enumerate(self._armed):
            if (
                (fault.party, fault.point) == (party, point)
                and fault.stage in ("", stage)
                and fault.round in (0, number)
            ):
                self._visits[place] += 1
                if self._visits[place] == fault.visit:
                    due.append(fault)
        for fault in due:
            place = self._armed.index(fault)
            del self._armed[place], self._visits[place]
        return due

    def _fire(self, fault: Fault) -> None:
        now = self.clock.monotonic()
        self.history.fired.append(fault.point or fault.kind.value)
        self.history.last_fault = max(self.history.last_fault, now + fault.seconds)
        self.say(f"fault: {fault}")
        if fault.kind in (Kind.KILL, Kind.POWER):
            self._trainer_died = fault.party.startswith("trainer")
            raise Killed(fault)
        if fault.kind is Kind.DELAY:
            if fault.party == COORDINATOR:
                self.clock.sleep(fault.seconds)
            else:
                self._late += fault.seconds
        elif fault.kind is Kind.CHOKE:
            raise ValueError(f"invalid literal: {CANARY}")
        elif fault.kind is Kind.FULL:
            self._full[fault.party.replace("trainer", "site")] = now + fault.seconds
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _fate(self, site: int, action: str, number: int) -> dict[Kind, float]:
        due = self._due(f"site-{site}", "", action, number)
        for fault in due:
            self.history.fired.append(fault.kind.value)
            end = self.clock.monotonic() + fault.seconds
            self.history.last_fault = max(self.history.last_fault, end)
            self.say(f"fault: {fault}")
        return {fault.kind: fault.seconds for fault in due}

    def _answer(self, site: int, message: Message) -> Message | None:
        hospital, self._late = self.sites[site], 0.0
        self._letter = self.watch.asked(message)
        with self._acting(f"site-{site}"):
            try:
                reply = hospital.answer(message, new_context(site + 2))
            except Killed as killed:
                self._bury(site, killed.fault)
                return None
        self.watch.left(hospital, message, reply)
        return reply

    def _trainer_has_died(self) -> bool:
        died, self._trainer_died = self._trainer_died, False
        return died

    def _bury(self, site: int, fault: Fault) -> None:
        self.sites[site].stop()
        if fault.kind is Kind.POWER:
            self.say(f"site-{site}: the power loss took {self.sites[site].disk.lose_power()}")
        self.clock.after(fault.seconds, partial(self.start, site))

    def start(self, site: int) -> None:
        """What supervises a site's process starts it, and again if it does not come up."""
        self._letter = ("", 0)
        with self._acting(f"site-{site}"):
            try:
                self.sites[site].start()
            except Killed as killed:
                self._bury(site, killed.fault)
                return
            except (FedwardError, OSError) as error:
                self.say(f"site-{site}: does not start: {type(error).__name__}: {error}")
                self.sites[site].stop()
                self.clock.after(_RESTART_SECONDS, partial(self.start, site))
                return
        self.say(f"site-{site}: is up")
        self.network.started(site)

    def _tick(self) -> None:
        """Look at every site from outside, then let the living give signs of life."""
        for site in self.sites:
            self.watch.look_at(site)
            site.beat()
        self.clock.after(BEAT_SECONDS, self._tick)


def _number(party: str) -> int:
    return int(party.rpartition("-")[2])
