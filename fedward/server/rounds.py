"""The round engine: opens rounds, has their sessions run, commits the next adapter.

Every transition is an event in the store before the engine goes on, so a run can be killed
anywhere: the next start folds the events, repeats at most the open round as a new attempt, and
never asks for a committed round again.

A round: task (train and reserve) → its sessions (hello → shares → masked → consistency → unmask) →
commit. Too few sites end the attempt.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flwr.serverapp import Grid

from fedward import failpoints
from fedward.aggregation.control import next_control, split_control
from fedward.aggregation.groups import FEWEST, groups_of
from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.participants import asked_sites
from fedward.aggregation.planned import planned_session
from fedward.aggregation.published import SumResult
from fedward.aggregation.rules import Rule
from fedward.aggregation.transcript import second_task_hash, task_hash
from fedward.attempt import Attempt
from fedward.canonical import Json, canonical_json
from fedward.errors import CohortTooSmall, IdentityError, ProtocolError, RoundError, SiteCode
from fedward.identity import Identity, Roster
from fedward.plan import Plan
from fedward.server.gate import Loss, judge
from fedward.server.replies import Clock
from fedward.server.run_state import Fold, State
from fedward.server.sessions import SILENT, Observer, Sessions
from fedward.server.store import Phase, RunStore
from fedward.server.summed import Mean, Summed, checked_mean
from fedward.server.suspects import proven
from fedward.tuning.vector import (
    Layout,
    layout_to_bytes,
    moments_of,
    replace_vector,
    vector_of,
)

_EXTRA_ATTEMPTS = 3
"""Attempts at one round in one go beyond the plan's spare rounds, for those that cost nothing."""


class RoundEngine:
    """Executes one run.

    Args:
        plan: The frozen plan.
        run: The run's name.
        identity: The coordinator's key, the one the roster names.
        roster: The member sites.
        nodes: Site id → Flower node id.
        store: Where events and blobs are kept.
        start: The adapter's first state.
        layout: Names and shapes of the trainable tensors, in the order of an update.
        observer: Told of every event.
        clock: What deadlines are measured by; only simulations replace it.
        fallback: From a round's number and the adapter to the next, if the plan has ``[fallback]``.
        gate: Tries an adapter on the coordinator's own records, if the plan has ``[gate]``.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        run: str,
        identity: Identity,
        roster: Roster,
        nodes: Mapping[int, int],
        store: RunStore,
        start: bytes,
        layout: Layout,
        observer: Observer = lambda *_: None,
        clock: Clock = time,
        fallback: Callable[[int, bytes], bytes] | None = None,
        gate: Loss | None = None,
    ) -> None:
        if identity.public_key != roster.coordinator:
            raise IdentityError("the coordinator's key is not the one in the roster")
        self._plan, self._run = plan, run
        self._roster, self._nodes, self._store = roster, tuple(nodes), store
        self._layout = layout
        self._sessions = Sessions(
            identity=identity,
            roster=roster,
            nodes=nodes,
            store=store,
            observer=observer,
            clock=clock,
            deadline=plan.rounds.deadline_seconds,
        )
        self._gate = gate
        self._fallback, self._after = fallback, plan.fallback.after if plan.fallback else 0
        self._fold = Fold(store, run, plan, start).state

    def run(self, grid: Grid) -> bytes:
        """Run every round that is not committed yet; returns the final adapter.

        Raises:
            CohortTooSmall: Fewer sites than the minimum can take part.
            RoundError: A round failed in every attempt, the gate refused as many in a row as the
                plan bears, or the store belongs to another plan.
        """
        state = self._fold()
        while state.committed < self._plan.rounds.count:
            if self._falls(state):
                self._train_alone(state)
            else:
                self._round(grid, state)
            state = self._fold()
            self._check_refusals(state)
        return state.adapter

    @property
    def adapter(self) -> bytes:
        """The adapter after the last committed round."""
        return self._fold().adapter

    def _round(self, grid: Grid, state: State) -> None:
        """Try a round until it is complete."""
        if self._plan.gate is not None:
            self._loss(state.adapter)  # what is wrong with the gate shows before anybody trains
        most = max(self._plan.rounds.spare + _EXTRA_ATTEMPTS, self._after)
        first, last, failure = state.attempts + 1, state.attempts + most, ""
        for number in range(first, last + 1):
            attempt = Attempt(
                run=self._run, round=state.committed + 1, session=state.session, attempt=number
            )
            self._sessions.forget()
            try:
                self._sessions.record(attempt, Phase.STARTED, {"plan": self._plan.hash().hex()})
                failpoints.hit("round.started")
                summed = self._sums(grid, attempt, state)
                failpoints.hit("round.summed")
                adapter, mean = self._next(state, summed)
            except (ProtocolError, CohortTooSmall) as error:
                hopeless = isinstance(error, _NoHope)
                facts: dict[str, Json] = {"reason": str(error), **self._sessions.blame(error)}
                if self._after:  # sites that refuse are there, and may yet agree
                    facts["missed"] = isinstance(error, CohortTooSmall) and not hopeless
                self._sessions.record(attempt, Phase.ABORTED, facts)
                if hopeless:
                    raise CohortTooSmall(str(error)) from error
                failure, state = str(error), self._fold()
                if self._falls(state):
                    return
                continue
            self._complete(state, adapter, mean, summed)
            return
        raise RoundError(
            f"round {state.committed + 1} failed in {last - first + 1} attempts; the last: "
            f"{failure}"
        )

    def _loss(self, adapter: bytes) -> float:
        if self._gate is None:
            raise RoundError("the plan has a [gate], and nobody is here to try its adapters")
        return self._gate(adapter)

    def _check_refusals(self, state: State) -> None:
        """Stop when the gate has refused many rounds in a row, and again after as many more."""
        gate, more = self._plan.gate, state.committed < self._plan.rounds.count
        if gate is not None and more and state.refused and state.refused % gate.refusals == 0:
            raise RoundError(
                f"the gate refused {state.refused} rounds in a row, up to round {state.committed} "
                "(fedward run watch shows why): look at the sites and at [gate], then resume"
            )

    def _falls(self, state: State) -> bool:
        """Whether the open round is the coordinator's own to complete."""
        return 0 < self._after <= state.missed

    def _train_alone(self, state: State) -> None:
        """Complete a round that too few sites came to; they approve its adapter when they do."""
        if self._fallback is None:
            raise RoundError("the plan has a [fallback], and nobody is here to train its job")
        attempt = Attempt(run=self._run, round=state.committed + 1, attempt=state.attempts)
        adapter = self._fallback(attempt.round, state.adapter)
        vector_of(adapter, self._layout)  # raises unless it fits
        facts: Json = {"adapter": self._store.put_blob(adapter), "missed": state.missed}
        self._sessions.record(attempt, Phase.FALLBACK, facts)

    def _next(self, state: State, summed: Summed) -> tuple[bytes, Mean]:
        """The next adapter and the mean behind it; no sum is taken that a site would refuse."""
        mean, second = summed.means(self._plan.aggregation.update_clip)
        before, rule = state.adapter, self._rule(summed.first.parameters.attempt)
        start = vector_of(before, rule.trained)
        control, moments = split_control(moments_of(before))
        vector, moments = rule.advance(start, moments, mean, second)
        moments |= next_control(control, mean, self._plan, self._roster, summed.first.cohort)
        if not all(np.isfinite(part).all() for part in (vector, *moments.values())):
            raise ProtocolError("the next adapter is not finite: lower server_learning_rate")
        return replace_vector(before, rule.trained, vector, moments), mean

    def _rule(self, attempt: Attempt) -> Rule:
        return Rule(settings=self._plan.aggregation, layout=self._layout, attempt=attempt)

    def _complete(self, state: State, adapter: bytes, mean: Mean, summed: Summed) -> None:
        """Record what the round came to, under its last session: committed, or refused."""
        refusal, figures = "", dict[str, Json]()
        if self._plan.gate is not None:
            refusal, figures = judge(
                self._plan.gate, self._loss, state.adapter, adapter, mean, state.lowest
            )
        facts: Json = {
            "adapter": self._store.put_blob(state.adapter if refusal else adapter),
            **summed.facts(self._store.put_blob),
            **({} if self._plan.metrics is None else {"slots": summed.slots}),
            **self._sessions.blame(),
            **({"gate": figures} if figures else {}),
            **({"reason": refusal} if refusal else {}),
        }
        failpoints.hit("round.kept")
        phase = Phase.REFUSED if refusal else Phase.COMMITTED
        self._sessions.record(summed.results[-1].parameters.attempt, phase, facts)
        failpoints.hit("round.committed")

    def _sums(self, grid: Grid, attempt: Attempt, state: State) -> Summed:
        """The round's sessions, from the task to the sums."""
        settings, rule = self._plan.aggregation, self._rule(attempt)
        todo, away = self._todo(attempt, state)
        sessions = [  # refuses a plan that does not fit before anybody trains
            planned_session(
                self._plan,
                self._roster,
                attempt,
                task_hash=task_hash(state.adapter, self._plan.hash(), settings.scheme),
                dimension=rule.words,
                group=group,
            )
            for group in groups_of(self._plan.cohort, self._roster, attempt, todo)
        ]
        if self._plan.cohort.groups > 1:
            ready = self._invite(grid, attempt, state, todo, frozenset())
            return self._groups(grid, sessions, ready)
        ready = self._invite(grid, attempt, state, todo, away)
        first = self._sessions.run(grid, sessions[0], ready)
        return self._second(grid, first) if rule.passes == 2 else Summed(results=(first,))

    def _groups(
        self, grid: Grid, sessions: Sequence[SessionParameters], ready: Sequence[int]
    ) -> Summed:
        """A session of each group, one after the other; what is lost in one is lost there alone.

        Sites for want of which an attempt is lost stay away from the next, whose groups are others.
        """
        results, lost = list[SumResult](), list[str]()
        inside = [[site for site in ready if site in each.group] for each in sessions]
        short = [len(sites) < each.minimum for sites, each in zip(inside, sessions, strict=True)]
        for parameters, sites, small in zip(sessions, inside, short, strict=True):
            try:
                if small:
                    raise CohortTooSmall(f"{len(sites)} sites of a group are ready")
                if len(sessions) - sum(short) < FEWEST:
                    continue  # nothing leaves a site in vain
                result = self._sessions.run(grid, parameters, sites)
                checked_mean(result, self._plan.aggregation.update_clip)
            except (ProtocolError, CohortTooSmall) as error:
                lost.append(str(error))
                self._sessions.end(error, set(parameters.group) - set(sites))
            else:
                results.append(result)
                self._sessions.end()
        if len(results) < FEWEST:
            reasons = "; ".join(lost)
            raise CohortTooSmall(
                f"{len(sessions) - len(lost)} of {len(sessions)} groups are left, {FEWEST} are "
                f"needed ({reasons})"
            )
        dealt = tuple(sorted(site for each in sessions for site in each.group))
        return Summed(results=tuple(results), dealt=dealt)

    def _second(self, grid: Grid, first: SumResult) -> Summed:
        """The second pass: the survivors of the first once more, and none of them may be missing.

        The next attempt is at another session, for new updates: whoever was lost between the two
        would be read out of sums over other sites.
        """
        before = first.parameters.attempt
        attempt = dataclasses.replace(before, session=before.session + 1)
        basis = self._rule(before).basis(checked_mean(first, self._plan.aggregation.update_clip))
        total, data = first.words.tobytes(), basis.tobytes()
        parameters = planned_session(
            self._plan,
            self._roster,
            attempt,
            task_hash=second_task_hash(first.parameters.task_hash, first.outcome, total, data),
            dimension=self._rule(attempt).words,
            cohort=first.cohort,
        )
        self._sessions.record(attempt, Phase.INVITED, {"sites": list(first.cohort)})
        parts = {"sum": total, "basis": data}
        todo = {site: parts for site in first.cohort}  # noqa: C420  # one dictionary, not changed
        _, refused = self._sessions.ask(grid, attempt, "second", todo)
        if refused:
            gone = "; ".join(f"{self._name(s)}: {why}" for s, why in sorted(refused.items()))
            raise CohortTooSmall(f"the second pass needs every site of the first ({gone})")
        second = self._sessions.run(grid, parameters, first.cohort)
        return Summed(results=(first, second), basis=basis)

    def _todo(self, attempt: Attempt, state: State) -> tuple[list[int], frozenset[int]]:
        """Whom an attempt asks at first, and who stays away unless so few are left."""
        cohort = self._plan.cohort
        colluders = max(1, cohort.colluders) * cohort.groups  # of each group
        drawn = asked_sites(self._plan, self._roster, attempt)
        sites = [site for site in self._nodes if site in drawn]
        out = proven(state.record.groups, colluders)
        away = state.record.away(
            sites,
            minimum=cohort.minimum * cohort.groups,
            colluders=colluders,
            number=attempt.round,
        )
        return sorted({*sites} - out - away), away.intersection(sites)

    def _invite(
        self,
        grid: Grid,
        attempt: Attempt,
        state: State,
        todo: list[int],
        away: frozenset[int],
    ) -> list[int]:
        """Send the task to these sites and return those that trained in time."""
        short = {
            "plan": self._plan.to_json(),
            "layout": layout_to_bytes(self._layout),
            **state.previous,
            **({"dealt": canonical_json(todo)} if self._plan.cohort.groups > 1 else {}),
        }
        # Who took part in the round before has its adapter, and makes this one from the sum. If it
        # has not, it says so, and the next attempt sends everybody everything.
        whole = {**short, "adapter": state.adapter}
        enough = state.holders if self._rule(attempt).recomputes else frozenset[int]()
        parts = {site: short if site in enough else whole for site in self._nodes}
        if self._plan.rounds.scaffold:  # from which of its updates a control variate goes on
            for site in state.counted.keys() & parts.keys():
                parts[site] = {**parts[site], "counted": canonical_json(state.counted[site])}
        minimum = self._plan.cohort.minimum * min(self._plan.cohort.groups, FEWEST)
        self._sessions.record(attempt, Phase.INVITED, {"sites": todo})
        ready, refused = self._sessions.ask(grid, attempt, "task", {s: parts[s] for s in todo})
        if len(ready) < minimum and away:  # so few are left that these are needed
            todo = [*todo, *away]
            late = self._sessions.ask(grid, attempt, "task", {s: parts[s] for s in away})
            ready, refused = ready | late[0], refused | late[1]
        self._sessions.ready(attempt, ready)
        if len(ready) < minimum:
            reasons = "; ".join(f"{self._name(s)}: {why}" for s, why in sorted(refused.items()))
            message = (
                f"round {attempt.round}: {len(ready)} of {len(todo)} sites are ready, "
                f"{minimum} are needed ({reasons})"
            )
            stale = {s for s, why in refused.items() if why == SiteCode.REFUSED_STALE}
            if len(stale) >= minimum:
                message += _BEHIND
            hope = stale | {s for s, why in refused.items() if why == SILENT}
            hope |= state.holders & refused.keys()  # they may have lacked the adapter
            others = self._plan.rounds.participants is not None  # whom the next attempt asks
            again = others or len(ready) + len(hope) >= minimum
            raise (CohortTooSmall if again else _NoHope)(message)
        return sorted(ready)

    def _name(self, site: int) -> str:
        return self._roster.member(site).name


_BEHIND = (
    ". They have taken part in a later round than this coordinator knows of, as after its disk was "
    "restored: bring back the newest copy of its folder, or abort this run and start another"
)


class _NoHope(CohortTooSmall):
    """So many sites refuse that another attempt would fail alike."""
