"""The round engine: opens rounds, runs sessions over a Flower ``Grid``, commits the next adapter.

Every transition is an event in the store before the engine goes on, so a run can be killed
anywhere: the next start folds the events, repeats at most the open round as a new attempt, and
never asks for a committed round again.

A round: task (train and reserve) → hello → shares → masked → consistency → unmask → commit. A site
that is late, silent or wrong is left out and recorded; too few sites end the attempt.
"""

import time
from collections.abc import Callable, Mapping

import numpy as np
from flwr.serverapp import Grid

from fedward import failpoints
from fedward.aggregation.masks import Words
from fedward.aggregation.packing import check_mean
from fedward.aggregation.planned import planned_session
from fedward.aggregation.rules import Rule
from fedward.aggregation.tally import SumResult, Tally
from fedward.aggregation.transcript import task_hash
from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.errors import (
    CohortTooSmall,
    IdentityError,
    LedgerRolledBack,
    ProtocolError,
    RoundError,
    SiteCode,
)
from fedward.identity import Identity, Roster
from fedward.messages import MESSAGE_TYPES, Letter, open_letter, seal_letters
from fedward.plan import Plan
from fedward.server.anchors import Anchors
from fedward.server.replies import Clock, collect
from fedward.server.run_state import State, fold
from fedward.server.store import EVERYBODY, Phase, RunStore
from fedward.server.suspects import blame, proven
from fedward.tuning.vector import (
    Layout,
    layout_to_bytes,
    moments_of,
    replace_vector,
    vector_of,
)

Observer = Callable[[Attempt, Phase, int, Json], None]
"""Told of every event after it is durable: attempt, phase, site (or EVERYBODY), facts."""


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
    ) -> None:
        if identity.public_key != roster.coordinator:
            raise IdentityError("the coordinator's key is not the one in the roster")
        self._plan, self._run, self._identity = plan, run, identity
        self._roster, self._nodes, self._store = roster, dict(nodes), store
        self._start, self._layout, self._observer = start, layout, observer
        self._left_out = set[tuple[Attempt, int]]()
        self._tally: Tally | None = None
        self._silent = frozenset[int]()
        self._anchors, self._clock = Anchors(identity, roster, store), clock
        self._fallback, self._after = fallback, plan.fallback.after if plan.fallback else 0

    def run(self, grid: Grid) -> bytes:
        """Run every round that is not committed yet; returns the final adapter.

        Raises:
            CohortTooSmall: Fewer sites than the minimum can take part.
            RoundError: A round failed in every attempt, or the store belongs to another plan.
        """
        state = self._fold()
        while state.committed < self._plan.rounds.count:
            if self._falls(state):
                self._train_alone(state)
            else:
                self._round(grid, state)
            state = self._fold()
        return state.adapter

    @property
    def adapter(self) -> bytes:
        """The adapter after the last committed round."""
        return self._fold().adapter

    def _fold(self) -> State:
        return fold(self._store, self._run, self._plan, self._start)

    def _round(self, grid: Grid, state: State) -> None:
        """Try a round until it is committed."""
        most = max(self._plan.rounds.spare + _EXTRA_ATTEMPTS, self._after)
        first, last, failure = state.attempts + 1, state.attempts + most, ""
        for number in range(first, last + 1):
            attempt = Attempt(run=self._run, round=state.committed + 1, attempt=number)
            self._tally, self._silent = None, frozenset()
            try:
                self._record(attempt, Phase.STARTED, {"plan": self._plan.hash().hex()})
                failpoints.hit("round.started")
                result = self._session(grid, attempt, state)
                failpoints.hit("round.summed")
                adapter = self._next(state, result)
            except (ProtocolError, CohortTooSmall) as error:
                hopeless = isinstance(error, _NoHope)
                facts: dict[str, Json] = {"reason": str(error), **self._blame(error)}
                if self._after:  # sites that refuse are there, and may yet agree
                    facts["missed"] = isinstance(error, CohortTooSmall) and not hopeless
                self._record(attempt, Phase.ABORTED, facts)
                if hopeless:
                    raise CohortTooSmall(str(error)) from error
                failure, state = str(error), self._fold()
                if self._falls(state):
                    return
                continue
            self._commit(attempt, adapter, result)
            return
        raise RoundError(
            f"round {state.committed + 1} failed in {last - first + 1} attempts; the last: "
            f"{failure}"
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
        self._record(attempt, Phase.FALLBACK, facts)

    def _next(self, state: State, result: SumResult) -> bytes:
        """The next adapter; a sum that every site would refuse is never committed."""
        mean, settings, before = result.mean, self._plan.aggregation, state.adapter
        check_mean(mean, result.parameters, result.cohort, settings.update_clip)
        rule = self._rule(result.parameters.attempt)
        start = vector_of(before, rule.trained)
        vector, moments = rule.advance(start, moments_of(before), mean)
        if not all(np.isfinite(part).all() for part in (vector, *moments.values())):
            raise ProtocolError("the next adapter is not finite: lower server_learning_rate")
        return replace_vector(before, rule.trained, vector, moments)

    def _rule(self, attempt: Attempt) -> Rule:
        return Rule(settings=self._plan.aggregation, layout=self._layout, attempt=attempt)

    def _commit(self, attempt: Attempt, adapter: bytes, result: SumResult) -> None:
        facts: Json = {
            "adapter": self._store.put_blob(adapter),
            "sum": self._store.put_blob(result.words.tobytes()),
            "cohort": list(result.cohort),
            "transcript": result.transcript.hex(),
            **({} if self._plan.metrics is None else {"slots": result.slots}),
            **self._blame(),
        }
        failpoints.hit("round.kept")
        self._record(attempt, Phase.COMMITTED, facts)
        failpoints.hit("round.committed")

    def _session(self, grid: Grid, attempt: Attempt, state: State) -> SumResult:
        """One execution of the protocol, from the task to the sum."""
        settings = self._plan.aggregation
        parameters = planned_session(  # refuses a plan that does not fit before anybody trains
            self._plan,
            self._roster,
            attempt,
            task_hash=task_hash(state.adapter, self._plan.hash(), settings.scheme),
            dimension=self._rule(attempt).words,
        )
        ready = self._invite(grid, attempt, state)
        tally = self._tally = Tally(parameters=parameters, roster=self._roster)
        todo = dict.fromkeys(ready, tally.request())
        for action, phase, add, close in (
            ("hello", Phase.KEYS, tally.add_hello, tally.close_hellos),
            ("shares", Phase.SHARED, tally.add_shares, tally.close_shares),
            ("masked", Phase.MASKED, tally.add_masked, tally.close_masked),
            ("consistency", Phase.CONSISTENT, tally.add_consistency, tally.close_consistency),
        ):
            self._exchange(grid, attempt, action, phase, todo, add)
            todo = close()
            failpoints.hit("round.closed")
        self._exchange(grid, attempt, "unmask", Phase.UNMASKED, todo, tally.add_unmask)
        return tally.result()

    def _exchange(
        self,
        grid: Grid,
        attempt: Attempt,
        action: str,
        phase: Phase,
        todo: Mapping[int, bytes],
        add: Callable[..., None],
    ) -> None:
        """One exchange of the session: a message to each site, every good answer to the tally."""
        letters, _ = self._ask(grid, attempt, action, {s: {"message": m} for s, m in todo.items()})
        silent = set(todo) - set(self._suspects())
        for site, letter in sorted(letters.items()):
            try:
                if action == "masked":
                    add(site, letter.part("message"), self._words(letter.part("words")))
                else:
                    add(site, letter.part("message"))
            except (ProtocolError, IdentityError) as error:
                self._leave_out(attempt, site, action, str(error))
            else:
                silent.discard(site)
                facts = self._anchors.learn(letter) if phase is Phase.MASKED else None
                self._record(attempt, phase, facts, site=site)
        self._silent = frozenset(silent)

    def _suspects(self) -> Mapping[int, frozenset[int]]:
        """What the complaints of the last session come to, by the site that complained."""
        return self._tally.suspects if self._tally else {}

    def _blame(self, error: Exception | None = None) -> dict[str, Json]:
        return blame(self._suspects().values(), self._silent, error)

    def _refusal(self, letter: Letter) -> str:
        """Why a site did not do as asked: its code, and what its complaint comes to."""
        if self._tally is None or letter.action != "masked" or "complaint" not in letter.parts:
            return str(letter.code)
        try:
            suspects = self._tally.add_complaint(letter.site, letter.parts["complaint"])
        except ProtocolError as error:
            return f"{letter.code}: {error}"
        return f"{letter.code}: at fault is " + " or ".join(f"site {s}" for s in sorted(suspects))

    def _words(self, data: bytes) -> Words:
        """The words of a masked vector, as the site sent them."""
        word = np.dtype(f"<u{self._plan.aggregation.word_bits // 8}")
        if len(data) % word.itemsize:
            raise ProtocolError(f"{len(data)} bytes are not whole words")
        return np.frombuffer(data, dtype=word)

    def _invite(self, grid: Grid, attempt: Attempt, state: State) -> list[int]:
        """Send the task to every site and return those that trained in time."""
        short = {
            "plan": self._plan.to_json(),
            "layout": layout_to_bytes(self._layout),
            **state.previous,
        }
        # Who took part in the round before has its adapter, and makes this one from the sum. If it
        # has not, it says so, and the next attempt sends everybody everything.
        whole = {**short, "adapter": state.adapter}
        enough = state.holders if self._rule(attempt).recomputes else frozenset[int]()
        parts = {site: short if site in enough else whole for site in self._nodes}
        minimum, colluders = self._plan.cohort.minimum, self._plan.cohort.colluders
        out = proven(state.record.groups, colluders)
        away = state.record.away(
            self._nodes, minimum=minimum, colluders=colluders, number=attempt.round
        )
        todo = [site for site in self._nodes if site not in out | away]
        self._record(attempt, Phase.INVITED, {"sites": todo})
        ready, refused = self._ask(grid, attempt, "task", {s: parts[s] for s in todo})
        if len(ready) < minimum and away:  # so few are left that these are needed
            todo += away
            late = self._ask(grid, attempt, "task", {s: parts[s] for s in away})
            ready, refused = ready | late[0], refused | late[1]
        for site, letter in ready.items():
            self._record(attempt, Phase.READY, self._anchors.learn(letter), site=site)
        if len(ready) < minimum:
            reasons = "; ".join(f"{self._name(s)}: {why}" for s, why in sorted(refused.items()))
            message = (
                f"round {attempt.round}: {len(ready)} of {len(todo)} sites are ready, "
                f"{minimum} are needed ({reasons})"
            )
            hope = {s for s, why in refused.items() if why in {_SILENT, SiteCode.REFUSED_STALE}}
            hope |= state.holders & refused.keys()  # they may have lacked the adapter
            raise (CohortTooSmall if len(ready) + len(hope) >= minimum else _NoHope)(message)
        return sorted(ready)

    def _ask(
        self, grid: Grid, attempt: Attempt, action: str, todo: Mapping[int, Mapping[str, bytes]]
    ) -> tuple[dict[int, Letter], dict[int, str]]:
        """Send each site its parts; collect signed replies until the deadline.

        Returns:
            The letters of sites that did as asked, and for every other site why it is left out.
        """
        nodes = {self._nodes[site]: site for site in todo}
        letters = [
            Letter(
                action=action,
                attempt=attempt,
                site=site,
                parts=parts,
                receipt=self._anchors.receipt(site),
            )
            for site, parts in todo.items()
        ]
        messages = [
            grid.create_message(
                content=content,
                message_type=MESSAGE_TYPES[action],
                dst_node_id=self._nodes[site],
                group_id=str(attempt.round),
            )
            for site, content in zip(
                todo, seal_letters(letters, self._identity, "coordinator"), strict=True
            )
        ]
        accepted, refused = dict[int, Letter](), dict.fromkeys(todo, _SILENT)
        failpoints.hit("round.asked")
        found = collect(grid, messages, self._plan.rounds.deadline_seconds, self._clock)
        failpoints.hit("round.answered")
        for message in found:
            site = nodes.get(message.metadata.src_node_id)
            if site is None or message.has_error():
                continue
            try:
                letter = open_letter(message.content, self._roster.key(site), "site")
                if (letter.site, letter.attempt, letter.action) != (site, attempt, action):
                    refused[site] = "answered another letter"
                elif letter.code not in {SiteCode.READY, SiteCode.DONE}:
                    refused[site] = self._refusal(letter)
                else:
                    self._anchors.check(site, letter.lines)
                    accepted[site] = letter
                    refused.pop(site, None)
            except (IdentityError, LedgerRolledBack) as error:
                refused[site] = str(error)
        for site, reason in refused.items():
            self._leave_out(attempt, site, action, reason)
        return accepted, refused

    def _leave_out(self, attempt: Attempt, site: int, action: str, reason: str) -> None:
        """Record why a site is out of an attempt: the first reason is the one that counts.

        A survivor whose vote is missing is asked for its shares all the same, and may fail again.
        """
        if (attempt, site) in self._left_out:
            return
        self._left_out.add((attempt, site))
        self._record(attempt, Phase.LEFT_OUT, {"at": action, "reason": reason}, site=site)

    def _record(
        self, attempt: Attempt, phase: Phase, facts: Json = None, *, site: int = EVERYBODY
    ) -> None:
        self._store.record(attempt, phase, facts, site=site)
        self._observer(attempt, phase, site, facts)

    def _name(self, site: int) -> str:
        return self._roster.member(site).name


class _NoHope(CohortTooSmall):
    """So many sites refuse that another attempt would fail alike."""


_SILENT = "no answer"
