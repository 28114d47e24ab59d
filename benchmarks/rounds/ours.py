"""Rounds of Fedward: ``coordinator serve``, three agents with a trainer process each."""

import sys
import time
from pathlib import Path

import numpy as np

from fedward.server.runs import RunBook, RunState
from fedward.server.store import Event, Phase, RunStore
from fedward.server.superlink import open_state
from fedward.tuning.vector import Layout, layout_to_bytes, replace_vector
from rounds.ground import SITES, TENSORS, Ground, plan
from rounds.processes import Processes

_LOOK_SECONDS = 0.02
_STAGES = {
    Phase.READY: "task",
    Phase.KEYS: "hello",
    Phase.SHARED: "shares",
    Phase.MASKED: "masked",
    Phase.CONSISTENT: "consistency",
    Phase.UNMASKED: "unmask",
    Phase.COMMITTED: "commit",
}
"""The last event of a stage, and its name."""

Round = dict[str, float]
"""Seconds by stage of one round, and ``all``."""


def rounds(ground: Ground, scratch: Path, *, numbers: int, count: int) -> list[Round]:
    """Time each round by its events in the coordinator's store.

    A round lasts from the commit of the one before it to its own; the first, from its start.

    Args:
        ground: Coordinator and sites.
        scratch: A folder for logs, not used before; its name becomes the run's.
        numbers: Float32 numbers of the adapter.
        count: Rounds.
    """
    start, layout = first_adapter(numbers)
    scratch.mkdir(parents=True)
    files = write_first(scratch, start, layout)
    coordinator = ground.coordinator
    with Processes(scratch) as processes:
        start_all(processes, ground, *files)
        book = RunBook(coordinator.runs)
        book.submit(scratch.name, plan(count), start, layout)
        watch = _Watch(RunStore(coordinator.runs), scratch.name, count)
        processes.wait("the rounds", watch.look, _LOOK_SECONDS)
        ended = {RunState.FINISHED, RunState.PAUSED}
        processes.wait("the end", lambda: book.state(scratch.name) in ended)
        watch.close()
    return watch.rounds()


def first_adapter(numbers: int) -> tuple[bytes, Layout]:
    """The adapter that a run starts with, of so many numbers, and its tensors."""
    layout: Layout = tuple((f"t{n:02}", (numbers // TENSORS,)) for n in range(TENSORS))
    vector = np.random.default_rng(0).standard_normal(numbers, dtype=np.float32)
    return replace_vector(b"\x02\0\0\0\0\0\0\0{}", layout, vector), layout


def write_first(folder: Path, start: bytes, layout: Layout) -> tuple[str, str]:
    """Write both into files, for the trainers."""
    files = folder / "start", folder / "layout"
    for file, data in zip(files, (start, layout_to_bytes(layout)), strict=True):
        file.write_bytes(data)
    return str(files[0]), str(files[1])


def start_coordinator(processes: Processes, ground: Ground) -> None:
    """Start ``coordinator serve``."""
    command = ("-m", "fedward", "coordinator", "serve", "--coordinator")
    processes.start("coordinator", sys.executable, *command, str(ground.coordinator.root))


def start_site(processes: Processes, ground: Ground, number: int, *for_trainer: str) -> None:
    """Start a site's daemon."""
    site = str(ground.sites[number].root)
    processes.start(SITES[number], sys.executable, "-m", "rounds.site", site, *for_trainer)


def start_all(
    processes: Processes, ground: Ground, start: str, layout: str, *for_trainer: str
) -> None:
    """Start everything, and wait until all sites are online."""
    start_coordinator(processes, ground)
    for number in range(len(SITES)):
        start_site(processes, ground, number, start, layout, str(number), *for_trainer)
    state = open_state(ground.coordinator.fleet_database)

    def all_online() -> bool:
        online = [node for node in state.get_node_info() if node.status == "online"]
        return len(online) == len(SITES)

    processes.wait("three sites", all_online)


class _Watch:
    """Notes when each event of a run is first seen.

    Args:
        store: The coordinator's events.
        run: Which run's.
        count: Rounds that it has.
    """

    def __init__(self, store: RunStore, run: str, count: int) -> None:
        self._store, self._run, self._count = store, run, count
        self._seen = list[tuple[Event, float]]()

    def look(self) -> bool:
        """Take what is new; whether the last round is over."""
        events, now = self._store.events(self._run), time.monotonic()
        self._seen += [(event, now) for event in events[len(self._seen) :]]
        failed = [event for event in events if event.phase is Phase.ABORTED]
        if failed:
            raise RuntimeError(f"an attempt failed: {failed[0].payload.decode()}")
        return bool(events) and (
            (events[-1].attempt.round, events[-1].phase) == (self._count, Phase.COMMITTED)
        )

    def close(self) -> None:
        """Let go of the store."""
        self._store.close()

    def rounds(self) -> list[Round]:
        """Seconds of every round, by stage."""
        found, before = [], self._seen[0][1]
        for number in range(1, self._count + 1):
            ends = {e.phase: at for e, at in self._seen if e.attempt.round == number}
            stages, last = dict[str, float](), before
            for phase, stage in _STAGES.items():
                stages[stage], last = ends[phase] - last, ends[phase]
            found.append({"all": last - before, **stages})
            before = last
        return found
