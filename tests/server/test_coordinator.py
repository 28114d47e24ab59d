"""The coordinator as a whole: link, engine and control service, with sites on the real wire.

All in threads of one process, to be fast; tests/field runs the same parts as processes.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedward import typed_toml
from fedward.aggregation.participants import asked_sites
from fedward.attempt import Attempt
from fedward.client.daemon import run_site
from fedward.client.site_folder import SiteFolder
from fedward.errors import ConfigurationError, RoundError, Unreachable
from fedward.plan import Plan
from fedward.privacy.chain import LEDGER, read_lines
from fedward.private_files import write_private
from fedward.server import engine as engine_module
from fedward.server.control_client import Control, open_control
from fedward.server.control_service import ControlService, Health, control_server
from fedward.server.engine import Engine
from fedward.server.members import open_members
from fedward.server.runs import RunBook, RunState
from fedward.server.superlink import admit_nodes, open_state
from tests.client import desk
from tests.client.well import declare
from tests.server import office

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

POLICY = f"""max_epsilon = 80.0
delta = 1e-5
max_rounds = 4
models = ["{"a" * 64}"]
datasets = ["notes"]
minimum = 3
automatic = true
"""


class Slow(desk.Scripted):
    """A trainer that takes its time, so that something can happen meanwhile."""

    def train(self, request):
        time.sleep(0.3)
        return super().train(request)


class House:
    """A coordinator and its sites, which can be stopped and started."""

    def __init__(self, root: Path, names: Sequence[str] = ("x", "y", "z")) -> None:
        self.folder = office.make_coordinator(root / "c")
        self.sites = office.enrol_sites(self.folder, root, list(names))
        for site in self.sites:
            write_private(site.policy, POLICY.encode())
            declare(site)
        admit_nodes(open_state(self.folder.fleet_database), office.fleet_keys(self.folder))

    @contextlib.contextmanager
    def engine(self) -> Iterator[Engine]:
        """Engine and control service, until the block ends."""
        stop = threading.Event()
        engine = Engine(self.folder, stop)
        health = Health(self.folder, engine)
        server = control_server(
            self.folder.control_socket, ControlService(self.folder, engine, stop), health.servicer
        )
        health.look()
        thread = threading.Thread(target=engine.work)
        thread.start()
        try:
            yield engine
        finally:
            stop.set()
            thread.join(60)
            server.stop(grace=0).wait()
            assert not thread.is_alive()

    @contextlib.contextmanager
    def online(self, sites: Sequence[SiteFolder]) -> Iterator[None]:
        """These sites, until the block ends."""
        stop = threading.Event()
        threads = [
            threading.Thread(
                target=run_site,
                args=(site, Slow(number), stop),
                kwargs={"key": bytes([number]) * 32},
            )
            for number, site in enumerate(sites)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
            assert not any(thread.is_alive() for thread in threads)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("h"))
    with office.serving(house.folder), house.online(house.sites):
        yield house


@pytest.fixture
def control(house: House) -> Iterator[Control]:
    with house.engine(), open_control(house.folder) as control:
        yield control


def start(control: Control, name: str, plan: Plan = desk.PLAN) -> dict[str, Any]:
    return control.start(name, plan, desk.START, desk.LAYOUT)


def wait_for(holds: Callable[[], bool], seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def state(control: Control, name: str) -> str:
    return str(control.call("Show", name)["state"])


def test_two_runs_side_by_side_take_turns_at_the_same_sites(control, house):
    names: Sequence[str] = ("left", "right")
    for name in names:
        start(control, name)
    shown: dict[str, bool] = dict.fromkeys(names, False)

    def both_ran() -> bool:
        runs = {name: control.call("Show", name) for name in names}
        for name, run in runs.items():
            shown[name] |= run["state"] == "running" and run["activity"] != ""
        return all(run["state"] == "finished" for run in runs.values())

    wait_for(both_ran)
    assert all(shown.values())
    for site in house.sites:
        lines = read_lines(
            site.ledger.read_bytes(), site.identity().public_key, purpose=LEDGER, path=site.ledger
        )
        mine = [entry for entry, _ in lines if entry["run"] in names]
        told = [(e["kind"], e["run"], e["round"]) for e in mine if e["kind"] != "run"]
        # A site has one session at a time, reserves once for it, and neither run waits for the
        # end of the other.
        asked = [tuple(at) for _, *at in told[::2]]
        assert told == [(kind, *at) for at in asked for kind in ("reserve", "sent")]
        assert sorted(asked) == [(name, number) for name in names for number in (1, 2, 3)]
        assert {run for run, _ in asked[:2]} == {run for run, _ in asked[-2:]} == set(names)


def test_a_run_without_its_sites_holds_up_no_other(tmp_path):
    house = House(tmp_path, ["w", "x", "y", "z"])
    config = dataclasses.replace(house.folder.config(), away=0)
    write_private(house.folder.config_file, typed_toml.dump(config).encode())
    all_four = dataclasses.replace(desk.PLAN.cohort, minimum=4)
    with (
        office.serving(house.folder),
        house.online(house.sites[:3]),
        house.engine(),
        open_control(house.folder) as control,
    ):
        start(control, "lonely", dataclasses.replace(desk.PLAN, cohort=all_four))
        wait_for(lambda: "3 of 4 sites" in control.call("Show", "lonely")["activity"])
        start(control, "social")
        wait_for(lambda: state(control, "social") == "finished")
        assert state(control, "lonely") == "running"


def test_a_round_whose_sample_is_away_is_tried_with_another_and_show_names_who_is_asked(tmp_path):
    house = House(tmp_path, ["u", "v", "w", "x", "y", "z"])
    config = dataclasses.replace(house.folder.config(), away=1)
    write_private(house.folder.config_file, typed_toml.dump(config).encode())
    plan = dataclasses.replace(
        desk.PLAN, rounds=dataclasses.replace(desk.PLAN.rounds, count=1, spare=1, participants=3)
    )
    with open_members(house.folder) as members:
        roster = members.roster()
    first, second = (
        asked_sites(plan, roster, Attempt(run="few", round=1, attempt=number)) for number in (1, 2)
    )
    names = {member.id: member.name for member in roster.members}
    there = sorted(names[site] for site in second)
    sites = [site for site in house.sites if site.config().name in there]
    with (
        office.serving(house.folder),
        house.engine(),
        open_control(house.folder) as control,
    ):
        start(control, "few", plan)
        wait_for(lambda: "0 of 3 sites" in control.call("Show", "few")["activity"])
        assert control.call("Show", "few")["asked"] == []
        with house.online(sites):
            wait_for(lambda: state(control, "few") == "finished")
        assert sorted(control.call("Show", "few")["asked"]) == there
    assert not set(first) & set(second)
    for site in house.sites:
        assert site.ledger.exists() is (site in sites), "whoever is not asked has no line"


def test_runs_are_worked_through_one_after_the_other(control):
    first = start(control, "one")
    assert start(control, "one")["plan_hash"] == first["plan_hash"]  # idempotent
    start(control, "two")
    events = list(control.watch("one"))
    assert [e["round"] for e in events if e["phase"] == "committed"] == [1, 2, 3]
    assert {e["site"] for e in events if e["phase"] == "masked"} == {"x", "y", "z"}
    wait_for(lambda: state(control, "two") == "finished")
    runs = control.list()
    assert [run["name"] for run in runs][:2] == ["one", "two"]
    assert [run["committed"] for run in runs][:2] == [3, 3]
    assert runs[0]["adapter"] != ""
    assert runs[0]["activity"] == ""


def test_pause_lets_the_round_end_and_resume_goes_on(control):
    start(control, "paused")
    wait_for(lambda: state(control, "paused") == "running")
    control.call("Pause", "paused")
    assert control.call("Pause", "paused")["reason"] == "paused by the operator"
    before = -1
    while before != (before := control.call("Show", "paused")["committed"]):
        time.sleep(1.5)
    assert before < 3
    assert state(control, "paused") == "paused"
    control.call("Resume", "paused")
    wait_for(lambda: state(control, "paused") == "finished")
    assert control.call("Show", "paused")["committed"] == 3


def test_abort_stops_at_once_and_for_good(control):
    start(control, "gone")
    wait_for(lambda: control.call("Show", "gone")["activity"].startswith("round 1"))
    control.call("Abort", "gone")
    assert control.call("Abort", "gone")["state"] == "aborted"
    assert list(control.watch("gone"))[-1]["phase"] != "committed"
    with pytest.raises(RoundError, match="is aborted"):
        control.call("Resume", "gone")
    start(control, "next")
    wait_for(lambda: state(control, "next") == "finished")


def test_a_restarted_engine_goes_on_and_shows_nothing_as_running_meanwhile(house):
    with house.engine(), open_control(house.folder) as control:
        start(control, "again")
        wait_for(lambda: control.call("Show", "again")["committed"] >= 1)
    assert RunBook(house.folder.runs).state("again") is RunState.RUNNING
    idle = Engine(house.folder, threading.Event())  # a process that has only just started
    shown = ControlService(house.folder, idle, threading.Event())._shown(
        RunBook(house.folder.runs).get("again")
    )
    assert (shown.state, shown.reason) == ("stalled", "no sign of life from the round engine")
    with house.engine(), open_control(house.folder) as control:
        wait_for(lambda: state(control, "again") == "finished")
        rounds = [e["round"] for e in control.watch("again") if e["phase"] == "committed"]
        assert rounds == [1, 2, 3]


def test_an_old_sign_of_life_is_none(house, monkeypatch):
    engine = Engine(house.folder, threading.Event())
    assert engine.activity() is not None
    later = time.monotonic() + engine_module.FRESH_SECONDS + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert engine.activity() is None


def test_a_run_that_cannot_go_on_is_paused_with_the_reason(control):
    greedy = dataclasses.replace(
        desk.PLAN, privacy=dataclasses.replace(desk.PLAN.privacy, epsilon=500.0)
    )
    start(control, "greedy", greedy)
    wait_for(lambda: state(control, "greedy") == "paused")
    reason = control.call("Show", "greedy")["reason"]
    assert "0 of 3 sites are ready" in reason
    assert "refused-policy" in reason
    control.call("Abort", "greedy")


def test_what_is_wrong_is_said(control, house):
    with pytest.raises(ConfigurationError, match="no run is called 'nobody'"):
        control.call("Show", "nobody")
    with pytest.raises(ConfigurationError, match="nobody"):
        list(control.watch("nobody"))
    with pytest.raises(ConfigurationError, match="name"):
        start(control, "a/b")


def test_health_and_a_socket_of_ones_own(control, house):
    assert house.folder.control_socket.stat().st_mode & 0o777 == 0o600
    with grpc.insecure_channel(f"unix:{house.folder.control_socket}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "link"):
            request = health_pb2.HealthCheckRequest(service=service)
            answer = stub.Check(request, timeout=10)  # pyright: ignore[reportAttributeAccessIssue]  # generated
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_nobody_there_is_said(tmp_path, monkeypatch):
    from fedward.server import control_client

    monkeypatch.setattr(control_client, "_SECONDS", 0.5)
    folder = office.make_coordinator(tmp_path / "c")
    with open_control(folder) as control, pytest.raises(Unreachable, match="coordinator serve"):
        control.list()
