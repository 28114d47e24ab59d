"""One simulated hospital: the real agent, ledger, memory and journal on a folder of its own."""

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedward.attempt import Attempt
from fedward.client.agent import Agent
from fedward.client.app import client_app
from fedward.client.codes import LIBRARY_ERRORS
from fedward.client.journal import Journal, verify_journal
from fedward.client.memory import SiteMemory
from fedward.client.pulse import BEAT_SECONDS, Pulse
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.client.status import life_file
from fedward.errors import FedwardError, SiteCode
from fedward.privacy.ledger import Ledger
from fedward.simulations.faults.clock import VirtualClock
from fedward.simulations.faults.disk import SiteDisk
from fedward.simulations.faults.ground import POLICY, ROSTER, SITE_KEYS, key_of
from fedward.simulations.faults.trainer import SimulatedTrainer

_LOG = logging.getLogger(__name__)


class Hospital:
    """A site whose process can be killed and started again.

    Args:
        number: Its id in the roster.
        folder: Its folder, new.
        clock: Virtual time.
        disk: What would survive a power loss.
        died: Whether the trainer's process has just died.
        working: Entered while the trainer works.
    """

    def __init__(
        self,
        number: int,
        folder: SiteFolder,
        clock: VirtualClock,
        rng: np.random.Generator,
        died: Callable[[], bool],
        working: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.number, self.folder, self._clock = number, folder, clock
        self.disk = SiteDisk(folder.root, rng)
        self._trainer_parts = (number, died, working)
        self._app: ClientApp | None = None
        self._files = list[Ledger | SiteMemory | Journal]()
        self._pulse: Pulse | None = None
        self.last_alive = 0.0
        """When its process was last seen alive, virtual seconds."""
        folder.root.mkdir(parents=True)
        folder.write_config(SiteConfig(name=f"site-{number}"))

    @property
    def up(self) -> bool:
        """Whether its process answers letters."""
        return self._app is not None

    def start(self) -> None:
        """What ``site run`` does at its start.

        Raises:
            LedgerError: Ledger, memory or journal cannot be opened.
        """
        folder, identity = self.folder, SITE_KEYS[self.number]
        self.disk.start()
        verify_journal(folder, identity.public_key)
        ledger = Ledger.open(
            folder.ledger, identity, epsilon=POLICY.max_epsilon, delta=POLICY.delta
        )
        self._files.append(ledger)
        memory = SiteMemory.open(folder.memory, identity, ledger)
        self._files.append(memory)
        journal = Journal(folder.journal, identity, clock=self._clock.local)
        self._files.append(journal)
        journal.record("started")
        agent = Agent(
            site=self.number,
            identity=identity,
            roster=ROSTER,
            policy=POLICY,
            ledger=ledger,
            memory=memory,
            trainer=SimulatedTrainer(*self._trainer_parts),
            journal=journal,
            key=key_of(self.number),
        )
        self._app, self._pulse = client_app(agent), Pulse(life_file(folder), clock=self._clock.unix)
        self.last_alive = self._clock.monotonic()

    def beat(self) -> None:
        """A sign of life, if there is a process to give one."""
        if self._pulse is not None:
            self.last_alive = self._clock.monotonic()
            self._pulse.beat()

    def stop(self) -> None:
        """The process is gone; what it held is let go, as the system does."""
        for file in self._files:
            file.close()
        self._files.clear()
        self._app = self._pulse = None

    def answer(self, message: Message, context: Context) -> Message:
        """What leaves the site for a letter; an unexpected error becomes a fixed code."""
        if self._app is None:
            raise RuntimeError("a site that is down was asked")
        self.last_alive = self._clock.monotonic()
        try:
            return self._app(message=message, context=context)
        except (FedwardError, *LIBRARY_ERRORS) as error:
            _LOG.error("a message: %s", type(error).__name__)
            code = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, SiteCode.INTERNAL.value)
            return Message(code, reply_to=message)

    def spent_on_disk(self, attempt: Attempt) -> bool:
        """Whether the ledger's file, as it is now, says that the attempt's update was sent."""
        return attempt.order in self.sent()

    def sent(self) -> list[tuple[int, int, int]]:
        """The attempts that its ledger has as sent, in order."""
        return [
            (e["round"], e["session"], e["attempt"])
            for e in self.entries("ledger.jsonl")
            if e["kind"] == "sent"
        ]

    def reserved(self) -> list[Attempt]:
        """The attempts that its ledger has reserved for, in order."""
        return [
            Attempt(run=e["run"], round=e["round"], session=e["session"], attempt=e["attempt"])
            for e in self.entries("ledger.jsonl")
            if e["kind"] == "reserve"
        ]

    def entries(self, name: str) -> list[dict[str, Any]]:
        """The entries of one of its chains, as they lie on the disk."""
        path = self.folder.root / name
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line)["entry"] for line in lines]


def new_context(node: int) -> Context:
    """Flower's context of one node."""
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})


__all__ = ["BEAT_SECONDS", "Hospital", "new_context"]
