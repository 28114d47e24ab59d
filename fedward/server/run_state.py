"""Where a run stands between two rounds: folded from its events."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from fedward import failpoints
from fedward.canonical import canonical_json
from fedward.errors import RoundError
from fedward.plan import Plan
from fedward.server.store import Phase, RunStore
from fedward.server.suspects import Record


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a run stands between rounds.

    Args:
        committed: Rounds that are complete.
        adapter: The adapter's whole state, safetensors bytes.
        previous: Parts of the next task that let sites recompute this adapter; empty at first.
        holders: Sites that have the adapter before this one, as long as the open round has seen no
            attempt: their task needs no adapter.
        attempts: Attempts that the open round has seen.
        missed: The last of them in a row that missed the minimum of sites, if the plan counts them.
        record: What the run's attempts have shown of its sites: one that lies or falls silent again
            and again would cost the others an update each time, until no spare round is left.
    """

    committed: int
    adapter: bytes
    previous: Mapping[str, bytes]
    holders: frozenset[int]
    attempts: int
    missed: int
    record: Record


def fold(store: RunStore, run: str, plan: Plan, start: bytes) -> State:
    """Replay a run's events.

    Args:
        store: Events and blobs.
        run: The run's name.
        plan: What the run was started with.
        start: The adapter's first state.

    Raises:
        RoundError: The run was started with another plan, or the store is damaged.
    """
    committed, attempts, missed, record = 0, 0, 0, Record()
    ready, holders = set[int](), frozenset[int]()
    previous, fallen = dict[str, bytes](), dict[str, bytes]()
    adapter, total = "", ""
    for event in store.events(run):
        facts = json.loads(event.payload)
        if event.phase in {Phase.ABORTED, Phase.COMMITTED}:
            record = record.after(event.attempt.round, facts)
        if event.phase is Phase.STARTED:
            attempts, ready, holders = event.attempt.attempt, set(), frozenset()
            if facts["plan"] != plan.hash().hex():
                raise RoundError(
                    f"run {run!r} was started with another plan "
                    f"({facts['plan'][:12]}): give it that plan, or start a new run"
                )
        elif event.phase is Phase.READY:
            ready.add(event.site)
        elif event.phase is Phase.ABORTED:
            missed = missed + 1 if facts.get("missed") else 0
        elif event.phase is Phase.FALLBACK:
            committed, attempts, missed, holders = event.attempt.round, 0, 0, frozenset()
            adapter, total = facts["adapter"], ""
            previous = fallen = {"fallback": canonical_json([committed, adapter])}
        elif event.phase is Phase.COMMITTED:
            committed, attempts, missed, holders = event.attempt.round, 0, 0, frozenset(ready)
            adapter, total = facts["adapter"], facts["sum"]
            previous = {
                "cohort": canonical_json(facts["cohort"]),
                "attempt": canonical_json(event.attempt.attempt),
                **fallen,
            }
    failpoints.hit("round.folded")
    if total:
        previous["sum"] = store.blob(total)
    return State(
        committed=committed,
        adapter=store.blob(adapter) if committed else start,
        previous=previous,
        holders=holders,
        attempts=attempts,
        missed=missed,
        record=record,
    )
