"""A site's ledger of privacy: it reserves before data is touched, and refuses beyond the cap.

::

    open_run ──> reserve ──> mark_sent        spent for good, once
                   │  ╰────> reserve          same round and session: the next attempt takes over
                   ╰───────> release, or a later round's reserve: given back, nothing had left
    close_run: what the run has not sent, it never will

One ledger serves one patient population: all runs, data versions and objectives. The first run is
fixed before any result was seen, so the PRV accountant judges it alone. Every later one is judged
by a Rényi filter. Epsilon is always recomputed from the entries, never stored.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from fedward.attempt import Attempt
from fedward.errors import BudgetExceeded, InvalidValue, LedgerError
from fedward.identity import Identity
from fedward.privacy.accounting import (
    SampledGaussian,
    admits,
    epsilon,
    filter_order,
    merged,
    renyi_epsilon,
)
from fedward.privacy.chain import Chain

Order = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the entries say about one run; every transition checks itself.

    Args:
        plan: Hex hash of the plan.
        events: What one reservation costs.
        reservations: Most reservations that may ever be spent.
        order: Rényi order of the filter that judges the runs after it.
        alone: Whether PRV admitted it as the population's first run.
        open: Reservations not yet sent.
        sent: Attempts whose update left, or may have left.
        last: The newest attempt seen.
    """

    plan: str
    events: tuple[SampledGaussian, ...]
    reservations: int
    order: float
    alone: bool
    open: frozenset[Order] = frozenset()
    sent: frozenset[Order] = frozenset()
    last: Order = (0, 0, 0)
    closed: bool = False

    def reserve(self, order: Order) -> "_Run":
        if self.closed:
            raise LedgerError("the run is closed; start a new one")
        if order <= self.last:
            raise LedgerError(
                f"attempt {order} is not newer than {self.last}; a stale task or a replay"
            )
        kept = frozenset(o for o in self.open if o[0] == order[0] and o[:2] != order[:2])
        if len(self.sent) + len(kept) >= self.reservations:
            raise BudgetExceeded(
                f"all {self.reservations} reservations of the run are spent or held; "
                "it goes on without this site"
            )
        return replace(self, open=kept | {order}, last=order)

    def mark_sent(self, order: Order) -> "_Run":
        if order not in self.open:
            raise LedgerError(f"attempt {order} holds no reservation; reserve before sending")
        return replace(self, open=self.open - {order}, sent=self.sent | {order})

    def release(self) -> "_Run":
        return replace(self, open=frozenset())

    def close(self) -> "_Run":
        return replace(self, open=frozenset(), closed=True)

    @property
    def whole(self) -> tuple[SampledGaussian, ...]:
        """All that was ever allowed to it."""
        return tuple(event.times(self.reservations) for event in self.events)

    @property
    def spent(self) -> tuple[SampledGaussian, ...]:
        return tuple(event.times(len(self.sent)) for event in self.events)

    @property
    def committed(self) -> tuple[SampledGaussian, ...]:
        """What was spent and still may be."""
        return self.spent if self.closed else self.whole


class Ledger:
    """The open ledger of one patient population at one site.

    Args:
        chain: The file, held by this ledger alone.
        epsilon: Lifetime cap, > 0; ``inf`` in simulations without privacy.
        delta: Lifetime delta, 0 < delta < 1.

    Guarantees:
        Whatever the caller and the coordinator do, and wherever the process is killed, all updates
        marked sent before they left are together (epsilon, delta)-DP for adding or removing one
        unit. A reservation settles once; none is ever under-counted.
    """

    def __init__(self, chain: Chain, *, epsilon: float, delta: float) -> None:
        if not epsilon > 0:
            raise InvalidValue("epsilon", epsilon, "above 0, or inf in simulation")
        if not 0 < delta < 1:
            raise InvalidValue("delta", delta, "above 0 and below 1")
        self._chain, self._epsilon, self._delta = chain, epsilon, delta
        self._runs: dict[str, _Run] = {}
        for number, entry in enumerate(chain.entries, start=1):
            try:
                self._runs[entry["run"]] = self._after(entry)
            except (LedgerError, BudgetExceeded, KeyError, TypeError, InvalidValue) as error:
                raise LedgerError(
                    f"line {number} of the ledger does not follow: {error}"
                ) from error

    @classmethod
    def open(cls, path: Path, identity: Identity, *, epsilon: float, delta: float) -> Self:
        """Open or make the ledger at ``path`` under a lifetime cap.

        Raises:
            LedgerError: See :class:`~fedward.privacy.chain.Chain`.
        """
        chain = Chain(path, identity, purpose="fedward ledger")
        return cls(chain, epsilon=epsilon, delta=delta)

    @property
    def head(self) -> tuple[int, str]:
        """Number of entries and hash of the last, for an anchor outside."""
        return self._chain.head

    def check_anchor(self, seq: int, head: str) -> None:
        """Refuse a ledger that is behind a head kept elsewhere (a restored disk).

        Raises:
            LedgerRolledBack: It is behind, or it is another one.
        """
        self._chain.check_anchor(seq, head)

    def line(self, seq: int) -> str:
        """The hash of an entry by its number from 1.

        Raises:
            LedgerRolledBack: There are fewer.
        """
        return self._chain.line(seq)

    def close(self) -> None:
        """Let the file go."""
        self._chain.close()

    def open_run(
        self,
        run: str,
        plan_hash: bytes,
        event: SampledGaussian,
        reservations: int,
        *,
        metrics: SampledGaussian | None = None,
    ) -> None:
        """Admit a run under the cap; asking again for the same run changes nothing.

        Args:
            run: The run's name.
            plan_hash: Hash of the frozen plan, 32 bytes.
            event: What one reservation costs: the steps of one round.
            reservations: Rounds and spare rounds, >= 1.
            metrics: What the metrics of one round cost beside it.

        Raises:
            BudgetExceeded: The whole run does not fit beside what is spent and committed.
            LedgerError: The run is known with another plan, event or number, or is closed.
        """
        if reservations < 1:
            raise InvalidValue("reservations", reservations, "1 or more")
        events = (event,) if metrics is None else (event, metrics)
        if not merged(events):
            raise InvalidValue("steps", 0, "1 or more in an event")
        known = self._runs.get(run)
        if known is not None:
            if known.closed:
                raise LedgerError(f"run {run!r} is closed; start a new one")
            if (known.plan, known.events, known.reservations) != (
                plan_hash.hex(), events, reservations
            ):  # fmt: skip
                raise LedgerError(f"run {run!r} is known with another plan or cost; refuse it")
            return
        order, alone = self._admit(tuple(e.times(reservations) for e in events), run)
        self._write(
            {
                "kind": "run",
                "run": run,
                "plan": plan_hash.hex(),
                "events": [[e.noise_multiplier, e.sampling_rate, e.steps] for e in events],
                "reservations": reservations,
                "order": order,
                "alone": alone,
            }
        )

    def reserve(self, attempt: Attempt) -> None:
        """Hold the cost of one round before its data is touched; durable on return.

        An unsent reservation of the same round and session passes to this attempt; unsent ones of
        earlier rounds are given back.

        Raises:
            BudgetExceeded: Everything the run was admitted with is spent or held.
            LedgerError: Unknown or closed run, or the attempt is not newer than the last.
        """
        self._write(_entry("reserve", attempt))

    def mark_sent(self, attempt: Attempt) -> None:
        """Spend a reservation for good; durable on return. Send only afterwards.

        A second call for the same attempt changes nothing, so that spooled bytes can go out again.

        Raises:
            LedgerError: The attempt holds no reservation.
        """
        if attempt.order not in self._known(attempt.run).sent:
            self._write(_entry("sent", attempt))

    def release(self, run: str) -> None:
        """Give back the unsent reservations of a run; it may reserve again.

        Raises:
            LedgerError: Unknown run.
        """
        if self._known(run).open:
            self._write({"kind": "release", "run": run})

    def close_run(self, run: str) -> None:
        """End a run: what it has not spent is free for others, and it can never go on.

        Raises:
            LedgerError: Unknown run.
        """
        if not self._known(run).closed:
            self._write({"kind": "close", "run": run})

    def spent(self, run: str) -> int:
        """Reservations of a run that are spent; 0 for an unknown run."""
        return len(self._runs[run].sent) if run in self._runs else 0

    def plan_of(self, run: str) -> bytes | None:
        """The plan hash that a run was opened with; None for an unknown run."""
        return bytes.fromhex(self._runs[run].plan) if run in self._runs else None

    def spent_in(self, attempt: Attempt) -> int:
        """Reservations that are spent in an attempt's session, by earlier attempts at it."""
        state = self._runs.get(attempt.run)
        sent = frozenset[Order]() if state is None else state.sent
        return sum(order[:2] == attempt.order[:2] for order in sent)

    def remaining(self, run: str) -> int:
        """Reservations that a run may still take; 0 for an unknown or closed run."""
        state = self._runs.get(run)
        if state is None or state.closed:
            return 0
        return state.reservations - len(state.sent) - len(state.open)

    def events(self) -> tuple[SampledGaussian, ...]:
        """All that was spent, merged, recomputed from the entries."""
        return merged([event for run in self._runs.values() for event in run.spent])

    def epsilon_spent(self, delta: float | None = None) -> float:
        """What was spent so far: by PRV for one run, by Rényi accounting for several.

        Args:
            delta: 0 < delta < 1; the ledger's own if left out.
        """
        delta = self._delta if delta is None else delta
        several = sum(bool(run.sent) for run in self._runs.values()) > 1
        return (renyi_epsilon if several else epsilon)(self.events(), delta)

    def _known(self, run: str) -> _Run:
        if run not in self._runs:
            raise LedgerError(f"run {run!r} is not in the ledger; open_run first")
        return self._runs[run]

    def _write(self, entry: dict[str, Any]) -> None:
        after = self._after(entry)  # raises before anything is written
        self._chain.append(entry)
        self._runs[entry["run"]] = after

    def _after(self, entry: Mapping[str, Any]) -> _Run:
        """The run's state after an entry, both when it is written and when it is read again."""
        kind, run = entry["kind"], entry["run"]
        if kind == "run":
            if run in self._runs:
                raise LedgerError(f"run {run!r} was opened twice")
            return _opened(entry)
        state = self._known(run)
        if kind == "reserve":
            return state.reserve(_order(entry))
        if kind == "sent":
            return state.mark_sent(_order(entry))
        if kind == "release":
            return state.release()
        if kind == "close":
            return state.close()
        raise LedgerError(f"unknown kind of entry {kind!r}; a newer version wrote it")

    def _admit(self, new: tuple[SampledGaussian, ...], run: str) -> tuple[float, bool]:
        """The filter's order and whether PRV alone admits the run, or raise.

        A run that released nothing and never will is as if it had not been.
        """
        others = [r for r in self._runs.values() if r.sent or not r.closed]
        if math.isinf(self._epsilon):
            return 2.0, not others
        if not others:
            cost = epsilon(new, self._delta)
            if cost <= self._epsilon:
                return filter_order(new, epsilon=self._epsilon, delta=self._delta), True
            raise BudgetExceeded(
                f"run {run!r} would cost epsilon {cost:.3f} at delta {self._delta:g}; the cap is "
                f"{self._epsilon:g}. Ask for more noise or fewer rounds, or raise the cap"
            )
        first = others[0]
        history = [event for r in others for event in r.committed]
        fits = admits(
            history, new, order=first.order, epsilon=self._epsilon, delta=self._share(first)
        )
        if fits:
            return first.order, False
        raise BudgetExceeded(
            f"run {run!r} does not fit beside the {len(others)} before it under epsilon "
            f"{self._epsilon:g} at delta {self._delta:g}. Close runs that will not go on, ask for "
            "more noise or fewer rounds, or raise the cap"
        )

    def _share(self, first: _Run) -> float:
        """The filter's part of delta.

        Where the filter could have admitted the first run, it has vouched for everything. Where
        only PRV could, the guarantee can fail in two ways, so both must hold at half of delta.
        """
        cap: dict[str, float] = {"order": first.order, "epsilon": self._epsilon}
        if not first.alone or admits([], first.whole, delta=self._delta, **cap):
            return self._delta
        if epsilon(first.whole, self._delta / 2) <= self._epsilon:
            return self._delta / 2
        raise BudgetExceeded(
            "the first run was admitted with the population's whole budget, so that none can "
            "follow; raise the cap"
        )


def _entry(kind: str, attempt: Attempt) -> dict[str, Any]:
    round_, session, number = attempt.order
    return {
        "kind": kind, "run": attempt.run, "round": round_, "session": session, "attempt": number,
    }  # fmt: skip


def _order(entry: Mapping[str, Any]) -> Order:
    return (entry["round"], entry["session"], entry["attempt"])


def _opened(entry: Mapping[str, Any]) -> _Run:
    return _Run(
        plan=entry["plan"],
        events=tuple(
            SampledGaussian(noise_multiplier=sigma, sampling_rate=rate, steps=steps)
            for sigma, rate, steps in entry["events"]
        ),
        reservations=entry["reservations"],
        order=entry["order"],
        alone=entry["alone"],
    )
