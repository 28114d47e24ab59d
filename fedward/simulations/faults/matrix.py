"""Every fault at every stage of a round, one at a time: the table of ``docs/faults.md``."""

from collections.abc import Iterator
from dataclasses import dataclass

from fedward.simulations.faults.laboratory import Outcome, run_schedule
from fedward.simulations.faults.schedule import COORDINATOR, SITES, STAGES, Fault, Kind

VICTIM = 2
ROUND = 2
"""Where the fault happens: in the second round, to site 2, its trainer, or the coordinator."""

_EVENTS_BEFORE = 2 + SITES * len(STAGES) + 1
"""Events of a round without a fault: started, invited, one a site and stage, committed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault.

    Args:
        name: As the page calls it.
        kind: What happens.
        point: At which failpoint; empty for messages.
        seconds: For how long.
        sees: What the operator sees of it.
    """

    name: str
    kind: Kind
    point: str = ""
    seconds: float = 2.0
    sees: str


ROWS = (
    Row(
        name="agent killed, letter read",
        kind=Kind.KILL,
        point="agent.letter",
        sees="the site's process starts again and gets its letter again",
    ),
    Row(
        name="agent killed, answer ready",
        kind=Kind.KILL,
        point="agent.answered",
        sees="the same; the journal has an answer that never left",
    ),
    Row(
        name="agent away 30 s",
        kind=Kind.KILL,
        point="agent.letter",
        seconds=30.0,
        sees="`left out: no answer`; `site status`: silent",
    ),
    Row(
        name="power loss between write and sync",
        kind=Kind.POWER,
        point="chain.sync",
        sees="a torn last line is cut off at the start; it was never acknowledged",
    ),
    Row(
        name="site's disk full",
        kind=Kind.FULL,
        point="chain.write",
        sees="`left out: refused-budget`; the site's log: make room, and it goes on",
    ),
    Row(
        name="site's disk fails to sync",
        kind=Kind.ERROR,
        point="chain.sync",
        sees="`left out: refused-budget` until the site is started again: only reading tells what "
        "reached the disk",
    ),
    Row(
        name="letter lost",
        kind=Kind.LOST,
        sees="`left out: no answer`",
    ),
    Row(
        name="answer lost",
        kind=Kind.UNHEARD,
        sees="`left out: no answer`",
    ),
    Row(
        name="letter twice",
        kind=Kind.TWICE,
        sees="nothing; the journal says `answered again`, with the same bytes",
    ),
    Row(
        name="letter 15 s late",
        kind=Kind.LATE,
        seconds=15.0,
        sees="`left out: no answer`; the late answer is not taken",
    ),
    Row(
        name="cable cut for 5 s",
        kind=Kind.CUT,
        seconds=5.0,
        sees="nothing: within the deadline",
    ),
    Row(
        name="cable cut for 30 s",
        kind=Kind.CUT,
        seconds=30.0,
        sees="`left out: no answer`; the site connects again by itself",
    ),
    Row(
        name="site stands still for 15 s",
        kind=Kind.DELAY,
        point="agent.letter",
        seconds=15.0,
        sees="`left out: no answer`",
    ),
    Row(
        name="coordinator killed, letters signed",
        kind=Kind.KILL,
        point="round.asked",
        sees="`run show`: stalled, then the next attempt",
    ),
    Row(
        name="coordinator killed, answers here",
        kind=Kind.KILL,
        point="round.answered",
        sees="`run show`: stalled, then the next attempt",
    ),
    Row(
        name="coordinator's disk full",
        kind=Kind.FULL,
        point="store.record",
        sees="its log; the process ends and starts again until there is room",
    ),
)
"""The faults that are tried at every stage of :data:`STAGES`."""

ONCE = (
    ("trainer killed, task read", "task", "trainer.asked", Kind.KILL),
    ("trainer killed, update made", "task", "trainer.trained", Kind.KILL),
    ("trainer killed, update told", "task", "trainer.told", Kind.KILL),
    ("a library chokes on a record", "task", "trainer.asked", Kind.CHOKE),
    ("agent killed, cost reserved", "task", "agent.reserved", Kind.KILL),
    ("agent killed, update not yet marked sent", "masked", "ledger.sent", Kind.KILL),
    ("agent killed, update marked sent", "masked", "ledger.written", Kind.KILL),
    ("agent killed, survivors signed", "consistency", "memory.signed", Kind.KILL),
    ("agent killed, shares noted as released", "unmask", "memory.released", Kind.KILL),
    ("coordinator killed, sum known", "commit", "round.summed", Kind.KILL),
    ("coordinator killed, files without their event", "commit", "round.kept", Kind.KILL),
    ("coordinator loses power, a file just renamed", "commit", "file.renamed", Kind.POWER),
    ("coordinator killed, round committed", "commit", "round.committed", Kind.KILL),
)
"""Faults that only one stage has: name, stage, failpoint, kind."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one fault at one stage came to.

    Args:
        attempt: The attempt that was committed.
        sites: Sites in its sum.
        spent: Updates that the victim spent in the round.
        starts: Processes that were started again.
        outcome: The whole run.
    """

    attempt: int
    sites: int
    spent: int
    starts: int
    outcome: Outcome

    def __str__(self) -> str:
        """Attempt, sites in the sum, updates spent."""
        return f"{self.attempt} / {self.sites} / {self.spent}"


def pairs() -> Iterator[tuple[str, str, Fault]]:
    """Name, stage and fault of every pair of the table."""
    for row in ROWS:
        for place, stage in enumerate(STAGES):
            yield row.name, stage, _fault(row, place, stage)
    for name, stage, point, kind in ONCE:
        if stage == "commit":
            visit = ROUND if point.startswith("round") else 3
            yield name, stage, Fault(kind=kind, party=COORDINATOR, point=point, visit=visit)
        else:
            who = "trainer" if point.startswith("trainer") else "site"
            party = f"{who}-{VICTIM}"
            # The trainer reads a task twice: to prepare, and to train.
            visit = 2 if point == "trainer.asked" else 1
            yield (
                name,
                stage,
                Fault(kind=kind, party=party, point=point, stage=stage, round=ROUND, visit=visit),
            )


def try_pair(fault: Fault) -> Cell:
    """Let one fault happen and see what becomes of the round."""
    outcome = run_schedule((fault,))
    attempt, cohort = outcome.rounds[ROUND - 1]
    return Cell(
        attempt=attempt,
        sites=len(cohort),
        spent=outcome.spent[VICTIM].count(ROUND),
        starts=sum(words.endswith("is up") for _, words in outcome.history.lines) - SITES,
        outcome=outcome,
    )


def _fault(row: Row, place: int, stage: str) -> Fault:
    """The fault of a row at a stage; the coordinator passes its points once an exchange."""
    if not row.point.startswith(("round", "store")):
        return Fault(
            kind=row.kind,
            party=f"site-{VICTIM}",
            point=row.point,
            stage=stage,
            round=ROUND,
            seconds=row.seconds,
        )
    visit = (ROUND - 1) * len(STAGES) + place + 1
    if row.point == "store.record":
        visit = _EVENTS_BEFORE + 2 + SITES * place + 1
    return Fault(
        kind=row.kind, party=COORDINATOR, point=row.point, visit=visit, seconds=row.seconds
    )
