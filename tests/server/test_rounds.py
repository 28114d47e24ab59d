"""The round engine over real sites: whoever is late, silent or wrong costs itself at most."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedward.aggregation.planned import planned_session
from fedward.aggregation.schemes import next_vector
from fedward.aggregation.server_optimizer import next_state
from fedward.attempt import Attempt
from fedward.client.app import client_app
from fedward.client.policy import Policy
from fedward.errors import CohortTooSmall, DataError, IdentityError, RoundError
from fedward.identity import Identity
from fedward.messages import MESSAGE_TYPES, Letter, open_letter, seal_letter
from fedward.plan import Plan
from fedward.plan_aggregation import Aggregation
from fedward.server.rounds import RoundEngine
from fedward.server.store import EVERYBODY, Phase, RunStore
from fedward.simulations.grid import FIRST_NODE, LocalGrid
from fedward.tuning.vector import moments_of, vector_of
from tests.client.desk import LAYOUT, PLAN, POLICY, RUN, START, Desk, other_plan

HASTY = dataclasses.replace(PLAN, rounds=dataclasses.replace(PLAN.rounds, deadline="1s"))
LIAR = 1


class Rig:
    """A coordinator with a store of its own, and sites on a grid that may tamper."""

    def __init__(
        self,
        folder: Path,
        *,
        grid: type[LocalGrid] = LocalGrid,
        plan: Plan = PLAN,
        sites: int = 4,
        policy: Policy = POLICY,
    ) -> None:
        self.folder, self.plan = folder, plan
        self.desk = Desk(folder / "sites", sites=sites, policy=policy)
        self.store = RunStore(folder / "store")
        self.nodes = {site: site + FIRST_NODE for site in range(sites)}
        self.seen, self.told = list[Message](), list[Any]()
        made: Any = grid(
            {node: self.factory(site) for site, node in self.nodes.items()},
            watch=self.seen.append,
        )
        made.rig = self
        self.grid = made

    def factory(self, site: int) -> Callable[[], ClientApp]:
        return lambda: client_app(self.desk.agents[site])

    def engine(self, **changes: Any) -> RoundEngine:
        given: dict[str, Any] = {
            "plan": self.plan,
            "run": RUN,
            "identity": self.desk.identity,
            "roster": self.desk.roster,
            "nodes": self.nodes,
            "store": self.store,
            "start": START,
            "layout": LAYOUT,
            "observer": lambda *event: self.told.append(event),
        }
        return RoundEngine(**(given | changes))

    def run(self, **changes: Any) -> bytes:
        return self.engine(**changes).run(self.grid)

    def facts(self, phase: Phase) -> list[tuple[int, Any]]:
        found = [event for event in self.store.events(RUN) if event.phase is phase]
        return [(event.site, json.loads(event.payload)) for event in found]

    @property
    def cohorts(self) -> list[list[int]]:
        return [facts["cohort"] for _, facts in self.facts(Phase.COMMITTED)]

    def close(self) -> None:
        self.grid.close()
        self.store.close()
        self.desk.close()


@pytest.fixture
def make_rig(tmp_path):
    rigs = []

    def make(**options):
        rigs.append(Rig(tmp_path, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def test_every_round_is_committed_once_and_the_adapter_follows_from_the_sums(make_rig):
    rig = make_rig()
    adapter = rig.run()
    assert rig.cohorts == [[0, 1, 2, 3]] * 3
    vector = vector_of(START, LAYOUT)
    for number, (_, facts) in enumerate(rig.facts(Phase.COMMITTED), start=1):
        attempt = Attempt(run=RUN, round=number)
        parameters = planned_session(
            PLAN, rig.desk.roster, attempt, task_hash=bytes(32), dimension=10
        )
        words = np.frombuffer(rig.store.blob(facts["sum"]), dtype=np.int32)
        vector = next_vector(vector, words * parameters.grid.gamma / 4)
        assert np.array_equal(vector_of(rig.store.blob(facts["adapter"]), LAYOUT), vector)
    assert np.array_equal(vector_of(adapter, LAYOUT), vector)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_sites_recompute_what_a_server_optimizer_does(make_rig, optimizer):
    aggregation = Aggregation(scheme="fedavg", optimizer=optimizer, server_learning_rate=0.5)
    plan = dataclasses.replace(PLAN, aggregation=aggregation)
    rig = make_rig(plan=plan)
    adapter = rig.run()
    assert rig.cohorts == [[0, 1, 2, 3]] * 3
    without = {parts for (number, *_), parts in tasks(rig).items() if number > 1}
    assert without == {frozenset({"plan", "layout", "sum", "cohort", "attempt"})}
    vector, moments = vector_of(START, LAYOUT), moments_of(START)
    for number, (_, facts) in enumerate(rig.facts(Phase.COMMITTED), start=1):
        attempt = Attempt(run=RUN, round=number)
        parameters = planned_session(
            plan, rig.desk.roster, attempt, task_hash=bytes(32), dimension=10
        )
        words = np.frombuffer(rig.store.blob(facts["sum"]), dtype=np.int32)
        mean = words * parameters.grid.gamma / 4
        vector, moments = next_state(vector, moments, mean, aggregation)
    assert np.array_equal(vector_of(adapter, LAYOUT), vector)
    assert moments_of(adapter).keys() == moments.keys()


def tasks(rig: Rig) -> dict[tuple[int, int, int], frozenset[str]]:
    """Round, attempt and site of each task that was sent, with the names of its parts."""
    sent = [m for m in rig.seen if m.metadata.message_type == "train"]
    asked = [m.content for m in sent if m.metadata.dst_node_id in rig.nodes.values()]
    letters = [open_letter(c, rig.desk.identity.public_key, "coordinator") for c in asked]
    return {(t.attempt.round, t.attempt.attempt, t.site): frozenset(t.parts) for t in letters}


def test_who_has_the_last_adapter_is_sent_the_sum_alone(make_rig):
    rig = make_rig()
    rig.run()
    told = {"plan", "layout"}, {"sum", "cohort", "attempt"}
    for (number, _, _), parts in tasks(rig).items():
        assert parts == (told[0] | {"adapter"} if number == 1 else told[0] | told[1])


def test_a_site_that_lost_the_last_adapter_is_sent_it_in_the_next_attempt(make_rig):
    rig = make_rig(sites=3)

    def lose(attempt: Attempt, phase: Phase, site: int, facts: object) -> None:
        if (attempt.round, phase) == (1, Phase.COMMITTED):
            rig.desk.files[2][1]._task_file(RUN).unlink()

    rig.run(observer=lose)
    assert rig.cohorts == [[0, 1, 2]] * 3
    sent = tasks(rig)
    assert [a for n, a, s in sent if n == 2 and s == 2] == [1, 2]
    assert all("adapter" in sent[2, 2, site] for site in range(3))
    assert "adapter" not in sent[3, 1, 2]


def test_the_phases_of_a_round_come_in_their_order(make_rig):
    rig = make_rig()
    rig.run()
    events = [e for e in rig.store.events(RUN) if e.attempt.round == 1]
    order = list(dict.fromkeys(event.phase for event in events))
    expected = [
        phase
        for phase in Phase
        if phase not in {Phase.LEFT_OUT, Phase.ABORTED, Phase.REFUSED, Phase.FALLBACK}
    ]
    assert order == expected
    for phase in (Phase.READY, Phase.KEYS, Phase.SHARED, Phase.MASKED, Phase.UNMASKED):
        assert sorted(e.site for e in events if e.phase is phase) == [0, 1, 2, 3]
    for phase in (Phase.STARTED, Phase.INVITED, Phase.COMMITTED):
        assert [e.site for e in events if e.phase is phase] == [EVERYBODY]


def test_whoever_watches_is_told_what_is_durable_already(make_rig):
    rig = make_rig()
    told = []

    def observe(attempt, phase, site, facts):
        last = rig.store.events(RUN)[-1]
        assert (last.attempt, last.phase, last.site) == (attempt, phase, site)
        assert json.loads(last.payload) == facts
        told.append(phase)

    rig.run(observer=observe)
    assert len(told) == len(rig.store.events(RUN))


def test_a_finished_run_asks_nobody_again(make_rig):
    rig = make_rig()
    adapter = rig.run()
    messages, events = len(rig.seen), len(rig.store.events(RUN))
    assert rig.run() == adapter == rig.engine().adapter
    assert (len(rig.seen), len(rig.store.events(RUN))) == (messages, events)


def test_a_run_goes_on_with_its_plan_only(make_rig):
    rig = make_rig()
    rig.run()
    with pytest.raises(RoundError, match="was started with another plan"):
        rig.run(plan=other_plan())


def test_the_coordinator_has_the_key_that_the_roster_names(make_rig):
    with pytest.raises(IdentityError, match="not the one in the roster"):
        make_rig().engine(identity=Identity(bytes([66]) * 32))


class DeafGrid(LocalGrid):
    """Messages to one site never arrive, and nothing comes back."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        arriving = [m for m in messages if m.metadata.dst_node_id != LIAR + FIRST_NODE]
        lost = ["lost"] * (len(messages) - len(arriving))
        return [*super().push_messages(arriving), *lost]


def test_a_silent_site_costs_the_deadline_and_is_left_out(make_rig):
    plan = dataclasses.replace(HASTY, rounds=dataclasses.replace(HASTY.rounds, count=1))
    rig = make_rig(grid=DeafGrid, plan=plan)
    rig.run()
    assert rig.cohorts == [[0, 2, 3]]
    assert rig.facts(Phase.LEFT_OUT) == [(LIAR, {"at": "task", "reason": "no answer"})]


class StalledGrid(LocalGrid):
    """The coordinator stands still over the first survivors: no answer to them arrives."""

    stalled = False

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        if self.stalled or messages[0].metadata.message_type != MESSAGE_TYPES["consistency"]:
            return super().push_messages(messages)
        self.stalled = True
        return [f"lost {number}" for number in range(len(messages))]


def test_a_silence_of_all_is_nobodys(make_rig):
    """The next attempt would leave out a site that has done nothing, and a second one for good."""
    plan = dataclasses.replace(HASTY, rounds=dataclasses.replace(HASTY.rounds, count=1))
    rig = make_rig(grid=StalledGrid, plan=plan)
    rig.run()
    ((_, aborted),) = rig.facts(Phase.ABORTED)
    assert "silent" not in aborted
    assert rig.cohorts == [[0, 1, 2, 3]]


class LyingGrid(LocalGrid):
    """One site's answers in round 1 are changed; the change is signed with its true key."""

    rig: Rig
    action = ""

    def change(self, letter: Letter) -> Letter:
        return letter

    def _deliver(self, message: Message) -> Message:
        reply = super()._deliver(message)
        metadata = reply.metadata
        if metadata.src_node_id != LIAR + FIRST_NODE or metadata.group_id != "1":
            return reply
        desk = self.rig.desk
        letter = open_letter(reply.content, desk.roster.key(LIAR), "site")
        if letter.action != self.action:
            return reply
        return Message(seal_letter(self.change(letter), desk.keys[LIAR], "site"), reply_to=message)


def with_parts(letter: Letter, **parts: bytes) -> Letter:
    return dataclasses.replace(letter, parts={**letter.parts, **parts})


def other_words(letter: Letter) -> Letter:
    words = np.frombuffer(letter.part("words"), dtype=np.uint32) + np.uint32(1)
    return with_parts(letter, words=words.tobytes())


def without(letter: Letter) -> Letter:
    return dataclasses.replace(letter, parts={})


LIES: dict[str, tuple[str, Callable[[Letter], Letter], str]] = {
    "another-site": ("task", lambda x: dataclasses.replace(x, site=0), "another letter"),
    "another-round": (
        "task",
        lambda x: dataclasses.replace(x, attempt=Attempt(run=RUN, round=2)),
        "another letter",
    ),
    "another-action": ("hello", lambda x: dataclasses.replace(x, action="shares"), "another"),
    "no-code": ("task", lambda x: dataclasses.replace(x, code=None), "None"),
    "no-message": ("hello", without, "needs the part 'message'"),
    "garbage-hello": ("hello", lambda x: with_parts(x, message=b"\0" * 40), ""),
    "garbage-shares": ("shares", lambda x: with_parts(x, message=b"[]"), ""),
    "words-not-signed": ("masked", other_words, "not the one it signed"),
    "half-a-word": ("masked", lambda x: with_parts(x, words=b"123"), "not whole words"),
    "too-few-words": ("masked", lambda x: with_parts(x, words=bytes(8)), "10"),
    "no-words": ("masked", lambda x: with_parts(x, words=b""), "10"),
    "no-vote": ("consistency", without, "needs the part"),
    "garbage-vote": ("consistency", lambda x: with_parts(x, message=b"{}"), ""),
    "no-shares": ("unmask", without, "needs the part"),
    "garbage-shares-released": ("unmask", lambda x: with_parts(x, message=b"x"), ""),
}


@pytest.mark.parametrize(("action", "change", "reason"), LIES.values(), ids=LIES)
def test_a_lying_site_is_left_out_and_the_others_sum_is_exact(make_rig, action, change, reason):
    rig = make_rig(grid=LyingGrid)
    rig.grid.action, rig.grid.change = action, change
    rig.run()
    counted = action in {"consistency", "unmask"}  # its masked update was in already
    assert rig.cohorts == [[0, 1, 2, 3] if counted else [0, 2, 3], *[[0, 1, 2, 3]] * 2]
    left_out = rig.facts(Phase.LEFT_OUT)
    assert [(site, facts["at"]) for site, facts in left_out] == [(LIAR, action)]
    assert reason in left_out[0][1]["reason"]
    assert rig.facts(Phase.ABORTED) == []


class ForgingGrid(LyingGrid):
    """Somebody answers in a site's name without its key."""

    def _deliver(self, message: Message) -> Message:
        reply = LocalGrid._deliver(self, message)
        if message.metadata.dst_node_id != LIAR + FIRST_NODE:
            return reply
        desk = self.rig.desk
        letter = open_letter(reply.content, desk.roster.key(LIAR), "site")
        return Message(seal_letter(letter, desk.keys[0], "site"), reply_to=message)


def test_nobody_speaks_for_another_site(make_rig):
    rig = make_rig(grid=ForgingGrid)
    rig.run()
    assert rig.cohorts == [[0, 2, 3]] * 3
    reasons = {facts["reason"] for _, facts in rig.facts(Phase.LEFT_OUT)}
    assert reasons == {"signature does not verify under the pinned key"}


def test_a_site_that_fails_says_a_code_and_is_asked_again_next_round(make_rig):
    rig = make_rig()
    rig.desk.trainers[LIAR].error = DataError("CANARY")

    def mend(attempt, phase, site, facts):
        if phase is Phase.COMMITTED:
            rig.desk.trainers[LIAR].error = None

    rig.run(observer=mend)
    assert rig.cohorts == [[0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert rig.facts(Phase.LEFT_OUT) == [(LIAR, {"at": "task", "reason": "data-unusable"})]


def test_below_the_minimum_the_run_ends_with_every_sites_code(make_rig):
    rig = make_rig()
    for site in (0, 3):
        rig.desk.trainers[site].error = DataError("CANARY")
    with pytest.raises(CohortTooSmall) as caught:
        rig.run()
    assert str(caught.value) == (
        "round 1: 2 of 4 sites are ready, 3 are needed "
        "(site 0: data-unusable; site 3: data-unusable)"
    )
    assert len(rig.facts(Phase.STARTED)) == 1


def test_silent_sites_may_come_back_so_the_round_is_tried_a_few_times(make_rig):
    rig = make_rig()
    for site in (0, 3):
        rig.grid.kill(rig.nodes[site])
    with pytest.raises(RoundError, match=r"round 1 failed in 4 attempts.*no answer"):
        rig.run()
    rig.grid.revive(rig.nodes[0])
    rig.run()
    assert rig.cohorts == [[0, 1, 2]] * 3
    committed = [e for e in rig.store.events(RUN) if e.phase is Phase.COMMITTED]
    assert [event.attempt.attempt for event in committed] == [5, 1, 1]


def test_a_site_whose_fault_ended_an_attempt_is_left_out_of_the_rest_of_the_run(make_rig):
    """Each round anew, it would cost the others one update, until no spare round is left."""
    rig = make_rig()
    first = Attempt(run=RUN, round=1)
    rig.store.record(first, Phase.STARTED, {"plan": PLAN.hash().hex()})
    rig.store.record(first, Phase.ABORTED, {"reason": "another secret", "suspects": [[LIAR]]})
    rig.run()
    assert rig.cohorts == [[0, 2, 3]] * 3


def test_a_sum_that_the_sites_would_refuse_is_not_committed(make_rig, monkeypatch):
    """Committed, it would end the run: no honest site trains on what it cannot recompute."""
    rig = make_rig()
    liar, honest = rig.desk.agents[LIAR], rig.desk.agents[LIAR]._words

    def too_long(work):
        monkeypatch.setattr(liar, "_words", honest)
        return np.full(10, 1 << 30, dtype=np.uint32)  # twice the clip in each coordinate

    monkeypatch.setattr(liar, "_words", too_long)
    rig.run()
    [(_, facts)] = rig.facts(Phase.ABORTED)
    assert facts["reason"].endswith("at least one of the sites 0, 1, 2, 3 sent too much")
    assert facts["suspects"] == [[0, 1, 2, 3]]
    assert rig.cohorts == [[0, 2, 3], [0, 1, 3], [0, 1, 2]], "who may have lied takes turns"


@pytest.mark.parametrize(("bits", "at"), [(16, Phase.KEYS), (32, Phase.CONSISTENT)])
def test_a_site_that_missed_the_committed_attempt_trains_on(make_rig, bits, at):
    """Neither the rotation nor the cohort of the attempt that it was in is the committed one's."""
    aggregation = dataclasses.replace(PLAN.aggregation, word_bits=bits)
    rig = make_rig(plan=dataclasses.replace(PLAN, aggregation=aggregation))

    def away(*sites: int) -> None:
        for site, node in rig.nodes.items():
            (rig.grid.kill if site in sites else rig.grid.revive)(node)

    def observe(attempt, phase, site, facts):
        if (attempt.order, phase) == ((1, 1, 1), at):
            away(2, 3)
        elif phase is Phase.ABORTED:
            away(LIAR)
        elif phase is Phase.COMMITTED:
            away()

    rig.run(observer=observe)
    assert len(rig.facts(Phase.ABORTED)) == 1
    assert rig.cohorts == [[0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_a_damaged_store_ends_the_run_before_anybody_is_asked(make_rig):
    rig = make_rig()
    rig.run()
    asked = len(rig.seen)
    for path in (rig.folder / "store" / "blobs").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(RoundError, match="damaged"):
        rig.run()
    assert len(rig.seen) == asked
