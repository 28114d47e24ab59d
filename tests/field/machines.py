"""The machines of the field test: a coordinator, the wire before it and four hospitals."""

import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from fedward.client.data_sources import DataSource, add_model
from fedward.client.enrol import pinned_roster
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.client.site_records import add_source
from fedward.errors import FedwardError, Unreachable
from fedward.identity import Roster
from fedward.private_files import write_private
from fedward.server.certificates import issue
from fedward.server.control_client import open_control
from fedward.server.coordinator_folder import CoordinatorConfig, CoordinatorFolder
from fedward.server.members import open_members
from fedward.server.store import Event, Phase, RunStore
from fedward.server.superlink import LinkState, open_state
from fedward.typed_toml import dump
from tests.field import clocks, evidence, hold, notes, scene
from tests.field.wires import Wires

CONSOLE = Console(highlight=False, soft_wrap=True)
ROOT = Path(__file__).parents[2]
SECONDS = 600.0
"""How long to wait for anything, on however busy a machine."""

AWAY_SECONDS = 40
"""Longer than a busy machine takes to start an agent."""

TRACED = scene.HOSPITALS[2]
"""The hospital whose processes the kernel watches; nobody kills it."""


class Field:
    """The processes of the test and their folders, all below one.

    Args:
        root: The folder; the hospitals' records lie in ``notes``.
        wires: Between the machines.
        away: Seconds for which the coordinator waits for sites that are away.
    """

    def __init__(self, root: Path, wires: Wires, *, away: int = AWAY_SECONDS) -> None:
        self.root, self.wires, self.started = root, wires, time.monotonic()
        self.notes, self.copies = root / "notes", root / "wire"
        for name in ("notes", "wire", "home", "tmp"):
            (root / name).mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        # The relay is where sites look for the coordinator, which listens behind it.
        self.coordinator = CoordinatorFolder.create(
            root / "coordinator",
            CoordinatorConfig(host=wires.address, port=self.port, listen=wires.behind, away=away),
        )
        issue(self.coordinator, datetime.datetime.now(datetime.UTC))
        self.sites = dict[str, SiteFolder]()
        self.sources = dict[str, DataSource]()
        self.processes = dict[str, subprocess.Popen[bytes]]()
        hold.arm(root, hold.NOWHERE)
        self.clocks: Path | None = None
        """What lets the machines' clocks go wrong (:mod:`tests.field.clocks`)."""
        self.kernel = shutil.which("strace") is not None and can_trace(root / "probe")

    def say(self, text: str) -> None:
        CONSOLE.print(f"{time.monotonic() - self.started:6.1f} s  {text}", markup=False)

    def environment(self, machine: str) -> dict[str, str]:
        watch = Path(__file__).parent / "watch"
        return {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{watch}:{ROOT}",
            "FIELD_WATCH": str(self.watched(machine)),
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
            "NO_PROXY": "*",
            "HF_HUB_OFFLINE": "1",
            **clocks.environment(self.clocks, self.clock(machine)),
        }

    def clock(self, machine: str) -> Path:
        """By how much a machine's clock is wrong."""
        return self.root / f"{machine}.clock"

    def watched(self, machine: str) -> Path:
        """Where the addresses stand that a machine's Pythons asked for."""
        return self.root / f"{machine}.watch"

    def traced(self, machine: str) -> Path:
        """Where the kernel's view of them stands."""
        return self.root / f"{machine}.strace"

    def start(self, name: str, *command: str, at: str | None = None) -> None:
        """Start a program in a process group of its own; its output goes to a log.

        Args:
            name: The program's; a machine's own has the machine's name.
            command: A module and its arguments.
            at: The machine, if it is another.
        """
        machine = at or name
        before = self.wires.inside(machine)
        if name == TRACED and self.kernel:
            before = [*before, *evidence.TRACED, str(self.traced(name))]
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*before, sys.executable, "-m", *command],
                cwd=self.root,
                env=self.environment(machine),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def command(self, machine: str, *words: str, check: bool = True) -> bytes:
        """Let somebody give a command on a machine; returns what it printed on both outputs."""
        done = subprocess.run(
            [*self.wires.inside(machine), sys.executable, "-m", "fedward", *words],
            cwd=self.root,
            env=self.environment(machine),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if check else subprocess.STDOUT,
            timeout=SECONDS,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words[:3])}: {done.stderr.decode()}")
        return done.stdout

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

    def start_relay(self) -> None:
        folder, copies = str(self.coordinator.root), str(self.copies)
        self.start("relay", "tests.field.relay", folder, copies, at="coordinator")

    def start_proxy(self) -> None:
        """A cable that faults can be ordered on, in the relay's place; it opens no TLS."""
        near, far = self.wires.address, self.wires.behind
        words = [near, str(self.port), far, str(self.root / "cable")]
        self.start("proxy", "tests.field.proxy", *words, at="coordinator")

    def order(self, site: str, **order: object) -> int:
        """Order a fault of a site's cable (:class:`tests.field.proxy.Cable`)."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(SECONDS)
            control.connect(str(self.root / "cable"))
            line = json.dumps({"site": self.wires.address_of(site), **order})
            control.sendall(line.encode() + b"\n")
            return int(control.recv(100))

    def start_site(self, name: str, how: str = "honest") -> None:
        self.start(name, "tests.field.site", str(self.sites[name].root), name, how)

    def kill(self, name: str, *, group: bool = False) -> None:
        """kill -9 one process, or all of its group."""
        process = self.processes.pop(name)
        (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()

    def children(self, name: str) -> list[int]:
        """The processes that a program has started: an agent's trainer, the coordinator's parts."""
        found = list[str]()
        for thread in Path(f"/proc/{self.processes[name].pid}/task").iterdir():
            found += (thread / "children").read_text().split()
        return [int(number) for number in found]

    def part(self, name: str) -> int:
        """The process of a part of the coordinator, ``link`` or ``engine``."""
        for pid in self.children("coordinator"):
            if name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
        raise AssertionError(f"no part {name!r} of the coordinator runs")

    def kill_trainer(self, name: str) -> None:
        os.kill(self.children(name)[0], signal.SIGKILL)

    def stop(self, name: str) -> None:
        """SIGTERM, and the end of it."""
        process = self.processes.pop(name)
        process.terminate()
        process.wait(60)

    def enrol(self, name: str) -> None:
        """A hospital with keys of its own, a member by token over the wire."""
        coordinator = str(self.coordinator.root)
        token = self.command("coordinator", "coordinator", "invite", name, "--coordinator",
                             coordinator, "--json")  # fmt: skip
        self.sites[name] = SiteFolder.create(self.root / name, SiteConfig(name=name))
        site = str(self.sites[name].root)
        self.command(name, "site", "enrol", json.loads(token)["token"], "--site", site)

    def equip(self, name: str, base: Path, rounds: int = scene.MOST_ROUNDS) -> None:
        """Give a hospital its records, model and policy for so many rounds."""
        site = self.sites[name]
        self.sources[name] = notes.write_notes(self.notes / name, name)
        add_source(site, "notes", self.sources[name])
        write_private(site.policy, dump(scene.make_policy(add_model(site, base), rounds)).encode())

    def open(
        self, base: Path, *, wire: Callable[[], None], rounds: int = scene.MOST_ROUNDS
    ) -> None:
        """Coordinator and wire up, every hospital enrolled, equipped and online."""
        self.serve()
        wire()
        self.wait("the coordinator", self.is_serving)
        for name in scene.HOSPITALS:
            self.enrol(name)
            self.equip(name, base, rounds)
        self.say(f"{len(self.sites)} hospitals enrolled by token over TLS")
        for name in scene.HOSPITALS:
            self.start_site(name)
        self.wait("one roster", self.all_agree)
        time.sleep(2)  # until each agent has seen that its file is another
        self.wait("four sites online", self.all_online)
        self.say("all are connected")

    def steer(self, verb: str, run: str = scene.RUN) -> None:
        root = str(self.coordinator.root)
        self.command("coordinator", "run", verb, run, "--coordinator", root)

    @cached_property
    def flower(self) -> LinkState:
        return open_state(self.coordinator.fleet_database)

    def all_online(self) -> bool:
        online = [node for node in self.flower.get_node_info() if node.status == "online"]
        return len(online) == len(self.sites)

    def all_agree(self) -> bool:
        """Whether every site has pinned the newest roster."""
        newest = self.roster().epoch
        return all(pinned_roster(site).epoch == newest for site in self.sites.values())

    def roster(self) -> Roster:
        with open_members(self.coordinator) as members:
            return members.roster()

    def events(self, run: str = scene.RUN) -> list[Event]:
        store = RunStore(self.coordinator.runs)
        try:
            return store.events(run)
        finally:
            store.close()

    def state(self, run: str) -> str:
        with open_control(self.coordinator) as control:
            return str(control.call("Show", run)["state"])

    def reached(self, number: int, phase: Phase) -> bool:
        return any(e.phase is phase and e.attempt.round >= number for e in self.events())

    def wait(self, what: str, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not holds():
            if time.monotonic() > end:
                raise AssertionError(f"waited {SECONDS:g} s for {what}")
            gone = [n for n, p in self.processes.items() if p.poll() is not None]
            if gone:
                raise AssertionError(f"{', '.join(gone)} ended while waiting for {what}")
            time.sleep(0.1)

    def wait_at(self, place: str, but: str = "") -> None:
        """Until a process of every site but one waits there (:mod:`tests.field.hold`)."""
        roots = [site.root for name, site in self.sites.items() if name != but]
        self.wait(place, lambda: hold.all_stay(roots, place))

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


def can_trace(scratch: Path) -> bool:
    """Whether this account may trace a process."""
    done = subprocess.run([*evidence.TRACED, str(scratch), "true"], capture_output=True)
    return done.returncode == 0


@contextlib.contextmanager
def a_field(root: Path, *, away: int = AWAY_SECONDS) -> Iterator[Field]:
    """The machines, until the block ends; if it fails, the ends of their logs are shown."""
    wires = Wires(scene.HOSPITALS)
    field = Field(root, wires, away=away)
    try:
        yield field
    except (AssertionError, FedwardError, subprocess.SubprocessError):
        CONSOLE.print(field.logs(), markup=False)
        raise
    finally:
        field.end()
        wires.close()


def facts_of(event: Event) -> dict[str, Any]:
    """What an event says."""
    found: dict[str, Any] = json.loads(event.payload)
    return found
