"""What a ledger's entries say, recomputed from the first: runs, reservations, epsilon, room.

A pure state machine: entries in, state or refusal out. :mod:`fedward.privacy.ledger` writes them.
The first run is fixed before any result was seen, so the PRV accountant judges it alone. Every
later one is judged by a Rényi filter. Epsilon is never stored.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.errors import BudgetExceeded, InvalidValue, LedgerError
from fedward.privacy.accounting import (
    Event,
    SampledGaussian,
    admits,
    epsilon,
    filter_order,
    merged,
    renyi_epsilon,
)
from fedward.privacy.distributed import SharedGaussian

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
    events: tuple[Event, ...]
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
    def whole(self) -> tuple[Event, ...]:
        """All that was ever allowed to it."""
        return tuple(event.times(self.reservations) for event in self.events)

    @property
    def spent(self) -> tuple[Event, ...]:
        return tuple(event.times(len(self.sent)) for event in self.events)

    @property
    def committed(self) -> tuple[Event, ...]:
        """What was spent and still may be."""
        return self.spent if self.closed else self.whole


class Books:
    """The runs of one patient population, as the entries of its ledger tell them.

    Args:
        entries: Every entry so far, in order.
        epsilon: Lifetime cap, > 0; ``inf`` in simulations without privacy.
        delta: Lifetime delta, 0 < delta < 1.

    Raises:
        LedgerError: An entry (named by its line) cannot follow those before it.
    """

    def __init__(
        self, entries: Iterable[Mapping[str, Any]] = (), *, epsilon: float, delta: float
    ) -> None:
        if not epsilon > 0:
            raise InvalidValue("epsilon", epsilon, "above 0, or inf in simulation")
        if not 0 < delta < 1:
            raise InvalidValue("delta", delta, "above 0 and below 1")
        self._epsilon, self._delta = epsilon, delta
        self._runs: dict[str, _Run] = {}
        for number, entry in enumerate(entries, start=1):
            try:
                self._runs[entry["run"]] = self._after(entry)
            except (LedgerError, BudgetExceeded, KeyError, TypeError, InvalidValue) as error:
                raise LedgerError(
                    f"line {number} of the ledger does not follow: {error}"
                ) from error

    @property
    def cap(self) -> tuple[float, float]:
        """Lifetime epsilon and delta."""
        return self._epsilon, self._delta

    @property
    def runs(self) -> tuple[str, ...]:
        """The names of all runs, oldest first."""
        return tuple(self._runs)

    def closed(self, run: str) -> bool:
        """Whether a run was ended; False for an unknown run."""
        return run in self._runs and self._runs[run].closed

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

    def sent_number(self, attempt: Attempt) -> int:
        """Which of its run's spent reservations an attempt's is, from 1; 0 if it is not spent."""
        state = self._runs.get(attempt.run)
        sent = frozenset[Order]() if state is None else state.sent
        return sum(order <= attempt.order for order in sent) if attempt.order in sent else 0

    def remaining(self, run: str) -> int:
        """Reservations that a run may still take; 0 for an unknown or closed run."""
        state = self._runs.get(run)
        if state is None or state.closed:
            return 0
        return state.reservations - len(state.sent) - len(state.open)

    def events(self) -> tuple[Event, ...]:
        """All that was spent, merged, recomputed from the entries."""
        return merged([event for run in self._runs.values() for event in run.spent])

    def committed(self) -> tuple[Event, ...]:
        """All that was spent and all that open runs still may spend, merged."""
        return merged([event for run in self._runs.values() for event in run.committed])

    def epsilon_spent(self, delta: float | None = None) -> float:
        """What was spent so far: by PRV for one run, by Rényi accounting for several.

        Args:
            delta: 0 < delta < 1; the ledger's own if left out.
        """
        several = sum(bool(run.sent) for run in self._runs.values()) > 1
        return self._cost(self.events(), delta, several=several)

    def epsilon_committed(self, delta: float | None = None) -> float:
        """What will have been spent if every open run takes all that it was admitted with."""
        several = sum(bool(run.sent) or not run.closed for run in self._runs.values()) > 1
        return self._cost(self.committed(), delta, several=several)

    def epsilon_alone(self, delta: float | None = None) -> float:
        """What was spent so far if somebody knew the noise of all other sites.

        In ``local`` mode that is :meth:`epsilon_spent`: all noise is the site's own. In ``pooled``
        mode it is what the site's share alone gives, should more sites collude than the plan says.
        """
        several = sum(bool(run.sent) for run in self._runs.values()) > 1
        return self._cost([_alone(e) for e in self.events()], delta, several=several)

    def room(self, events: Sequence[Event], *, most: int = 100_000) -> int:
        """The most reservations that a new run would be admitted with now, 0 to ``most``.

        Args:
            events: What one reservation costs, with 1 step or more.
            most: Where to stop counting.
        """

        def refused(n: int) -> bool:
            try:
                self._admit(tuple(event.times(n) for event in events), "")
            except BudgetExceeded:
                return True
            return False

        # PRV is dear and admits a little more than the filter does: begin where that one ends.
        low, step = 0, 1
        if not self._counting() and math.isfinite(self._epsilon):
            low = bisect_left(range(1, most + 1), True, key=self._filter_refuses(events))
        while low + step <= most and not refused(low + step):
            low, step = low + step, 2 * step
        return low + bisect_left(range(low + 1, min(low + step, most + 1)), True, key=refused)

    def _filter_refuses(self, events: Sequence[Event]) -> Callable[[int], bool]:
        def refuses(n: int) -> bool:
            return renyi_epsilon([e.times(n) for e in events], self._delta) > self._epsilon

        return refuses

    def _counting(self) -> list[_Run]:
        """The runs that released something, or still may: any other is as if it had not been."""
        return [run for run in self._runs.values() if run.sent or not run.closed]

    def _cost(self, events: Sequence[Event], delta: float | None, *, several: bool) -> float:
        return (renyi_epsilon if several else epsilon)(
            events, self._delta if delta is None else delta
        )

    def _known(self, run: str) -> _Run:
        if run not in self._runs:
            raise LedgerError(f"run {run!r} is not in the ledger; open_run first")
        return self._runs[run]

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

    def _admit(self, new: tuple[Event, ...], run: str) -> tuple[float, bool]:
        """The filter's order and whether PRV alone admits the run, or raise."""
        others = self._counting()
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


def to_entry(event: Event) -> Json:
    """An event as the ledger writes it: a list of three numbers, or named ones for shared noise."""
    if isinstance(event, SharedGaussian):
        return asdict(event)
    return [event.noise_multiplier, event.sampling_rate, event.steps]


def _from_entry(event: Any) -> Event:  # noqa: ANN401  # JSON; what does not fit raises
    if isinstance(event, dict):
        return SharedGaussian(**event)
    sigma, rate, steps = event
    return SampledGaussian(noise_multiplier=sigma, sampling_rate=rate, steps=steps)


def _alone(event: Event) -> Event:
    return replace(event, shares=1) if isinstance(event, SharedGaussian) else event


def _order(entry: Mapping[str, Any]) -> Order:
    return (entry["round"], entry["session"], entry["attempt"])


def _opened(entry: Mapping[str, Any]) -> _Run:
    return _Run(
        plan=entry["plan"],
        events=tuple(_from_entry(event) for event in entry["events"]),
        reservations=entry["reservations"],
        order=entry["order"],
        alone=entry["alone"],
    )
