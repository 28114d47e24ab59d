"""A party's folder is replaced by an older copy of it, and later by the newest one again."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedward.server.runs import RunBook
from fedward.simulations.faults.checker import Violation, check
from fedward.simulations.faults.ground import RUN, make_plan
from fedward.simulations.faults.matrix import VICTIM
from fedward.simulations.faults.schedule import COORDINATOR, Fault, Kind
from fedward.simulations.faults.world import World

RESTORED = 3
"""The round after which an older copy takes the place of what there is."""

_ROUNDS = 5
_MOMENT = 4.0  # within which a site that does not start is started again


@dataclass(frozen=True, kw_only=True)
class Restore:
    """What an older copy replaces.

    Args:
        name: As the page calls it.
        party: Whose.
        files: Of its folder; empty: all of it.
        copied: After which round the copy was made.
        newest: Whether the newest copy is brought back after a round, or a pause.
        sees: What the operator sees and does.
    """

    name: str
    party: str = f"site-{VICTIM}"
    files: tuple[str, ...] = ()
    copied: int = 1
    newest: bool = True
    sees: str


RESTORES = (
    Restore(
        name="a site's folder",
        sees="`left out: refused-ledger`; the site's log names the line that is missing. Bring "
        "back the newest copy",
    ),
    Restore(
        name="a site's ledger alone",
        files=("ledger.jsonl",),
        sees="`site run` does not start and names the line. Bring back the newest copy",
    ),
    Restore(
        name="a site's journal alone",
        files=("journal.jsonl",),
        sees="`site run` does not start and names the line. Bring back the newest copy",
    ),
    Restore(
        name="a site's memory alone",
        files=("memory.jsonl", "tasks"),
        newest=False,
        sees="`left out: protocol-aborted`, for want of the last adapter; the next task brings "
        "it, and the journal says which sums were not checked",
    ),
    Restore(
        name="the coordinator's folder, two rounds old",
        party=COORDINATOR,
        sees="`run show`: paused, the sites have taken part in a later round. Bring back the "
        "newest copy; without one `run abort`, and start another run",
    ),
    Restore(
        name="the coordinator's folder, one round old",
        party=COORDINATOR,
        copied=RESTORED - 1,
        newest=False,
        sees="nothing: the sites answer the same letters with the same bytes. One that was started "
        "since refuses, and the next attempt is paid from `spare`",
    ),
)
"""Every restore of the page."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What came of a restore.

    Args:
        before: Sites in the sum of each round that was committed with the older copy in place.
        after: The same of the rounds after that.
        said: What was said while the older copy was in place.
        violations: Of the invariants, at the end.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    said: tuple[str, ...]
    violations: tuple[Violation, ...]


def try_restore(restore: Restore) -> Restored:
    """Let one restore happen in a run of five rounds, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="fedward-") as scratch:
        world = World(Path(scratch) / "world", seed=0, plan=make_plan(_ROUNDS))
        copies, folder = Path(scratch) / "copies", world.root / restore.party
        try:
            with world.at_work():
                _live_for(world, restore.copied)
                shutil.copytree(folder, copies / "older")
                _live_for(world, RESTORED - restore.copied)
                _replace(world, restore, copies / "older", aside=copies / "newest")
                old, began = len(world.watch.committed()), len(world.history.lines)
                _live_for(world, 1)
                now, said = world.watch.committed(), world.history.lines[began:]
                if restore.newest:
                    _replace(world, restore, copies / "newest", aside=copies / "last")
                known = len(world.watch.committed())
                while not world.go():
                    pass
            sums = [len(facts["cohort"]) for _, facts in world.watch.committed()]
            return Restored(
                before=tuple(len(facts["cohort"]) for _, facts in now[old:]),
                after=tuple(sums[known:]),
                said=(*(words for _, words in said), *_reasons(copies)),
                violations=tuple(check(world)),
            )
        finally:
            world.close()


def _live_for(world: World, rounds: int) -> None:
    """Let the coordinator live until so many more rounds are committed, or it pauses the run."""
    point = "round.committed"
    world.arm(Fault(kind=Kind.KILL, party=COORDINATOR, point=point, visit=rounds))
    world.go()


def _replace(world: World, restore: Restore, copy: Path, *, aside: Path) -> None:
    """Put a copy in the place of a party's files; those stay aside. Its process starts again."""
    folder = world.root / restore.party
    site = None if restore.party == COORDINATOR else world.sites[VICTIM]
    was_up = site is not None and site.up
    if site is not None and was_up:
        site.stop()
    shutil.copytree(folder, aside)
    for name in restore.files or _names(folder):
        _remove(folder / name)
    for name in restore.files or _names(copy):
        _copy(copy / name, folder / name)
    if site is None:
        world.watch.begin_again()
    elif was_up:
        world.start(VICTIM)
    world.clock.sleep(_MOMENT)


def _names(folder: Path) -> Sequence[str]:
    return [path.name for path in folder.iterdir()]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _copy(path: Path, place: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, place)
    else:
        shutil.copy2(path, place)


def _reasons(copies: Path) -> list[str]:
    """Why a coordinator with the older copy paused the run."""
    last = copies / "last"
    return [RunBook(last).get(RUN).reason] if (last / "book.sqlite").exists() else []
