"""One round of a plan on a site's own data, thrown away: what it would cost, and what would leave.

The training and the update are the real ones. The session is a real one too, among made-up keys in
this process. Nothing is sent, and the ledger is only read.
"""

import dataclasses
import itertools
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedward.aggregation.packing import pack
from fedward.aggregation.parameters import Limits, SessionParameters
from fedward.aggregation.participants import asked_sites
from fedward.aggregation.planned import planned_session, update_event
from fedward.aggregation.rules import masked_bytes
from fedward.aggregation.session_memory import VolatileMemory
from fedward.aggregation.site_session import SiteSession
from fedward.aggregation.tally import Tally
from fedward.attempt import Attempt
from fedward.client.approval import source_reasons
from fedward.client.enrol import own_membership, pinned_roster
from fedward.client.narrow import narrowed, own_rank
from fedward.client.policy import load_policy
from fedward.client.site_folder import SiteFolder
from fedward.client.site_trainer import trainer_maker
from fedward.client.training import TrainRequest
from fedward.errors import DataError, SiteCode
from fedward.identity import Identity, Roster
from fedward.messages import Letter
from fedward.plan import Plan
from fedward.privacy.accounting import epsilon
from fedward.privacy.books import Books
from fedward.privacy.ledger import read_books
from fedward.privacy.noise import SecureStream
from fedward.privacy.planned import metric_event

_SIGNATURE_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a plan would ask of a site.

    Args:
        plan: Hex hash of the plan.
        dataset: The data source.
        refused: Every reason of the policy against the plan; empty where it is allowed.
        bytes_out: Bytes of one round's answers, without the framing of the connection.
        update_bytes: How many of them are the masked update.
        epsilon_round: What one round costs a patient at ``delta``.
        epsilon_run: What the whole run costs, spare rounds included.
        delta: The ledger's.
        rounds: Rounds and spare rounds that the plan asks for.
        rounds_left: How many of them the ledger would admit, beside what is spent.
        load_seconds: Reading the records and loading the model; once in a run.
        round_seconds: Training one round.
        memory_bytes: Most memory of this process.
        gpu_memory_bytes: Most memory on the GPU; None where none was used.
    """

    plan: str
    dataset: str
    refused: tuple[str, ...]
    bytes_out: int
    update_bytes: int
    epsilon_round: float
    epsilon_run: float
    delta: float
    rounds: int
    rounds_left: int
    load_seconds: float
    round_seconds: float
    memory_bytes: int
    gpu_memory_bytes: int | None


def dry_run(folder: SiteFolder, plan: Plan, dataset: str) -> DryRun:
    """Train one round as the plan says, and look at it.

    Args:
        folder: The site's; it is enrolled and has a policy.
        plan: With the digest of its model.
        dataset: Name of the data source.

    Raises:
        ConfigurationError: The site is not enrolled, or has no such source or no policy.
        DataError: The records do not fit the plan.
        ModelError: The model is not here, or training failed.
        InvalidValue: The plan's cohort does not fit the roster.

    Guarantees:
        Nothing that depends on a patient is written, and the ledger does not change.
    """
    roster, policy = pinned_roster(folder), load_policy(folder.policy)
    begin = time.monotonic()
    trainer = trainer_maker(folder, keep=False)(plan, dataset, lambda _: None)
    if not trainer.units:
        raise DataError(f"data source {dataset!r} has no records that fit the plan")
    tuned, attempt = trainer.tuned(plan), Attempt(run="dry-run", round=1)
    request = TrainRequest(
        plan=plan, attempt=attempt, draw=0, adapter=tuned.start, layout=tuned.layout
    )
    own = own_membership(folder, roster)
    asked = narrowed(request, own_rank(plan, own.name))
    trainer.prepare(asked)
    loaded = time.monotonic()
    trainer.train(asked)
    trained = time.monotonic()
    session = planned_session(
        plan, roster, attempt, task_hash=bytes(32), dimension=request.rule.words
    )
    words, _ = masked_bytes(plan, tuned.layout)
    costs = (update_event(plan, session), metric_event(plan))
    events = [event for event in costs if event is not None]
    count = plan.rounds.count + plan.rounds.spare
    books = (
        read_books(
            folder.ledger,
            folder.identity().public_key,
            epsilon=policy.max_epsilon,
            delta=policy.delta,
        )
        if folder.ledger.exists()
        else Books(epsilon=policy.max_epsilon, delta=policy.delta)
    )
    return DryRun(
        plan=plan.hash().hex(),
        dataset=dataset,
        refused=(*policy.reasons(plan), *source_reasons(folder, plan, policy, dataset)),
        bytes_out=_letters(plan, roster, own.id, request.rule.passes) + words,
        update_bytes=words,
        epsilon_round=epsilon(events, policy.delta),
        epsilon_run=epsilon([event.times(count) for event in events], policy.delta),
        delta=policy.delta,
        rounds=count,
        rounds_left=books.room(events, most=count),
        load_seconds=loaded - begin,
        round_seconds=trained - loaded,
        memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # KiB on Linux
        gpu_memory_bytes=(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None),
    )


def _letters(plan: Plan, roster: Roster, site: int, passes: int = 1) -> int:
    """Bytes of one site's answers in a round, without the masked update.

    A whole session is held among the sites of a round that asks this one, with keys made for it.
    Its update has one coordinate: the length of an update changes the masked words alone.
    """
    keys = {member.id: Identity() for member in roster.members}
    actors = dataclasses.replace(
        roster,
        coordinator=Identity().public_key,
        members=tuple(
            dataclasses.replace(m, public_key=keys[m.id].public_key) for m in roster.members
        ),
    )
    rounds = (Attempt(run="dry-run", round=number) for number in itertools.count(1))
    attempt = next(each for each in rounds if site in asked_sites(plan, actors, each))
    session = planned_session(plan, actors, attempt, task_hash=bytes(32), dimension=1)
    messages = _session(session, actors, keys, site)
    size = 0
    for action in (*("task", "second")[:passes], *[*messages] * passes, "evaluate"):
        parts = {"message": messages[action]} if action in messages else {}
        letter = Letter(
            action=action,
            attempt=attempt,
            site=site,
            code=SiteCode.READY,
            parts=parts | ({"words": b""} if action == "masked" else {}),
            lines=((1, "0" * 64), (2, "0" * 64)),
        )
        size += len(letter.header()) + _SIGNATURE_BYTES + sum(map(len, parts.values()))
    return size


def _session(
    parameters: SessionParameters, roster: Roster, keys: Mapping[int, Identity], site: int
) -> dict[str, bytes]:
    """Hold a session over updates of zeros; one site's messages by action."""
    limits = Limits(
        colluders=parameters.colluders, minimum=parameters.minimum, sites=len(roster.members)
    )
    sessions = {
        member: SiteSession(
            identity=key,
            site=member,
            roster=roster,
            limits=limits,
            memory=VolatileMemory(),
            expected=parameters,
        )
        for member, key in keys.items()
        if member in (parameters.allowed or keys)
    }
    tally, said = Tally(parameters=parameters, roster=roster), dict[str, bytes]()

    def exchange(
        action: str,
        todo: Mapping[int, bytes],
        answer: Callable[[SiteSession, bytes], bytes],
        add: Callable[[int, bytes], None],
    ) -> None:
        for member, message in todo.items():
            reply = answer(sessions[member], message)
            add(member, reply)
            if member == site:
                said[action] = reply

    exchange("hello", dict.fromkeys(sessions, tally.request()), SiteSession.hello, tally.add_hello)
    exchange("shares", tally.close_hellos(), SiteSession.shares, tally.add_shares)
    slots = np.zeros(len(parameters.slots))
    for member, message in tally.close_shares().items():
        zeros = pack(np.zeros(1, dtype=np.float32), slots, parameters, SecureStream())
        header, words = sessions[member].masked(message, zeros)
        tally.add_masked(member, header, words)
        if member == site:
            said["masked"] = header
    exchange("consistency", tally.close_masked(), SiteSession.consistency, tally.add_consistency)
    exchange("unmask", tally.close_consistency(), SiteSession.unmask, tally.add_unmask)
    return said
