"""The laboratory's own disk and clock: what is synced stays, what is not may go."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fedward.simulations.faults.clock import VirtualClock
from fedward.simulations.faults.disk import RenamedFiles, SiteDisk


def append(disk: SiteDisk, path: Path, data: bytes, *, synced: bool) -> None:
    disk.note("chain.write")
    with path.open("ab") as file:
        file.write(data)
    if synced:
        disk.note("chain.written")


@pytest.mark.parametrize("seed", range(5))
def test_of_a_line_that_was_not_synced_something_is_lost_and_of_others_nothing(tmp_path, seed):
    disk, path = SiteDisk(tmp_path, np.random.default_rng(seed)), tmp_path / "ledger.jsonl"
    append(disk, path, b"first\n", synced=True)
    assert disk.lose_power() == "nothing"
    append(disk, path, b"second\n", synced=False)
    assert "ledger.jsonl" in disk.lose_power()
    left = path.read_bytes()
    assert left != b"first\nsecond\n"
    assert left.startswith(b"first\n")
    assert b"first\nsecond\n".startswith(left)


def test_what_a_kill_left_unsynced_is_lost_later_unless_a_start_syncs_it(tmp_path):
    for start in (False, True):
        disk = SiteDisk(tmp_path, np.random.default_rng(0))
        path = tmp_path / "ledger.jsonl"
        path.unlink(missing_ok=True)
        append(disk, path, b"line\n", synced=False)
        disk.start()
        if start:
            disk.note("chain.opened")
        append(disk, tmp_path / "journal.jsonl", b"other\n", synced=True)
        disk.lose_power()
        assert (path.read_bytes() == b"line\n") is start


def test_a_rename_is_durable_when_the_next_place_is_reached(tmp_path):
    back = set[bytes]()
    for seed in range(20):
        files = RenamedFiles(tmp_path / str(seed), np.random.default_rng(seed))
        (tmp_path / str(seed)).mkdir()
        path = tmp_path / str(seed) / "x"
        path.write_bytes(b"old")
        files.note("file.renamed")
        files.note("memory.task")
        path.write_bytes(b"new")
        files.note("file.renamed")
        files.lose_power()
        back.add(path.read_bytes())
        path.write_bytes(b"newest")
        files.note("file.renamed")
        files.note("memory.task")
        files.lose_power()
        assert path.read_bytes() == b"newest"
    assert back == {b"old", b"new"}


def test_time_passes_in_order_and_only_when_somebody_sleeps():
    clock, seen = VirtualClock(), list[tuple[str, float]]()

    def see(name):
        seen.append((name, clock.monotonic()))

    for name, seconds in (("b", 2.0), ("a", 1.0), ("never", 9.0)):
        clock.after(seconds, partial(see, name))
    assert seen == []
    clock.sleep(3.0)
    assert (seen, clock.monotonic()) == ([("a", 1.0), ("b", 2.0)], 3.0)
