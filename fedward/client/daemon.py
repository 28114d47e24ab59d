"""``fedward site run``: the resident agent of one site, until it is told to stop.

A change of ``policy.toml`` takes effect between two letters: the agent is built anew from its
folder, as after a restart. The trainer, and the model in it, stay. A change of the pinned roster
alone waits for the end of the round in hand, which the coordinator ends under the old one as well;
for the plan's deadline at most, and no longer than an hour.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

from fedward.aggregation.parameters import SessionParameters
from fedward.client.agent import Agent
from fedward.client.app import client_app
from fedward.client.approval import Consent
from fedward.client.codes import reason_of
from fedward.client.enrol import fetch_roster, offer_roster, own_membership, pinned_roster
from fedward.client.fleet import Office, stay_connected
from fedward.client.journal import Journal, verify_journal
from fedward.client.memory import SiteMemory
from fedward.client.policy import load_policy
from fedward.client.site_folder import SiteFolder
from fedward.client.training import Trainer
from fedward.errors import ConfigurationError, IdentityError, Unreachable
from fedward.privacy.ledger import Ledger

_LOG = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_ROSTER_SECONDS = 60.0
_LONGEST_WAIT = 3600.0  # a plan's deadline may be years, and a member may have been revoked
_HAND_SECONDS = 0.1  # before the next round's task, which would be trained under the old roster

_Hand = Callable[[], SessionParameters | None]
"""What the agent has in hand, once it has answered the letter that it is at."""

OnState = Callable[[str], None]
"""Told ``connected`` or ``disconnected`` at every change."""


def run_site(
    folder: SiteFolder,
    trainer: Trainer,
    stop: threading.Event,
    *,
    on_state: OnState = lambda _: None,
    key: bytes | None = None,
) -> None:
    """Answer the coordinator until told to stop; a round in hand is finished first.

    Args:
        folder: The site's; it is enrolled and has a policy.
        trainer: The process that holds data and model.
        stop: Ends the work.
        on_state: See :data:`OnState`.
        key: 32 secret bytes from which rounding derives; only tests fix it.

    Raises:
        ConfigurationError: The site is not enrolled, has no policy, or another process runs it.
        IdentityError: The roster does not name this site.
        LedgerError: Ledger, memory or journal are broken.
    """
    with folder.alone():
        verify_journal(folder, folder.identity().public_key)  # one that went back stops the site
        while not stop.is_set():
            changed, before = threading.Event(), _said(folder)  # before the agent reads them
            with _agent(folder, trainer, key) as (agent, journal):
                journal.record("started")
                letter = threading.Lock()
                watch = threading.Thread(
                    target=_watch,
                    args=(folder, before, stop, changed, partial(_in_hand, agent, letter)),
                    name="folder",
                    daemon=True,
                )
                watch.start()
                try:
                    stay_connected(client_app(agent, letter), _office(folder), changed, on_state)
                finally:
                    changed.set()
                    watch.join()
                journal.record("stopped" if stop.is_set() else "policy or roster changed")


@contextlib.contextmanager
def _agent(
    folder: SiteFolder, trainer: Trainer, key: bytes | None
) -> Iterator[tuple[Agent, Journal]]:
    """The agent as its folder makes it; its files are let go at the end."""
    identity, roster, policy = folder.identity(), pinned_roster(folder), load_policy(folder.policy)
    with contextlib.ExitStack() as files:
        ledger = Ledger.open(
            folder.ledger, identity, epsilon=policy.max_epsilon, delta=policy.delta
        )
        files.callback(ledger.close)
        memory = SiteMemory.open(folder.memory, identity, ledger)
        files.callback(memory.close)
        journal = files.enter_context(Journal(folder.journal, identity))
        agent = Agent(
            site=own_membership(folder, roster).id,
            identity=identity,
            roster=roster,
            policy=policy,
            ledger=ledger,
            memory=memory,
            trainer=trainer,
            consent=Consent(policy, folder),
            journal=journal,
            key=key,
        )
        yield agent, journal


def _office(folder: SiteFolder) -> Office:
    address = folder.config().address
    if address is None:
        raise ConfigurationError(f"{folder.root}: not enrolled yet; run fedward site enrol TOKEN")
    return Office(
        address=address.removeprefix("https://"),
        ca=folder.ca,
        key=folder.fleet_key,
        note=folder.node,
        most_bytes=load_policy(folder.policy).max_letter << 20,
    )


def _in_hand(agent: Agent, letter: threading.Lock) -> SessionParameters | None:
    with letter:
        return agent.in_hand


def _watch(
    folder: SiteFolder,
    before: list[bytes],
    stop: threading.Event,
    changed: threading.Event,
    in_hand: _Hand,
) -> None:
    """Set ``changed`` when the site has to stop, or its policy or roster is not as before."""
    try:
        looks = 0
        while not (stop.is_set() or changed.wait(_LOOK_SECONDS)):
            if looks % int(_ROSTER_SECONDS / _LOOK_SECONDS) == 0:
                _ask_for_roster(folder)
            looks += 1
            if (now := _said(folder)) != before:
                if now[1:] == before[1:]:  # the site's own word does not wait for a training
                    _let_end(folder, before, lambda: stop.is_set() or changed.is_set(), in_hand)
                break
    finally:
        changed.set()  # whatever happened here: an agent that nobody watches would never stop


def _let_end(
    folder: SiteFolder,
    before: list[bytes],
    over: Callable[[], bool],
    in_hand: _Hand,
) -> None:
    """Wait for the round in hand to end, while nothing but the roster is not as before."""
    first = now = in_hand()
    end = time.monotonic() + (0 if first is None else min(first.deadline, _LONGEST_WAIT))
    while not over() and now is not None and first is not None and time.monotonic() < end:
        one, other = first.attempt, now.attempt
        same_round = (one.run, *one.order[::2]) == (other.run, *other.order[::2])  # either pass
        if not same_round or _said(folder)[1:] != before[1:]:
            return
        time.sleep(_HAND_SECONDS)
        now = in_hand()


def _said(folder: SiteFolder) -> list[bytes]:
    """The files that decide what the agent does, the roster's first."""
    files = (folder.roster, folder.policy, folder.config_file)
    return [path.read_bytes() if path.exists() else b"" for path in files]


def _ask_for_roster(folder: SiteFolder) -> None:
    """See whether the coordinator has a newer roster; it waits for approval unless policy says."""
    try:
        automatic = load_policy(folder.policy).automatic_roster
        if offer_roster(folder, fetch_roster(folder), automatic=automatic) == "waiting":
            _LOG.warning("a newer roster waits for approval: fedward site roster --approve")
    except Unreachable:
        _LOG.debug("no roster could be fetched")  # the connection says so aloud
    except (ConfigurationError, IdentityError, OSError) as error:  # OSError: a full disk
        _LOG.warning("the coordinator's roster is not taken: %s", reason_of(error))
