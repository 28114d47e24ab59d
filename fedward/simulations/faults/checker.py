"""The invariants I1 to I9, checked on what a run of the laboratory left behind.

I1  what the coordinator may hold of a site is spent in the site's ledger, before it leaves; nothing
    is reserved for an attempt that does not ask the site
I2  a site counts at most once a round
I3  the adapter is bit for bit the one that the same cohorts give without a fault
I4  a committed round is whole and stays
I5  the run ends by itself once the faults are over
I6  every chain verifies, with one record for each thing that happened
I7  no patient's word is outside of its site, nor in a log
I8  nothing is shown as running without a fresh sign of life
I9  a mask covers one byte string
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedward.aggregation.packing import pack, unpack, weighed
from fedward.aggregation.participants import asked_sites
from fedward.aggregation.planned import planned_session
from fedward.aggregation.rules import Rule
from fedward.aggregation.schemes import next_vector
from fedward.aggregation.transcript import task_hash
from fedward.aggregation.two_pass import Second, rebuild
from fedward.attempt import Attempt
from fedward.client.journal import verify_journal
from fedward.client.training import TrainRequest
from fedward.errors import FedwardError, SiteCode
from fedward.privacy.chain import read_lines
from fedward.privacy.ledger import read_books
from fedward.privacy.noise import SecureStream
from fedward.server.runs import RunState
from fedward.server.store import Event, Phase
from fedward.simulations.faults import ground
from fedward.simulations.faults.history import Left
from fedward.simulations.faults.hospital import Hospital
from fedward.simulations.faults.schedule import COORDINATOR
from fedward.simulations.faults.trainer import FixedTrainer
from fedward.simulations.faults.watch import CANARY
from fedward.simulations.faults.world import World
from fedward.tuning.vector import Vector, replace_vector, vector_of

HEALING_SECONDS = 240.0
"""Within this time after the last fault a run has to have ended."""

_GOOD = (SiteCode.READY, SiteCode.DONE)


@dataclass(frozen=True, kw_only=True)
class Violation:
    """An invariant that does not hold.

    Args:
        invariant: ``I1`` to ``I9``.
        words: What was found.
    """

    invariant: str
    words: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.invariant}: {self.words}"


def check(world: World, *, ended: bool = True) -> list[Violation]:
    """Every invariant that a world breaks.

    Args:
        world: As its run left it.
        ended: Whether the run should have ended.
    """
    try:
        events = world.watch.events()
    except FedwardError as error:
        return [Violation(invariant="I6", words=f"the coordinator's events: {error}")]
    found = [Violation(invariant=name, words=words) for name, words in world.history.wrong]
    checks: dict[str, Callable[[World, list[Event]], Iterator[str]]] = {
        "I1": _spent,
        "I2": _counted_once,
        "I3": _same_adapter,
        "I6": _chains,
        "I7": _no_leak,
        "I9": _one_input,
        **({"I5": _ended} if ended else {}),
    }
    for name, look in checks.items():
        try:
            found += [Violation(invariant=name, words=words) for words in look(world, events)]
        except FedwardError as error:  # what it looks at cannot be read
            found.append(Violation(invariant=name, words=str(error)))
    return found


def _spent(world: World, _: list[Event]) -> Iterator[str]:
    for left in world.history.left:
        if left.words and not left.spent:
            yield f"site-{left.site} sent an update in {left.attempt.order}, not spent before"
    for site in world.sites:
        spent = site.sent()
        if (
            len(set(spent)) != len(spent)
            or len(spent) > world.plan.rounds.count + world.plan.rounds.spare
        ):
            yield f"site-{site.number} settled {spent}"
        inputs = [left.attempt for left in _masked(world) if left.site == site.number]
        outputs = {ground.paid_by(world.plan, attempt).order for attempt in inputs}
        if not outputs <= set(spent):
            yield f"site-{site.number} sent {outputs - set(spent)}, its ledger says {spent}"
        for attempt in site.reserved():
            if site.number not in asked_sites(world.plan, ground.ROSTER, attempt):
                yield f"site-{site.number} reserved for {attempt.order}, which does not ask it"


def _counted_once(world: World, events: list[Event]) -> Iterator[str]:
    rounds = [e.attempt.round for e in events if e.phase is Phase.COMMITTED]
    if rounds != list(range(1, len(rounds) + 1)):
        yield f"the committed rounds are {rounds}"
    sent = {(left.site, left.attempt.order) for left in _masked(world)}
    for attempt, facts in world.watch.committed():
        cohort = facts["cohort"]
        if cohort != sorted(set(cohort)) or len(cohort) < world.plan.cohort.minimum:
            yield f"round {attempt.round} was summed over {cohort}"
        absent = [site for site in cohort if (site, attempt.order) not in sent]
        if absent:
            yield f"round {attempt.round} counts {absent}, who sent nothing in {attempt.order}"


def _same_adapter(world: World, _: list[Event]) -> Iterator[str]:
    """Plain arithmetic over the cohorts, in place of the whole protocol."""
    adapter = ground.start_of(world.plan)
    for attempt, facts in world.watch.committed():
        expected, sums = _without_faults(world, attempt, facts["cohort"], adapter)
        for name, data in sums.items():
            if world.watch.blob(facts[name]) != data:
                yield f"round {attempt.round}: its {name} is not that of {facts['cohort']}"
        adapter = world.watch.blob(facts["adapter"])
        if adapter != expected:
            yield f"round {attempt.round}: the adapter is not what its cohort gives"


def _without_faults(
    world: World, attempt: Attempt, cohort: list[int], adapter: bytes
) -> tuple[bytes, dict[str, bytes]]:
    """The next adapter and what is published, from the sites' keys."""
    plan, layout = world.plan, ground.layout_of(world.plan)
    rule = Rule(settings=plan.aggregation, layout=layout, attempt=attempt)
    hashed = task_hash(adapter, plan.hash(), plan.aggregation.scheme)
    start = vector_of(adapter, layout)
    first = dataclasses.replace(rule, attempt=ground.paid_by(plan, attempt))
    mean, total = _sum(world, first, cohort, adapter, hashed)
    if not rule.again:
        return replace_vector(adapter, layout, next_vector(start, mean)), {"sum": total}
    basis, hashed = first.basis(mean), world.history.task_hashes[attempt.order]
    again, last = _sum(world, rule, cohort, adapter, hashed, basis)
    vector = rebuild(start, mean, layout, Second(basis=basis, mean=again))
    published = {"first": total, "basis": basis.tobytes(), "sum": last}
    return replace_vector(adapter, layout, vector), published


def _sum(
    world: World,
    rule: Rule,
    cohort: list[int],
    adapter: bytes,
    hashed: bytes,
    basis: Vector | None = None,
) -> tuple[npt.NDArray[np.float64], bytes]:
    """Mean and words of one session's sum."""
    plan, attempt = world.plan, rule.attempt
    paid = ground.paid_by(plan, attempt)
    parameters = planned_session(
        plan,
        ground.ROSTER,
        attempt,
        task_hash=hashed,
        dimension=rule.words,
        cohort=() if basis is None else tuple(cohort),
    )
    total = np.zeros(parameters.words, dtype=parameters.grid.dtype)
    for site in cohort:
        draw = sum(
            order[:2] == paid.order[:2] and order < paid.order for order in world.sites[site].sent()
        )
        result = FixedTrainer(site).train(
            TrainRequest(plan=plan, attempt=paid, draw=draw, adapter=adapter, layout=rule.layout)
        )
        position = f"{attempt.round}/{attempt.session}/{draw}"
        stream = SecureStream(ground.key_of(site))
        stream = stream.child("rounding", attempt.run, position, hashed)
        update = weighed(rule.to_send(result.update, basis), parameters, site)
        total += pack(update, result.slots, parameters, stream)
    return unpack(total, parameters)[0] / parameters.divisor(cohort), total.tobytes()


def _ended(world: World, events: list[Event]) -> Iterator[str]:
    history, state = world.history, world.watch.run_state()
    if history.ended is None:
        yield f"the run has not ended; it is {state}"
        return
    late = history.ended - history.last_fault
    if late > HEALING_SECONDS:
        yield f"the run ended {late:.0f} s after the last fault"
    committed = sum(e.phase is Phase.COMMITTED for e in events)
    whole = (state, committed) == (RunState.FINISHED, world.plan.rounds.count)
    if not whole and not world.watch.out_of_budget():
        yield f"the run is {state} after {committed} rounds, and sites have budget left"


def _chains(world: World, events: list[Event]) -> Iterator[str]:
    for site in world.sites:
        key, policy = ground.ROSTER.key(site.number), ground.POLICY
        try:
            verify_journal(site.folder, key)
            path = site.folder.ledger
            if path.exists():
                read_books(path, key, epsilon=policy.max_epsilon, delta=policy.delta)
            path = site.folder.memory
            if path.exists():
                read_lines(path.read_bytes(), key, purpose="fedward memory", path=path)
        except FedwardError as error:
            yield f"site-{site.number}: {error}"
            continue
        yield from _one_record_each(world, site)
        yield from _acknowledged(world, site)
    ends = Counter(e.attempt.order for e in events if e.phase in {Phase.COMMITTED, Phase.ABORTED})
    twice = [order for order, times in ends.items() if times > 1]
    if twice:
        yield f"attempts {twice} ended twice"


def _one_record_each(world: World, site: Hospital) -> Iterator[str]:
    """Answers are in the journal as often as they left; reservations name their line of it."""
    journal: list[dict[str, Any]] = site.entries("journal.jsonl")
    said = Counter(e["asked"] for e in journal if e["what"] in {"answered", "answered again"})
    first = Counter(e["asked"] for e in journal if e["what"] == "answered")
    for left in world.history.left:
        if left.site == site.number and left.code in _GOOD:
            said[left.asked] -= 1
            if said[left.asked] < 0 or not first[left.asked]:
                yield f"site-{site.number}: an answer to {left.action} is not in its journal"
    for entry in site.entries("ledger.jsonl"):
        if entry["kind"] != "reserve":
            continue
        number, order = entry["journal"][0], [entry[k] for k in ("round", "session", "attempt")]
        line = journal[number - 1] if 0 < number <= len(journal) else {}
        if (line.get("what"), line.get("order")) != ("reserved", order):
            yield f"site-{site.number}: no line of the journal is for the reservation {order}"


def _acknowledged(world: World, site: Hospital) -> Iterator[str]:
    """What the coordinator has seen of a ledger is there: else it refuses the site for ever."""
    number, head = world.watch.anchors().get(ground.ROSTER.key(site.number), (0, ""))
    lines = site.folder.ledger.read_bytes().split(b"\n")[:-1] if number else []
    if number > len(lines) or (number and json.loads(lines[number - 1])["h"] != head):
        yield f"site-{site.number}: its ledger lacks line {number}, which it told the coordinator"


def _no_leak(world: World, _: list[Event]) -> Iterator[str]:
    yield from dict.fromkeys(world.history.leaks)
    for path in sorted((world.root / COORDINATOR).rglob("*")):
        if path.is_file() and CANARY.encode() in path.read_bytes():
            yield f"the coordinator's {path.name}"


def _one_input(world: World, _: list[Event]) -> Iterator[str]:
    seen = dict[tuple[int, tuple[int, int, int]], bytes]()
    for left in _masked(world):
        before = seen.setdefault((left.site, left.attempt.order), left.words)
        if before != left.words:
            yield f"site-{left.site} sent two masked inputs in {left.attempt.order}"


def _masked(world: World) -> list[Left]:
    return [left for left in world.history.left if left.words]
