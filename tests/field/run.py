"""``make field-test``: a coordinator and four hospitals as processes, killed in mid-round.

Each has a network namespace of its own where that is allowed, with one cable to the coordinator.
Every round has one fault, while the sites train: kill -9 of the coordinator, all of it, in round 2;
of an agent in round 3; of a trainer in round 4; of an agent that stays away in round 5; and a cable
that is pulled for some seconds in round 6. The run must end by itself, and every adapter must be
bit for bit that of the same run without a network and without a fault (except that the fourth site
is missing from round 5 there as well).
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from fedward.client.journal import verify_journal
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.errors import FedwardError, Unreachable
from fedward.identity import Roster
from fedward.privacy.ledger import Ledger
from fedward.server.control_client import open_control
from fedward.server.coordinator_folder import CoordinatorConfig, CoordinatorFolder
from fedward.server.members import open_members
from fedward.server.start import prepare_start
from fedward.server.store import Event, Phase, RunStore
from fedward.server.superlink import LinkState, open_state
from tests.field import scene
from tests.field.wires import Wires

CONSOLE = Console(highlight=False, soft_wrap=True)
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "NO_PROXY": "*",
    "HF_HUB_OFFLINE": "1",
}
SECONDS = 600.0
"""How long to wait for anything, on however busy a machine."""

AWAY_ROUND = 5
CUT_ROUND, CUT_SECONDS = 6, 6.0
AWAY_SECONDS = 60
"""Longer than a busy machine takes to start an agent."""


class Field:
    """The processes of the test and their folders."""

    def __init__(self, root: Path, wires: Wires) -> None:
        self.root, self.wires, self.started = root, wires, time.monotonic()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        where = wires.address
        config = CoordinatorConfig(host=where, port=port, listen=where, away=AWAY_SECONDS)
        self.coordinator = CoordinatorFolder.create(root / "coordinator", config)
        self.sites = dict[str, SiteFolder]()
        self.processes = dict[str, subprocess.Popen[bytes]]()

    def say(self, text: str) -> None:
        CONSOLE.print(f"{time.monotonic() - self.started:6.1f} s  {text}", markup=False)

    def start(self, name: str, *command: str) -> None:
        """Start a machine's program in a process group of its own; its output goes to a log."""
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*self.wires.inside(name), sys.executable, "-m", *command],
                cwd=self.root,
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def command(self, machine: str, *words: str) -> bytes:
        """Let somebody give a command on a machine; returns what it printed."""
        command = [*self.wires.inside(machine), sys.executable, "-m", "fedward", *words]
        return subprocess.run(
            command,
            check=True,
            cwd=self.root,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            timeout=SECONDS,
        ).stdout

    def serve(self) -> None:
        root = str(self.coordinator.root)
        self.start("coordinator", "fedward", "coordinator", "serve", "--coordinator", root)

    def is_serving(self) -> bool:
        with open_control(self.coordinator) as control:
            try:
                control.list()
            except Unreachable:
                return False
        return True

    def start_site(self, name: str) -> None:
        self.start(name, "tests.field.site", str(self.sites[name].root), name)

    def kill(self, name: str, *, group: bool = False) -> None:
        """kill -9 one process, or all of its group."""
        process = self.processes.pop(name)
        (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()

    def kill_trainer(self, name: str) -> None:
        agent = self.processes[name].pid
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        for thread in Path(f"/proc/{agent}/task").iterdir():
            children += (thread / "children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)

    def enrol(self, name: str) -> None:
        """A hospital with keys of its own, a member by token over the wire."""
        coordinator = str(self.coordinator.root)
        token = self.command("coordinator", "coordinator", "invite", name, "--coordinator",
                             coordinator, "--json")  # fmt: skip
        self.sites[name] = SiteFolder.create(self.root / name, SiteConfig(name=name))
        site = str(self.sites[name].root)
        self.command(name, "site", "enrol", json.loads(token)["token"], "--site", site)

    def steer(self, verb: str) -> None:
        root = str(self.coordinator.root)
        self.command("coordinator", "run", verb, scene.RUN, "--coordinator", root)

    @cached_property
    def flower(self) -> LinkState:
        return open_state(self.coordinator.fleet_database)

    def online(self) -> list[int]:
        return [n.node_id for n in self.flower.get_node_info() if n.status == "online"]

    def roster(self) -> Roster:
        with open_members(self.coordinator) as members:
            return members.roster()

    def events(self) -> list[Event]:
        store = RunStore(self.coordinator.runs)
        try:
            return store.events(scene.RUN)
        finally:
            store.close()

    def reached(self, number: int, phase: Phase) -> bool:
        return any(e.phase is phase and e.attempt.round >= number for e in self.events())

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                raise AssertionError(f"waited {seconds:g} s for {what}")
            gone = [n for n, p in self.processes.items() if p.poll() is not None]
            if gone:
                raise AssertionError(f"{', '.join(gone)} ended while waiting for {what}")
            time.sleep(0.1)

    def wait_for_training(self, number: int) -> None:
        """Until the sites have the task of a round and train."""
        self.wait(f"round {number}", lambda: self.reached(number, Phase.INVITED))
        time.sleep(0.9)  # three steps take 1.5 s at least
        early = [e for e in self.events() if e.attempt.round == number and e.phase is Phase.MASKED]
        assert not early, f"round {number} was masked before the fault"

    def logs(self) -> str:
        parts = []
        for path in sorted(self.root.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-25:]
            parts += [f"-- {path.name}", *lines]
        return "\n".join(parts)

    def end(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for name, process in self.processes.items():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.say(f"{name} did not end at SIGTERM")


@contextlib.contextmanager
def a_field(root: Path) -> Iterator[Field]:
    wires = Wires(scene.HOSPITALS)
    field = Field(root, wires)
    try:
        yield field
    except (AssertionError, FedwardError, subprocess.SubprocessError):
        CONSOLE.print(field.logs(), markup=False)
        raise
    finally:
        field.end()
        wires.close()


def prepare(field: Field) -> tuple[Path, str]:
    """Coordinator up, hospitals enrolled and started; the plan's file and its model's digest."""
    base = scene.make_base(field.root / "base")
    plan = scene.write_plan(scene.make_plan(base), field.root / "plan.toml")
    frozen, _, _ = prepare_start(scene.make_plan(base))
    digest = str(frozen.model.sha256)
    field.serve()
    field.wait("the coordinator", field.is_serving)
    for name in scene.HOSPITALS:
        field.enrol(name)
        scene.write_policy(field.sites[name], digest)
    field.say(f"{len(field.sites)} hospitals enrolled by token over TLS")
    for name in scene.HOSPITALS:
        field.start_site(name)
    field.wait("four sites online", lambda: len(field.online()) == len(scene.HOSPITALS))
    field.say("all are connected")
    return plan, digest


def disturb(field: Field) -> None:
    """One fault a round."""
    victim, other, third, away = scene.HOSPITALS
    field.wait_for_training(2)
    field.kill("coordinator", group=True)
    field.say("round 2: kill -9 of the coordinator, every process of it")
    time.sleep(2)
    field.serve()

    field.wait_for_training(3)
    field.kill(victim)
    field.say(f"round 3: kill -9 of the agent of {victim}")
    time.sleep(1)
    field.start_site(victim)

    field.wait_for_training(4)
    field.kill_trainer(other)
    field.say(f"round 4: kill -9 of the trainer of {other}")

    field.wait_for_training(AWAY_ROUND)
    field.kill(away)
    field.say(f"round {AWAY_ROUND}: kill -9 of the agent of {away}, which stays away")
    field.steer("pause")
    field.wait(
        f"round {AWAY_ROUND} without {away}",
        lambda: field.reached(AWAY_ROUND, Phase.COMMITTED),
    )
    field.start_site(away)
    field.wait(f"{away} online", lambda: len(field.online()) == len(scene.HOSPITALS))
    field.say(f"{away} is back, and the paused run goes on")
    field.steer("resume")

    if field.wires.real:
        field.wait_for_training(CUT_ROUND)
        field.wires.cut(third)
        field.say(f"round {CUT_ROUND}: the cable of {third} is pulled")
        time.sleep(CUT_SECONDS)
        field.wires.heal(third)
        field.say("it is in again")


def check(field: Field, expected: list[str]) -> dict[str, Any]:
    """Every promise, against what is on the disks."""
    events = field.events()
    committed = [json.loads(e.payload) for e in events if e.phase is Phase.COMMITTED]
    assert [facts["adapter"] for facts in committed] == expected, "an adapter has other bits"
    ids = {member.name: member.id for member in field.roster().members}
    cohorts = [facts["cohort"] for facts in committed]
    away = ids[scene.HOSPITALS[-1]]
    everybody = sorted(ids.values())
    wanted = [everybody] * scene.ROUNDS
    wanted[AWAY_ROUND - 1] = [site for site in everybody if site != away]
    assert cohorts == wanted, f"cohorts {cohorts}"
    epsilons = {}
    for name, site in field.sites.items():
        entries = [json.loads(line)["entry"] for line in site.ledger.read_text().splitlines()]
        sent = [e["round"] for e in entries if e["kind"] == "sent"]
        took_part = [n for n, cohort in enumerate(cohorts, 1) if ids[name] in cohort]
        assert sent == took_part, f"{name} sent in rounds {sent}, was in the sums of {took_part}"
        ledger = Ledger.open(site.ledger, site.identity(), epsilon=scene.EPSILON, delta=scene.DELTA)
        epsilons[name] = ledger.epsilon_spent()
        ledger.close()
        assert 0 < epsilons[name] <= scene.EPSILON
        entries = verify_journal(site, site.identity().public_key)
        assert entries, f"{name} has an empty journal"
    return {"epsilons": epsilons, "attempts": len({e.attempt for e in events})}


def main() -> int:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="fw") as scratch, a_field(Path(scratch)) as field:
        plan_file, digest = prepare(field)
        root = str(field.coordinator.root)
        words = ["run", "start", str(plan_file), "--name", scene.RUN, "--coordinator", root]
        for _ in range(2):  # idempotent
            shown = json.loads(field.command("coordinator", *words, "--json"))
            assert (shown["name"], shown["rounds"]) == (scene.RUN, scene.ROUNDS)
        disturb(field)
        with open_control(field.coordinator) as control:
            field.wait(
                "the end of the run",
                lambda: control.call("Show", scene.RUN)["state"] == "finished",
            )
        field.say("the run has ended by itself")
        field.end()
        expected = reference(field, plan_file.parent, digest)
        facts = check(field, expected)
        faults = "1 cut, network namespaces, " if field.wires.real else "loopback, "
        epsilon = max(facts["epsilons"].values())
        CONSOLE.print(
            f"field test passed: 4 hospitals, {scene.ROUNDS} rounds in {facts['attempts']} "
            f"attempts, 4 kills, {faults}every adapter bit-identical to the undisturbed run's, "
            f"epsilon {epsilon:.3f} of {scene.EPSILON:g}, "
            f"{time.monotonic() - field.started:.0f} s"
        )
    return 0


def reference(field: Field, root: Path, digest: str) -> list[str]:
    frozen, start, layout = prepare_start(scene.make_plan(root / "base"))
    assert frozen.model.sha256 == digest
    folder = root / "undisturbed"
    folder.mkdir()
    return scene.undisturbed(
        folder,
        coordinator=field.coordinator,
        sites=field.sites,
        roster=field.roster(),
        plan=frozen,
        start=start,
        layout=layout,
        missing=(AWAY_ROUND, scene.HOSPITALS[-1]),
    )


if __name__ == "__main__":
    sys.exit(main())
