"""Two hundred rounds under random faults: nothing grows but what each round has to leave behind."""

import dataclasses
import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedward.simulations.faults.checker import check
from fedward.simulations.faults.disk import CHAINS
from fedward.simulations.faults.ground import make_plan
from fedward.simulations.faults.schedule import SITES, Fault, random_schedule
from fedward.simulations.faults.world import World

ROUNDS, MARKS = 200, 4
SECONDS = 8.0
"""Virtual seconds between two faults: about one fault a round."""

ONCE = {"chain.cut", "ledger.run"}
"""Failpoints that a run passes once, if ever."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes that there are after some attempts at rounds: the process's memory, and files."""

    attempts: int
    memory: int
    chains: int
    others: int
    coordinator: int

    @classmethod
    def of(cls, world: World) -> "Sizes":
        files = [p for n in range(SITES) for p in (world.root / f"site-{n}").rglob("*")]
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            attempts=len({event.attempt for event in world.watch.events()}),
            memory=pages * os.sysconf("SC_PAGE_SIZE"),
            chains=sum(p.stat().st_size for p in files if p.name in CHAINS),
            others=sum(p.stat().st_size for p in files if p.is_file() and p.name not in CHAINS),
            coordinator=(world.root / "coordinator" / "runs.sqlite").stat().st_size,
        )


def faults() -> Iterator[Fault]:
    """One random fault after the other, each at one of the next three occasions."""
    for seed in itertools.count():
        for fault in random_schedule(seed):
            if fault.point not in ONCE:
                yield dataclasses.replace(fault, visit=min(fault.visit, 3))


def soak(folder: Path, rounds: int) -> tuple[World, list[Sizes]]:
    """Let a run of so many rounds come to its end; sizes at its start and after each quarter."""
    world, more = World(folder, seed=6, plan=make_plan(rounds, rounds)), faults()
    sizes = list[Sizes]()

    def arm() -> None:
        world.arm(next(more))
        world.clock.after(SECONDS, arm)
        if len(world.watch.committed()) >= len(sizes) * rounds // MARKS:
            sizes.append(Sizes.of(world))

    world.clock.after(SECONDS, arm)
    with world.at_work():
        while not world.go():
            pass
    sizes[MARKS:] = [Sizes.of(world)]
    return world, sizes


@pytest.mark.slow
def test_two_hundred_rounds(tmp_path):
    world, sizes = soak(tmp_path / "world", ROUNDS)
    world.close()
    assert not check(world)
    assert len(world.watch.committed()) == ROUNDS
    assert len(world.history.fired) > ROUNDS // 2
    start, warm, *_, before, end = sizes
    assert end.memory - warm.memory < 16 << 20, sizes
    assert end.others <= 1.1 * warm.others, sizes
    for what in ("chains", "coordinator"):  # bytes an attempt, in the first and the last quarter
        first, last = growth(what, start, warm), growth(what, before, end)
        assert 0 < last <= 1.25 * first, (what, sizes)


def growth(what: str, one: Sizes, other: Sizes) -> float:
    """Bytes an attempt."""
    return float(getattr(other, what) - getattr(one, what)) / (other.attempts - one.attempts)
