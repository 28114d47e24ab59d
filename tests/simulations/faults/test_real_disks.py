"""Disks that are really full or read-only: nothing is acknowledged that is not on them."""

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedward.cli import app
from fedward.client.doctor import check_disk
from fedward.client.pulse import Pulse
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.client.status import life_file, site_status
from fedward.errors import ConfigurationError
from fedward.private_files import hold
from fedward.server.store import RunStore
from fedward.simulations.faults.checker import check
from fedward.simulations.faults.ground import make_plan
from fedward.simulations.faults.schedule import COORDINATOR, Fault, Kind
from fedward.simulations.faults.world import World
from tests.simulations.faults.small_disk import SmallDisk

SITE = "site-1"
FULL = os.strerror(28)
READ_ONLY = os.strerror(30)


class RealDisks(World):
    """The laboratory with one party's folder on a disk of its own, which faults fill for real."""

    def __init__(self, folder: Path, party: str) -> None:
        super().__init__(folder, seed=0, plan=make_plan(5))
        self.disk = SmallDisk(folder / party, 4096)
        self.complaints = list[str]()

    def _fire(self, fault: Fault) -> None:
        if fault.kind is not Kind.FULL:
            super()._fire(fault)
            return
        self.history.fired.append(fault.point)
        self.history.last_fault = self.clock.monotonic() + fault.seconds
        self.disk.fill()
        self.clock.after(fault.seconds, self.disk.free)

    def say(self, words: str) -> None:
        super().say(words)
        self.complaints.append(words)


class Complaints(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, world: RealDisks) -> None:
        super().__init__()
        self.world = world

    def emit(self, record: logging.LogRecord) -> None:
        self.world.complaints.append(record.getMessage())


@contextlib.contextmanager
def real_disks(folder: Path, party: str) -> Iterator[RealDisks]:
    world = RealDisks(folder / "world", party)
    handler, log = Complaints(world), logging.getLogger("fedward")
    log.addHandler(handler)
    try:
        yield world
    finally:
        log.removeHandler(handler)
        world.close()
        world.disk.close()


SITE_FILES = {
    "ledger": "ledger.reserve",
    "ledger, at its worst": "ledger.sent",
    "memory": "memory.begin",
    "journal": "journal.record",
    "adapter": "file.write",
}


@pytest.mark.parametrize("file", list(SITE_FILES))
def test_a_site_whose_disk_is_full_goes_on_when_there_is_room(tmp_path, file):
    with real_disks(tmp_path, SITE) as world:
        # Long enough that what is left of each file's last block does not last.
        world.arm(Fault(kind=Kind.FULL, party=SITE, point=SITE_FILES[file], round=1, seconds=7.0))
        world.run()
        assert not check(world), world.history.lines
        assert world.history.fired == [SITE_FILES[file]]
        refused = [words for words in world.complaints if FULL in words]
        assert refused, "the disk was never full"
        assert any("make room" in words for words in refused) or file == "adapter"
        assert [sites for _, sites in rounds(world)][-1] == [0, 1, 2, 3], "it is back at the end"


@pytest.mark.parametrize("point", ["store.record", "store.blob", "book.change"])
def test_a_coordinator_whose_disk_is_full_goes_on_when_there_is_room(tmp_path, point):
    with real_disks(tmp_path, COORDINATOR) as world:
        visit = 1 if point == "book.change" else 2
        world.arm(Fault(kind=Kind.FULL, party=COORDINATOR, point=point, visit=visit, seconds=2.0))
        world.run()
        assert not check(world), world.history.lines
        assert world.history.fired == [point]
        ended = [words for words in world.complaints if "the process ends" in words]
        assert ended, "the disk was never full"
        assert len(rounds(world)) == 5


def test_a_site_on_a_read_only_disk_does_not_start_and_says_why(tmp_path):
    with real_disks(tmp_path, SITE) as world:
        bury = world._bury

        def bury_and_lock(site: int, fault: Fault) -> None:
            bury(site, fault)
            world.disk.remount("ro")
            world.clock.after(20.0, lambda: world.disk.remount("rw"))

        world._bury = bury_and_lock  # type: ignore[method-assign]
        world.arm(Fault(kind=Kind.KILL, party=SITE, point="agent.letter", stage="hello", round=1))
        world.run()
        world.history.last_fault += 20.0
        assert not check(world), world.history.lines
        refused = [words for words in world.complaints if "does not start" in words]
        assert refused
        assert all(f"cannot be opened: {READ_ONLY}" in words for words in refused)


def rounds(world: World) -> list[tuple[int, list[int]]]:
    """Attempt and sites of each committed round."""
    return [(attempt.attempt, facts["cohort"]) for attempt, facts in world.watch.committed()]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = SiteFolder.create(tmp_path / "site", SiteConfig(name="north"))
    disk = SmallDisk(folder.root, 64)
    yield disk
    disk.close()


def test_signs_of_life_end_with_the_room_and_come_back_with_it(disk):
    folder, now = SiteFolder.load(disk.folder), 1000.0
    pulse = Pulse(life_file(folder), clock=lambda: now)
    disk.fill()
    now = 1030.0
    pulse.beat()
    status = site_status(folder, now)
    assert (status.state, status.silent_seconds) == ("silent", 30.0)
    assert "0 MiB are free" in status.disk
    disk.free()
    pulse.beat()
    assert site_status(folder, now).state == "running"


def test_status_and_doctor_say_that_a_disk_is_read_only(disk):
    folder = SiteFolder.load(disk.folder)
    disk.remount("ro")
    assert "read-only" in site_status(folder).disk
    assert "read-only" in check_disk(folder).says
    shown = CliRunner().invoke(app, ["site", "status", "--site", str(folder.root)])
    assert (shown.exit_code, "disk: " in shown.stdout) == (1, True)
    with pytest.raises(ConfigurationError, match=READ_ONLY), hold(folder.root / "lock", None):
        pass


def test_a_coordinator_on_a_read_only_disk_changes_nothing(tmp_path):
    folder = tmp_path / "runs"
    RunStore(folder).close()
    disk = SmallDisk(folder, 256)
    try:
        disk.remount("ro")
        with pytest.raises(sqlite3.OperationalError, match=r"readonly|unable to open"):
            RunStore(folder)
        disk.remount("rw")
        RunStore(folder).close()
    finally:
        disk.close()
