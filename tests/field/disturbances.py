"""The faults of the fault test. Each is a context: it strikes, lets everybody go on, and heals.

The sites wait at the stage of the fault when it is entered, and go on when its block is left; what
comes after its ``yield`` is what heals.
"""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from fedward.client.site_folder import SiteFolder
from fedward.server.certificates import issue
from fedward.server.store import Event, Phase
from tests.field import clocks
from tests.field.machines import Field

DEADLINE = 60
"""Seconds: the strict run's, longer than a busy machine takes to start a trainer."""

LONG = 90.0
"""Seconds: longer than the deadline, and than the minute after which Flower forgets a run."""

SHORT = 40.0
"""Seconds: longer than a site is silent before it counts as away."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a fault strikes.

    Args:
        field: The machines.
        victim: The hospital that is struck; of no matter where the coordinator is.
        run: The run's name.
        number: The round's.
    """

    field: Field
    victim: str
    run: str
    number: int

    def events(self, phase: Phase) -> list[Event]:
        """What has happened in this round."""
        events = self.field.events(self.run)
        return [e for e in events if e.phase is phase and e.attempt.round == self.number]

    def wait(self) -> None:
        """Until the round is committed."""
        self.field.wait(f"round {self.number}", lambda: self.events(Phase.COMMITTED) != [])


Fault = Callable[[Moment], AbstractContextManager[None]]


@contextlib.contextmanager
def kill_agent(at: Moment) -> Iterator[None]:
    at.field.kill(at.victim)
    at.field.start_site(at.victim)
    yield


@contextlib.contextmanager
def kill_trainer(at: Moment) -> Iterator[None]:
    at.field.kill_trainer(at.victim)
    yield


@contextlib.contextmanager
def kill_coordinator(at: Moment) -> Iterator[None]:
    at.field.kill("coordinator", group=True)
    time.sleep(2)
    at.field.serve()
    at.field.wait("the coordinator", at.field.is_serving)
    yield


def kill_part(part: str) -> Fault:
    """kill -9 of the coordinator's ``link`` or ``engine`` alone; its supervisor lives."""

    @contextlib.contextmanager
    def fault(at: Moment) -> Iterator[None]:
        os.kill(at.field.part(part), signal.SIGKILL)
        yield

    return fault


@contextlib.contextmanager
def _still(pids: list[int], seconds: float) -> Iterator[None]:
    """Processes that stand still for some seconds from now, while everybody else goes on."""
    end = time.monotonic() + seconds
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield
    time.sleep(max(0.0, end - time.monotonic()))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # its agent gave it up
            os.kill(pid, signal.SIGCONT)


def stop_agent(at: Moment) -> AbstractContextManager[None]:
    return _still([at.field.processes[at.victim].pid], LONG)


def stop_trainer(at: Moment) -> AbstractContextManager[None]:
    return _still(at.field.children(at.victim), LONG)


def stop_coordinator(at: Moment) -> AbstractContextManager[None]:
    return _still([*at.field.children("coordinator"), at.field.processes["coordinator"].pid], LONG)


def stop_engine(at: Moment) -> AbstractContextManager[None]:
    """The round engine alone: the sites' answers come in meanwhile."""
    return _still([at.field.part("engine")], LONG)


def cable(seconds: float | None, **mode: object) -> Fault:
    """Both directions of a site's cable in a mode for so long; None: until the round is over."""

    @contextlib.contextmanager
    def fault(at: Moment) -> Iterator[None]:
        for way in ("up", "down"):
            at.field.order(at.victim, way=way, mode=mode)
        yield
        if seconds is None:
            at.wait()
        else:
            time.sleep(seconds)
        for way in ("up", "down"):
            at.field.order(at.victim, way=way, mode={})

    return fault


def upload(**mode: object) -> Fault:
    """What happens once to the bytes that a site sends from now on."""

    @contextlib.contextmanager
    def fault(at: Moment) -> Iterator[None]:
        at.field.order(at.victim, way="up", mode=mode)
        yield

    return fault


def download(**mode: object) -> Fault:
    """What happens once to the bytes that come to a site from now on."""

    @contextlib.contextmanager
    def fault(at: Moment) -> Iterator[None]:
        at.field.order(at.victim, way="down", mode=mode)
        yield

    return fault


@contextlib.contextmanager
def cut_after_upload(at: Moment) -> Iterator[None]:
    """The cable is reset at the instant at which the coordinator has the masked update."""
    yield
    (number,) = (m.id for m in at.field.roster().members if m.name == at.victim)
    came = lambda: any(e.site == number for e in at.events(Phase.MASKED))  # noqa: E731
    at.field.wait("the masked update", came)
    at.field.order(at.victim, cut=True)


@contextlib.contextmanager
def replay_bytes(at: Moment) -> Iterator[None]:
    """All that a site has said on its last connections once more, in new ones and in open ones."""
    assert at.field.order(at.victim, replay=True) > 0, "nothing came back"
    yield
    assert at.field.order(at.victim, inject=True) > 0, "no connection was open"


def clock(seconds: int, *, of: str = "") -> Fault:
    """A clock that is wrong by so many seconds, and is set right after a while."""

    @contextlib.contextmanager
    def fault(at: Moment) -> Iterator[None]:
        clocks.set_wrong(at.field.clock(of or at.victim), seconds)
        yield
        time.sleep(SHORT)
        clocks.set_wrong(at.field.clock(of or at.victim), 0)

    return fault


def certificate(days: int) -> Fault:
    """The server certificate of so many days from now, as a clock that was wrong once made it.

    The coordinator's part that answers sites is killed, so that it takes the certificate; then the
    operator starts ``coordinator serve`` again.
    """

    @contextlib.contextmanager
    def fault(at: Moment) -> Iterator[None]:
        folder = at.field.coordinator
        for path in (folder.server_certificate, folder.server_key):
            path.unlink()
        issue(folder, clocks.in_days(days))
        os.kill(at.field.part("link"), signal.SIGKILL)
        yield
        time.sleep(SHORT)
        at.field.stop("coordinator")
        at.field.serve()
        at.field.wait("the coordinator", at.field.is_serving)

    return fault


@contextlib.contextmanager
def second_daemon(at: Moment) -> Iterator[None]:
    """Somebody starts the agent again beside the one that runs."""
    folder = str(at.field.sites[at.victim].root)
    said = at.field.command(at.victim, "site", "run", "--site", folder, check=False).decode()
    with (at.field.root / f"{at.victim}.log").open("a") as log:
        log.write(said)
    yield


@contextlib.contextmanager
def copied_folder(at: Moment) -> Iterator[None]:
    """A copy of a site's folder is started on another machine, with its keys and its ledger."""
    folder, name = at.field.sites[at.victim].root, f"{at.victim}-copy"
    copy = folder.with_name(name)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.sock"))
    SiteFolder.load(copy)
    at.field.start(name, "tests.field.site", str(copy), at.victim, "honest", at=at.victim)
    log = at.field.root / f"{name}.log"
    at.field.wait("the copy's hello", lambda: ": connected" in log.read_text())
    yield
    at.wait()
    at.field.kill(name)
    with (at.field.root / f"{at.victim}.log").open("a") as said:
        said.write(log.read_text())  # one of the two is refused: whichever was asked second


@contextlib.contextmanager
def revoke(at: Moment) -> Iterator[None]:
    """The coordinator takes a member out of the roster, for good."""
    root = str(at.field.coordinator.root)
    at.field.command("coordinator", "coordinator", "revoke", at.victim, "--coordinator", root)
    yield
    at.wait()
    at.field.kill(at.victim)
    del at.field.sites[at.victim]


@contextlib.contextmanager
def nothing(at: Moment) -> Iterator[None]:
    yield
