"""The resident agent around its folder; tests/server/test_coordinator.py has it on the wire."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.planned import planned_session
from fedward.attempt import Attempt
from fedward.client import daemon, enrol
from fedward.client.agent import Agent
from fedward.client.daemon import run_site
from fedward.client.journal import verify_journal
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.errors import ConfigurationError, Unreachable
from fedward.plan_aggregation import Aggregation
from fedward.private_files import write_private
from tests.client import desk
from tests.server import office

POLICY = f'max_epsilon = 8.0\ndelta = 1e-5\nmax_rounds = 4\nmodels = ["{"a" * 64}"]\n'


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    """An enrolled site whose coordinator is not there."""
    coordinator = office.make_coordinator(tmp_path / "c")
    (site,) = office.enrol_sites(coordinator, tmp_path, ["x"])
    write_private(site.policy, POLICY.encode())
    return site


def started(folder: SiteFolder) -> int:
    """How often the agent was built, by its journal."""
    if not folder.journal.exists():
        return 0
    return folder.journal.read_text().count('"what":"started"')


def wait_for(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_it_takes_up_a_changed_policy_waits_for_its_coordinator_and_stops(folder):
    stop, states = threading.Event(), list[str]()
    thread = threading.Thread(
        target=run_site, args=(folder, desk.Scripted(0), stop), kwargs={"on_state": states.append}
    )
    thread.start()
    wait_for(lambda: started(folder) == 1)
    write_private(folder.policy, POLICY.replace("8.0", "4.0").encode())
    wait_for(lambda: started(folder) == 2)
    with pytest.raises(ConfigurationError, match="another process runs this site"):
        run_site(folder, desk.Scripted(0), threading.Event())
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
    assert set(states) == {"disconnected"}
    whats = [entry["what"] for entry in verify_journal(folder, folder.identity().public_key)]
    assert whats == ["started", "policy or roster changed", "started", "stopped"]


def test_a_policy_that_changes_while_the_agent_is_built_is_noticed(folder, monkeypatch):
    """Or it would refuse every plan, because the file is not the one that it has read."""
    build, stop = daemon._agent, threading.Event()

    @contextlib.contextmanager
    def slow(*given: Any) -> Iterator[Any]:
        with build(*given) as made:
            if started(folder) == 0:
                write_private(folder.policy, POLICY.replace("8.0", "4.0").encode())
            yield made

    monkeypatch.setattr(daemon, "_agent", slow)
    thread = threading.Thread(target=run_site, args=(folder, desk.Scripted(0), stop))
    thread.start()
    wait_for(lambda: started(folder) == 2)
    stop.set()
    thread.join(30)
    assert not thread.is_alive()


def test_a_full_disk_or_a_bug_does_not_leave_the_agent_without_its_watch(folder, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(daemon, "fetch_roster", full)
    stop, changed = threading.Event(), threading.Event()
    threading.Timer(0.5, stop.set).start()
    daemon._watch(folder, daemon._said(folder), stop, changed, lambda: None)
    assert stop.is_set(), "a full disk did not end the watch"
    assert changed.is_set()

    def bug(*_: object) -> None:
        raise AttributeError

    changed.clear()
    monkeypatch.setattr(daemon, "_ask_for_roster", bug)
    with pytest.raises(AttributeError):
        daemon._watch(folder, daemon._said(folder), threading.Event(), changed, lambda: None)
    assert changed.is_set(), "nobody would ever stop the agent"


def test_a_coordinator_that_dribbles_its_roster_does_not_hold_the_agent(folder, monkeypatch):
    def dribble(request: httpx.Request) -> httpx.Response:
        def pieces() -> Iterator[bytes]:
            while True:
                yield b"x"

        return httpx.Response(200, content=pieces())

    client = partial(httpx.Client, transport=httpx.MockTransport(dribble))
    monkeypatch.setattr(httpx, "Client", lambda **_: client())
    monkeypatch.setattr(enrol, "_ALL_SECONDS", 0.2)
    with pytest.raises(Unreachable, match="no whole answer"):
        enrol.fetch_roster(folder)


@pytest.fixture
def sites(tmp_path):
    made = desk.Desk(tmp_path / "desk")
    yield made
    made.close()


@pytest.mark.parametrize("scheme", ["fedavg", "sketch"])
def test_a_round_is_in_hand_from_its_update_to_its_end(sites, scheme):
    sites.plan = dataclasses.replace(desk.PLAN, aggregation=Aggregation(scheme=scheme))
    agent: Agent = sites.agents[0]
    first = Attempt(run=desk.RUN, round=1)

    def in_hand() -> Attempt | None:
        return None if agent.in_hand is None else agent.in_hand.attempt

    assert in_hand() is None
    for site in range(desk.SITES):
        sites.task(first, site)
    assert in_hand() == first
    for until in ("shares", "unmask"):
        tally, todo = sites.session(first, until=until)
        assert in_hand() == first
        if until == "shares":  # a letter out of turn ends the session
            sites.ask("unmask", first, 0, {"message": b""})
            assert in_hand() is None
            first = dataclasses.replace(first, attempt=2)
            for site in range(desk.SITES):
                sites.task(first, site)
    sites.exchange(tally, first, "unmask", todo)
    assert (in_hand() is not None) == (scheme == "sketch"), "the second pass is due"


def watched(folder: SiteFolder, *files: Path, hands: Sequence[Any] = (None,)) -> int:
    """Change files; how often the agent is looked at until it has to go, the last hand for ever."""
    given = iter(hands)
    hand, asked, changed = None, 0, threading.Event()

    def in_hand() -> Any:
        nonlocal hand, asked
        hand, asked = next(given, hand), asked + 1
        return hand

    before = daemon._said(folder)
    for file in files:
        write_private(file, file.read_bytes() + b"# changed")
    daemon._watch(folder, before, threading.Event(), changed, in_hand)
    assert changed.is_set()
    return asked


def test_a_roster_alone_waits_for_the_end_of_the_round_in_hand(folder, sites, monkeypatch):
    monkeypatch.setattr(daemon, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(daemon, "_HAND_SECONDS", 0.01)
    monkeypatch.setattr(daemon, "_ask_for_roster", lambda _: None)

    def at(number: int, session: int = 1, seconds: int = 60) -> SessionParameters:
        attempt = Attempt(run=desk.RUN, round=number, session=session)
        plan = desk.PLAN
        rounds = dataclasses.replace(plan.rounds, deadline=f"{seconds}s")
        return planned_session(
            dataclasses.replace(plan, rounds=rounds),
            sites.roster,
            attempt,
            task_hash=bytes(32),
            dimension=1,
        )

    assert watched(folder, folder.roster) == 1, "nothing is in hand"
    assert watched(folder, folder.roster, hands=[at(1)] * 5 + [at(1, 2)] * 5 + [None]) == 11
    assert watched(folder, folder.roster, hands=[at(1)] * 3 + [at(2)]) == 4, "no other round"
    assert watched(folder, folder.policy, folder.roster, hands=[at(1)]) == 0, "the site's own word"
    began = time.monotonic()
    assert watched(folder, folder.roster, hands=[at(1, seconds=1)]) > 5
    assert 1 <= time.monotonic() - began < 10, "no longer than a stage may take"
    monkeypatch.setattr(daemon, "_LONGEST_WAIT", 0.1)
    began = time.monotonic()
    assert watched(folder, folder.roster, hands=[at(1, seconds=9_999_999)]) > 1
    assert time.monotonic() - began < 10, "nor than an hour, however long that is"
    gone = threading.Event()
    threading.Timer(0.2, gone.set).start()
    daemon._let_end(folder, daemon._said(folder), gone.is_set, lambda: at(1))  # returns


def test_without_a_policy_nothing_runs(folder):
    folder.policy.unlink()
    with pytest.raises(ConfigurationError, match=r"policy\.toml"):
        run_site(folder, desk.Scripted(0), threading.Event())


def test_a_site_that_is_not_enrolled_is_told_what_to_do(tmp_path):
    folder = SiteFolder.create(tmp_path / "s", SiteConfig(name="s"))
    write_private(folder.policy, POLICY.encode())
    with pytest.raises(ConfigurationError, match="site enrol"):
        run_site(folder, desk.Scripted(0), threading.Event())
    with pytest.raises(ConfigurationError, match="site enrol"):
        daemon._office(folder)
