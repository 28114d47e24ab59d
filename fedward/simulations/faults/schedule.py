"""What goes wrong in one run of the laboratory: faults, drawn from a seed or written by hand."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from fedward.failpoints import NAMES
from fedward.messages import SESSION_ACTIONS

SITES = 4
"""Hospitals of the laboratory; three are needed for a sum."""

COORDINATOR = "coordinator"

STAGES = ("task", *SESSION_ACTIONS)
"""The exchanges of a round, in order."""


POINTS = tuple(name for name in NAMES if not name.startswith("registry."))
"""The failpoints that a run of the laboratory passes; the registry of models has its own tests."""


class Kind(StrEnum):
    """What a fault does. The first six happen at a failpoint, the others to a message."""

    KILL = "kill"
    POWER = "power"
    DELAY = "delay"
    ERROR = "error"
    FULL = "full"
    CHOKE = "choke"
    LOST = "lost"
    UNHEARD = "unheard"
    TWICE = "twice"
    LATE = "late"
    CUT = "cut"


AT_A_MESSAGE = (Kind.LOST, Kind.UNHEARD, Kind.TWICE, Kind.LATE, Kind.CUT)

WORDS = {
    Kind.KILL: "kill -9",
    Kind.POWER: "power loss (what was not synced may be gone)",
    Kind.DELAY: "stands still",
    Kind.ERROR: "I/O error",
    Kind.FULL: "disk full",
    Kind.CHOKE: "a library chokes on a record",
    Kind.LOST: "letter lost",
    Kind.UNHEARD: "answer lost",
    Kind.TWICE: "letter comes twice",
    Kind.LATE: "letter comes late",
    Kind.CUT: "cable cut",
}
"""Each kind in words."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong, once.

    Args:
        kind: What.
        party: To whom: ``coordinator``, ``site-N`` or ``trainer-N``.
        point: The failpoint; empty for messages.
        stage: The exchange during which it happens; empty: any.
        round: The round; 0: any.
        visit: At which visit of the point, or which message, that fits the rest; from 1.
        seconds: How long it lasts: until a killed process starts again, a standstill, a full disk,
            a cut cable; by how much a letter is late, or comes again.
    """

    kind: Kind
    party: str
    point: str = ""
    stage: str = ""
    round: int = 0
    visit: int = 1
    seconds: float = 2.0

    def __str__(self) -> str:
        """One line for people."""
        where = f" at {self.point}" if self.point else ""
        stage = f" during {self.stage}" if self.stage else ""
        number = f" of round {self.round}" if self.round else ""
        return (
            f"{self.party}: {WORDS[self.kind]}{where}{stage}{number}, "
            f"visit {self.visit}, {self.seconds:g} s"
        )


def random_schedule(seed: int) -> tuple[Fault, ...]:
    """One to six faults; the same seed gives the same ones.

    Args:
        seed: 0 or more.
    """
    rng = np.random.default_rng(seed)
    faults = list[Fault]()
    for _ in range(int(rng.integers(1, 7))):
        faults += _at_a_message(rng) if rng.random() < 0.25 else _at_a_point(rng)
    return tuple(faults)


def _at_a_message(rng: np.random.Generator) -> list[Fault]:
    return [
        Fault(
            kind=AT_A_MESSAGE[rng.integers(len(AT_A_MESSAGE))],
            party=f"site-{rng.integers(SITES)}",
            stage=STAGES[rng.integers(len(STAGES))],
            visit=int(rng.integers(1, 3)),
            seconds=_seconds(rng),
        )
    ]


def _at_a_point(rng: np.random.Generator) -> list[Fault]:
    point = POINTS[rng.integers(len(POINTS))]
    site = f"site-{rng.integers(SITES)}"
    kinds = [Kind.KILL, Kind.KILL, Kind.POWER, Kind.DELAY, Kind.ERROR, Kind.FULL]
    room, party = point.split(".")[0], site
    if room in {"round", "store", "book"} or (room == "file" and rng.random() < 0.3):
        party = COORDINATOR
    elif room == "trainer":
        party = site.replace("site", "trainer")
        kinds = [Kind.CHOKE if kind is Kind.POWER else kind for kind in kinds]
    fault = Fault(
        kind=kinds[rng.integers(len(kinds))],
        party=party,
        point=point,
        visit=int(rng.integers(1, _VISITS.get(point, 2) + 1)),
        seconds=_seconds(rng),
    )
    if point != "chain.cut":
        return [fault]
    torn = Fault(kind=Kind.POWER, party=site, point="chain.sync", visit=int(rng.integers(1, 12)))
    return [torn, fault]  # there is a torn line to cut off


_VISITS = {
    **dict.fromkeys(("chain.open", "chain.opened", "session.masked", "trainer.asked"), 3),
    **dict.fromkeys(("chain.write", "chain.sync", "chain.written", "store.recorded"), 15),
    **dict.fromkeys(("store.record", "store.commit", "journal.record", "journal.recorded"), 15),
    **dict.fromkeys(("agent.letter", "agent.acted", "agent.answered", "session.advanced"), 12),
    **dict.fromkeys(("round.asked", "round.answered", "round.closed", "ledger.written"), 8),
    **dict.fromkeys(("chain.cut", "ledger.run"), 1),
}
"""So that a fault falls anywhere in a run: about how often a failpoint is passed in two rounds."""


def _seconds(rng: np.random.Generator) -> float:
    """Mostly short, sometimes beyond a deadline."""
    return float(np.round(rng.exponential(4.0) + 0.1, 1))
