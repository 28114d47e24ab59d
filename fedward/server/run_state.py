"""Where a run stands between two rounds: folded from its events."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedward import failpoints
from fedward.canonical import canonical_json
from fedward.errors import RoundError
from fedward.plan import Plan
from fedward.server.store import BEGINNING, Event, Phase, RunStore
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
        session: Where the next attempt at the open round begins: at 1, and after a second pass that
            was lost at the session behind it.
        attempts: Attempts that the open round has seen.
        refused: Rounds in a row that the gate has refused, up to the last one that is complete.
        lowest: The lowest loss that the gate has found since the start, or the last fallback.
        missed: The last of them in a row that missed the minimum of sites, if the plan counts them.
        counted: For each site the round, session and attempt of its last update in a committed sum.
        record: What the run's attempts have shown of its sites: one that lies or falls silent again
            and again would cost the others an update each time, until no spare round is left.
    """

    committed: int
    adapter: bytes
    previous: Mapping[str, bytes]
    holders: frozenset[int]
    session: int
    attempts: int
    refused: int
    lowest: float
    missed: int
    counted: Mapping[int, tuple[int, int, int]]
    record: Record


class Fold:
    """A run's state by its events; each event is read and checked once, however often it is asked.

    Args:
        store: Events and blobs.
        run: The run's name.
        plan: What the run was started with.
        start: The adapter's first state.
    """

    def __init__(self, store: RunStore, run: str, plan: Plan, start: bytes) -> None:
        self._store, self._run, self._plan, self._start = store, run, plan.hash().hex(), start
        self._mark, self._record = BEGINNING, Record()
        self._committed = self._attempts = self._missed = self._refused = 0
        self._session, self._lowest = 1, math.inf
        self._ready, self._holders = set[int](), frozenset[int]()
        self._previous, self._fallen = dict[str, bytes](), dict[str, bytes]()
        self._adapter, self._counted = "", dict[int, tuple[int, int, int]]()
        self._sums: Mapping[str, str] = {}

    def state(self) -> State:
        """Where the run stands now.

        Raises:
            RoundError: The run was started with another plan, or the store is damaged.
        """
        events, mark = self._store.events_after(self._run, self._mark)
        for event in events:
            self._take(event)
        self._mark = mark
        failpoints.hit("round.folded")
        sums = {name: self._store.blob(blob) for name, blob in self._sums.items()}
        return State(
            committed=self._committed,
            adapter=self._store.blob(self._adapter) if self._committed else self._start,
            previous={**self._previous, **sums},
            holders=self._holders,
            session=self._session,
            attempts=self._attempts,
            refused=self._refused,
            lowest=self._lowest,
            missed=self._missed,
            counted=self._counted,
            record=self._record,
        )

    def _take(self, event: Event) -> None:
        facts = json.loads(event.payload)
        if event.phase in {Phase.ABORTED, Phase.COMMITTED, Phase.REFUSED}:
            self._record = self._record.after(event.attempt.round, facts)
        if event.phase is Phase.STARTED:
            self._attempts, self._ready = event.attempt.attempt, set()
            self._holders = frozenset()
            if facts["plan"] != self._plan:
                raise RoundError(
                    f"run {self._run!r} was started with another plan "
                    f"({facts['plan'][:12]}): give it that plan, or start a new run"
                )
        elif event.phase is Phase.INVITED:
            self._session = event.attempt.session | 1  # a second pass is even
        elif event.phase is Phase.READY:
            self._ready.add(event.site)
        elif event.phase is Phase.ABORTED:
            self._missed = self._missed + 1 if facts.get("missed") else 0
        elif event.phase is Phase.REFUSED:  # who was ready in it has the adapter that stays
            refused = self._refused + 1
            self._end_round(event, facts["adapter"], self._sums, frozenset(self._ready))
            first, self._refused = self._committed - refused + 1, refused
            self._previous = {
                **self._previous,
                "refused": canonical_json([first, self._committed]),
            }
        elif event.phase is Phase.FALLBACK:
            self._end_round(event, facts["adapter"], {}, frozenset())
            self._lowest = math.inf
            self._fallen = {"fallback": canonical_json([self._committed, self._adapter])}
            self._previous = self._fallen
        elif event.phase is Phase.COMMITTED:
            sums = {name: facts[name] for name in ("sum", "first", "basis") if name in facts}
            self._end_round(event, facts["adapter"], sums, frozenset(self._ready))
            gate = facts.get("gate", {})  # null: not finite
            found = [gate[key] for key in ("lowest", "after") if gate.get(key) is not None]
            self._lowest = min([self._lowest, *found])
            _, session, number = event.attempt.order
            now = dict.fromkeys(facts["cohort"], event.attempt.order)
            self._counted = self._counted | now
            self._previous = {
                "cohort": canonical_json(facts.get("groups", facts["cohort"])),
                "attempt": canonical_json(number if session == 1 else [session, number]),
                **self._fallen,
            }

    def _end_round(
        self, event: Event, adapter: str, sums: Mapping[str, str], holders: frozenset[int]
    ) -> None:
        self._committed, self._adapter, self._sums = event.attempt.round, adapter, sums
        self._session, self._attempts, self._missed, self._holders = 1, 0, 0, holders
        self._refused = 0
