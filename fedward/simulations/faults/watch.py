"""What is looked at while a run of the laboratory goes on, because later it would be too late."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict

from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.participants import another_sample_has
from fedward.attempt import Attempt
from fedward.client.pulse import FRESH_SECONDS
from fedward.client.status import site_status
from fedward.errors import FedwardError
from fedward.messages import open_letter
from fedward.plan import Plan
from fedward.privacy.ledger import read_books
from fedward.server.runs import RunBook, RunState
from fedward.server.store import BEGINNING, Event, Phase, RunStore
from fedward.simulations.faults import ground
from fedward.simulations.faults.clock import VirtualClock
from fedward.simulations.faults.history import History, Left
from fedward.simulations.faults.hospital import Hospital

CANARY = "CANARY-Mrs-Jane-Roe"
"""What a patient's record says; it must never be outside of its site, nor in any log."""


Committed = tuple[Attempt, Mapping[str, Any]]
"""A committed round: its attempt and the facts of its event."""


class Watch:
    """Sees every answer that leaves a site, the coordinator's files, the status and the logs.

    Args:
        history: Where it notes what it saw.
        clock: Virtual time.
        coordinator: The coordinator's folder.
        sites: All hospitals.
        plan: The run's.
    """

    def __init__(
        self,
        history: History,
        clock: VirtualClock,
        coordinator: Path,
        sites: Sequence[Hospital],
        plan: Plan,
    ) -> None:
        self._history, self._clock = history, clock
        self._coordinator, self._sites, self._plan = coordinator, sites, plan
        self._committed, self._mark = list[Committed](), BEGINNING
        self._looked = 0
        self.logs = _Logs(history)
        """Takes every line of the log."""

    def asked(self, message: Message) -> tuple[str, int]:
        """Action and round of the coordinator's letter."""
        letter = open_letter(message.content, ground.ROSTER.coordinator, "coordinator")
        return letter.action, letter.attempt.round

    def left(self, site: Hospital, message: Message, reply: Message) -> None:
        """An answer leaves a site."""
        if reply.has_error():
            self._search(str(reply.error.reason).encode(), f"Flower's error of site-{site.number}")
            return
        for data in _bytes(reply.content):
            self._search(data, f"an answer of site-{site.number}")
        asked = open_letter(message.content, ground.ROSTER.coordinator, "coordinator")
        letter = open_letter(reply.content, ground.ROSTER.key(site.number), "site")
        words = letter.parts.get("words", b"")
        if asked.action == "hello":
            parameters = SessionParameters.from_bytes(asked.part("message"))
            self._history.task_hashes[asked.attempt.order] = parameters.task_hash
        paid = ground.paid_by(self._plan, letter.attempt)
        self._history.left.append(
            Left(
                site=site.number,
                action=letter.action,
                attempt=letter.attempt,
                code=letter.code,
                asked=hashlib.sha256(asked.header()).hexdigest(),
                words=words,
                spent=bool(words) and site.spent_on_disk(paid),
            )
        )

    def look_at(self, site: Hospital) -> None:
        """Ask for the site's status, as ``site status`` does, and compare it with the truth."""
        silent = self._clock.monotonic() - site.last_alive
        try:
            shown = site_status(site.folder, self._clock.unix()).state
        except FedwardError as error:
            self._history.wrong.append(("I8", f"site-{site.number}: no status: {error}"))
            return
        if shown == "running" and silent > FRESH_SECONDS:
            words = f"site-{site.number} is shown as running after {silent:.0f} s without life"
            self._history.wrong.append(("I8", words))

    def look_at_store(self) -> None:
        """Every committed round is whole, and nothing that was ever seen has gone."""
        try:
            committed = self.committed()
            for _, facts in committed[self._looked :]:
                self.blob(facts["adapter"])
                self.blob(facts["sum"])
        except FedwardError as error:
            self._history.wrong.append(("I4", f"the coordinator's store: {error}"))
            return
        self._looked = len(committed)

    def begin_again(self) -> None:
        """The store is another copy from now on: what was seen of the one before is no news."""
        self._committed, self._mark, self._looked = [], BEGINNING, 0

    def events(self) -> list[Event]:
        """The coordinator's events of the run.

        Raises:
            RoundError: The chain is broken.
        """
        with contextlib.closing(RunStore(self._coordinator)) as store:
            return store.events(ground.RUN)

    def committed(self) -> list[Committed]:
        """The committed rounds, in order, with their facts.

        Raises:
            RoundError: The chain is broken, or what was seen of it before is gone.
        """
        with contextlib.closing(RunStore(self._coordinator)) as store:
            new, self._mark = store.events_after(ground.RUN, self._mark)
        found = [event for event in new if event.phase is Phase.COMMITTED]
        self._committed += [(event.attempt, json.loads(event.payload)) for event in found]
        return list(self._committed)

    def anchors(self) -> dict[bytes, tuple[int, str]]:
        """The newest line of each ledger that the coordinator has seen, by the site's key."""
        with contextlib.closing(RunStore(self._coordinator)) as store:
            return store.ledger_lines()

    def blob(self, name: str) -> bytes:
        """A blob of the coordinator's.

        Raises:
            RoundError: It is missing or damaged.
        """
        with contextlib.closing(RunStore(self._coordinator)) as store:
            return store.blob(name)

    def run_state(self) -> RunState:
        """Where the run stands in the coordinator's book."""
        return RunBook(self._coordinator).state(ground.RUN)

    def out_of_budget(self) -> bool:
        """Whether so few sites have a reservation left that no sum can come about."""
        able, rounds = list[int](), self._plan.rounds
        for site in self._sites:
            path, key = site.folder.ledger, ground.ROSTER.key(site.number)
            epsilon, delta = ground.POLICY.max_epsilon, ground.POLICY.delta
            books = read_books(path, key, epsilon=epsilon, delta=delta)
            known = ground.RUN in books.runs
            if not known or books.spent(ground.RUN) < rounds.count + rounds.spare:
                able.append(site.number)
        if rounds.participants is None:
            return len(able) < self._plan.cohort.minimum
        attempt = Attempt(run=ground.RUN, round=len(self.committed()) + 1)
        return not another_sample_has(self._plan, ground.ROSTER, attempt, able)

    def _search(self, data: bytes, where: str) -> None:
        if CANARY.encode() in data:
            self._history.leaks.append(where)


class _Logs(logging.Handler):
    """Looks through the lines of the log in place of showing them."""

    def __init__(self, history: History) -> None:
        super().__init__()
        self._history = history

    def emit(self, record: logging.LogRecord) -> None:
        """Take one line."""
        if CANARY in self.format(record):
            self._history.leaks.append(f"the log of {record.name}")


def _bytes(content: RecordDict) -> list[bytes]:
    """Every byte string and text of a message."""
    arrays = [a.data for r in content.array_records.values() for a in r.values()]
    values = [v for c in content.config_records.values() for v in c.values()]
    return arrays + [v if isinstance(v, bytes) else str(v).encode() for v in values]
