"""Scheme ``sketch`` in whole federations: two sums over the same sites, or the round is lost."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Message

from fedward.aggregation.packing import unpack
from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.planned import planned_session
from fedward.aggregation.products import split
from fedward.aggregation.published import SumResult
from fedward.aggregation.rules import Rule, masked_bytes
from fedward.aggregation.transcript import second_task_hash
from fedward.attempt import Attempt
from fedward.canonical import Json, digest
from fedward.client.narrow import widened
from fedward.errors import CohortTooSmall, InvalidValue, ProtocolError, RoundError
from fedward.messages import MESSAGE_TYPES
from fedward.plan import Metrics, Plan, Tuner
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.server.rounds import RoundEngine
from fedward.server.run_state import Fold, State
from fedward.server.sessions import Observer
from fedward.server.store import Phase
from fedward.simulations.federation import RUN
from fedward.simulations.grid import FIRST_NODE
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import vector_of
from tests.simulations import tiny
from tests.simulations.test_federation import Accident, bytes_of_masked, reviving_at_once
from tests.simulations.test_kill import Killed

SKETCH = Aggregation(scheme="sketch", update_clip=10.0)
ROUNDS = tiny.make_rounds(steps=3, optimizer="sgd", learning_rate=0.5, spare=2)
VICTIM = 1


@pytest.fixture
def plan(base):
    return tiny.make_plan(base, aggregation=SKETCH, rounds=ROUNDS)


def product_error(
    plan: Plan,
    before: bytes,
    after: bytes,
    updates: Sequence[npt.NDArray[np.float32]],
    weights: Sequence[float] | None = None,
) -> tuple[float, float]:
    """Relative distance of each product from the best rank of the plain mean, new and apart."""
    layout = tuned_model(plan).layout
    start, found = vector_of(before, layout), vector_of(after, layout)
    new = apart = 0.0
    for pair in split(layout)[0]:
        products = [np.matmul(*pair.factors(start + update)) for update in updates]
        u, sizes, v = np.linalg.svd(
            np.average(products, axis=0, weights=weights), full_matrices=False
        )
        best = (u[:, : pair.r] * sizes[: pair.r]) @ v[: pair.r]
        size = np.linalg.norm(best)
        mean = start + np.average(updates, axis=0, weights=weights)
        new = max(new, float(np.linalg.norm(np.matmul(*pair.factors(found)) - best) / size))
        apart = max(apart, float(np.linalg.norm(np.matmul(*pair.factors(mean)) - best) / size))
    return new, apart


def test_the_adapter_is_the_best_of_its_rank_of_the_mean_of_products(tmp_path, plan):
    trainers, seen = tiny.recorders(tiny.make_sites(3)), list[Message]()
    federation = tiny.make_federation(tmp_path, plan, trainers, watch=seen.append)
    federation.run()
    assert tiny.cohorts(tmp_path) == [[0, 1, 2]] * 2
    before = tuned_model(plan).start
    for number, (attempt, facts) in enumerate(tiny.facts_of(tmp_path, Phase.COMMITTED)):
        assert attempt.order == (number + 1, 2, 1)
        after = tiny.blob(tmp_path, facts["adapter"])
        updates = [trainer.results[number].update for trainer in trainers.values()]
        new, apart = product_error(plan, before, after, updates)
        assert new < 1e-4 < 1e-2 < apart, "control: the means of A and B apart"
        before = after
    announced = masked_bytes(plan, tuned_model(plan).layout)
    sizes = bytes_of_masked(federation, seen)
    assert len(sizes) == 2 * 2 * 3
    assert {sum(sizes[site::3][:2]) for site in range(3)} == {announced[0]}
    for site, name in enumerate(federation.names):
        assert tiny.sent(tmp_path, site) == [(1, 1, 1), (2, 1, 1)], "the second pass costs nothing"
        assert federation.epsilon_spent(name) <= plan.privacy.epsilon


class Lost:
    """Kills one site at an action of the first second pass."""

    def __init__(self, action: str) -> None:
        self.kind, self.passes, self.happened = MESSAGE_TYPES[action], 0, False
        self.second = action == "second"

    def __call__(self, node: int, message: Message) -> bool:
        metadata = message.metadata
        if (node, metadata.message_type) != (VICTIM + FIRST_NODE, self.kind):
            return False
        self.passes += 1
        now = self.passes == (1 if self.second else 2) and not self.happened
        self.happened = self.happened or now
        return now


@pytest.mark.parametrize("action", ["second", "hello", "shares", "masked", "consistency", "unmask"])
def test_a_site_lost_in_the_second_pass_costs_the_round_and_new_updates(tmp_path, plan, action):
    """Four sites, three would be enough for any other scheme; the lost one comes back."""
    trainers = tiny.recorders(tiny.make_sites(4))
    lost = Lost(action)
    federation = tiny.make_federation(tmp_path, plan, trainers, fault=lost)
    federation.run(reviving_at_once(federation))
    assert lost.happened
    committed = [attempt.order for attempt, _ in tiny.facts_of(tmp_path, Phase.COMMITTED)]
    if action in {"consistency", "unmask"}:  # all are in; three votes and shares are enough
        assert committed == [(1, 2, 1), (2, 2, 1)]
        return
    assert committed == [(1, 4, 2), (2, 2, 1)]
    aborted = [attempt.order for attempt, _ in tiny.facts_of(tmp_path, Phase.ABORTED)]
    assert aborted == [(1, 1, 1)]
    for site in range(4):
        spent = tiny.sent(tmp_path, site)
        assert spent[0] == (1, 1, 1), "the round is charged"
        results = [result.update for result in trainers[federation.names[site]].results]
        assert len({update.tobytes() for update in results}) == len(results), "fresh noise"


def killing_second(phase: Phase) -> Observer:
    """Ends everything at the first event of a phase in a second pass."""

    def observe(attempt: Attempt, found: Phase, site: int, facts: Json) -> None:
        if (attempt.round, attempt.session, found) == (1, 2, phase):
            raise Killed

    return observe


@pytest.mark.parametrize(
    "phase", [Phase.INVITED, Phase.KEYS, Phase.MASKED, Phase.CONSISTENT, Phase.UNMASKED]
)
def test_a_kill_between_the_passes_loses_the_round_and_no_more(tmp_path, plan, phase):
    """Coordinator and sites are gone in the second pass: nothing of the first is summed again."""
    trainers = tiny.recorders(tiny.make_sites(3))
    federation = tiny.make_federation(tmp_path, plan, trainers)
    with pytest.raises(Killed):
        federation.run(killing_second(phase))
    federation = tiny.make_federation(tmp_path, plan, trainers)
    federation.run()
    committed = tiny.facts_of(tmp_path, Phase.COMMITTED)
    assert [attempt.order for attempt, _ in committed] == [(1, 4, 2), (2, 2, 1)]
    before = tuned_model(plan).start
    for number, (_, facts) in enumerate(committed):
        updates = [trainer.results[number + 1].update for trainer in trainers.values()]
        after = tiny.blob(tmp_path, facts["adapter"])
        assert product_error(plan, before, after, updates)[0] < 1e-4
        before = after
    for site, name in enumerate(federation.names):
        assert tiny.sent(tmp_path, site) == [(1, 1, 1), (1, 3, 2), (2, 1, 1)]
        assert federation.epsilon_spent(name) <= plan.privacy.epsilon


class Dropping(RoundEngine):
    """A coordinator that leaves one site out of the second pass, to read it out of the two sums."""

    taken: Any = None
    checked = True

    def _second(self, grid: Any, first: SumResult) -> Any:
        before = first.parameters.attempt
        attempt = dataclasses.replace(before, session=before.session + 1)
        basis = self._rule(before).basis(first.mean)
        total, data = first.words.tobytes(), basis.tobytes()
        others = tuple(site for site in first.cohort if site != VICTIM)
        if len(others) < self._plan.cohort.minimum:
            raise ProtocolError("too few are left to drop one")
        parameters = planned_session(
            self._plan,
            self._roster,
            attempt,
            task_hash=second_task_hash(first.parameters.task_hash, first.outcome, total, data),
            dimension=self._rule(attempt).words,
            cohort=others if self.checked else (),
        )
        parts = {site: {"sum": total, "basis": data} for site in others}
        ready, refused = self._sessions.ask(grid, attempt, "second", parts)
        assert set(ready) == set(others), refused
        second = self._sessions.run(grid, parameters, others)
        Dropping.taken = first, second, basis
        raise ProtocolError("it has what it wanted")


def stolen(plan: Plan) -> dict[str, Any]:
    """What two sums over different sites tell of the site that is in one alone, by layer."""
    first, second, basis = Dropping.taken
    rule = Rule(
        settings=plan.aggregation,
        layout=tuned_model(plan).layout,
        attempt=first.parameters.attempt,
    )
    sums, place, behind, found = unpack(first.words, first.parameters)[0], 0, 0, {}
    products = unpack(second.words, second.parameters)[0]
    pairs, rest = split(rule.trained)
    start = len(rest) + sum(pair.r * (pair.m + pair.n) for pair in pairs)
    for pair in pairs:
        height, width = pair.m * pair.width, pair.n * pair.width
        q = basis[place : place + height].reshape(pair.m, pair.width)
        y = sums[start + place : start + place + height].reshape(pair.m, pair.width)
        p = products[behind : behind + width].reshape(pair.n, pair.width)
        found[pair.name] = q.T @ y - p.T @ pair.omega(rule._key)
        place, behind = place + height, behind + width
    return found


def test_a_coordinator_that_drops_a_site_from_the_second_pass_learns_nothing(
    tmp_path, plan, monkeypatch
):
    monkeypatch.setattr("fedward.simulations.federation.RoundEngine", Dropping)
    monkeypatch.setattr(Dropping, "taken", None)
    trainers = tiny.recorders(tiny.make_sites(4))
    federation = tiny.make_federation(tmp_path, plan, trainers)
    with pytest.raises((CohortTooSmall, RoundError)):
        federation.run()
    assert Dropping.taken is None
    assert not tiny.facts_of(tmp_path, Phase.COMMITTED)
    second = {e.phase for e in tiny.events_of(tmp_path) if e.attempt.session % 2 == 0}
    assert second == {Phase.LEFT_OUT}, "no key, no share and no input left a site"
    reasons = [facts for at, facts in tiny.facts_of(tmp_path, Phase.LEFT_OUT) if at.session == 2]
    assert len(reasons) >= 3, "all whom it asked, in each attempt"
    assert all(facts == {"at": "hello", "reason": "protocol-aborted"} for facts in reasons)


def test_twin_without_the_cohort_the_two_sums_tell_the_sketch_of_the_site_in_one_alone(
    tmp_path, plan, monkeypatch
):
    """Control of the test above: sites that forget whom they summed in the first pass."""

    def forgetful(*args: Any, cohort: tuple[int, ...] = (), **options: Any) -> Any:
        return planned_session(*args, **options)

    monkeypatch.setattr("fedward.simulations.federation.RoundEngine", Dropping)
    monkeypatch.setattr("fedward.client.agent.planned_session", forgetful)
    monkeypatch.setattr(SessionParameters, "reserved", property(paid_before))
    monkeypatch.setattr(Dropping, "checked", False)
    trainers = tiny.recorders(tiny.make_sites(4))
    federation = tiny.make_federation(tmp_path, plan, trainers)
    with pytest.raises((CohortTooSmall, RoundError)):
        federation.run()
    first, second, basis = Dropping.taken
    assert (first.cohort, second.cohort) == ((0, 1, 2, 3), (0, 2, 3))
    layout = tuned_model(plan).layout
    number = first.parameters.attempt.attempt - 1
    mine, other = (trainers[federation.names[s]].results[number].update for s in (VICTIM, 0))
    key, place = digest("sketch", RUN, (1).to_bytes(4, "big")), 0
    for pair in split(layout)[0]:
        q = basis[place : place + pair.m * pair.width].reshape(pair.m, pair.width)
        place += pair.m * pair.width
        truth, wrong = (
            q.T @ np.matmul(*pair.factors(update)) @ pair.omega(key) for update in (mine, other)
        )
        found = stolen(plan)[pair.name]
        assert np.linalg.norm(found - truth) < 1e-4 * np.linalg.norm(truth)
        assert np.linalg.norm(found - wrong) > 0.1 * np.linalg.norm(wrong)


def paid_before(parameters: SessionParameters) -> Attempt:
    """Of a second pass the first one's reservation, whatever its cohort."""
    attempt = parameters.attempt
    return dataclasses.replace(attempt, session=(attempt.session - 1) | 1)


def test_a_site_lost_in_the_first_pass_costs_its_own_update_alone(tmp_path, plan):
    """Four sites, three are enough: the second pass is over those three."""
    trainers = tiny.recorders(tiny.make_sites(4))
    federation = tiny.make_federation(tmp_path, plan, trainers, fault=Accident("masked"))
    federation.run(tiny.reviving(federation))
    assert tiny.cohorts(tmp_path) == [[0, 2, 3], [0, 1, 2, 3]]
    committed = [attempt.order for attempt, _ in tiny.facts_of(tmp_path, Phase.COMMITTED)]
    assert committed == [(1, 2, 1), (2, 2, 1)]


@pytest.mark.parametrize(
    ("aggregation", "metrics"),
    [
        ({"word_bits": 16}, None),
        ({"weights": {"a": 1.0, "b": 1.5, "c": 1.5, "d": 2.0}}, None),
        ({}, Metrics(epsilon=1.0)),
    ],
)
def test_with_what_other_schemes_have_too(tmp_path, base, aggregation, metrics):
    plan = tiny.make_plan(
        base,
        aggregation=dataclasses.replace(SKETCH, **aggregation),
        rounds=ROUNDS,
        metrics=metrics,
        cohort=Cohort(minimum=4, colluders=1),
    )
    trainers = tiny.recorders(tiny.make_sites(4))
    federation = tiny.make_federation(tmp_path, plan, trainers)
    federation.run()
    weights = list((plan.aggregation.weights or dict.fromkeys("abcd", 1.0)).values())
    before = tuned_model(plan).start
    for number, (_, facts) in enumerate(tiny.facts_of(tmp_path, Phase.COMMITTED)):
        updates = [trainer.results[number].update for trainer in trainers.values()]
        after = tiny.blob(tmp_path, facts["adapter"])
        new, apart = product_error(plan, before, after, updates, weights)
        assert new < min(apart, 3e-2 if plan.aggregation.word_bits == 16 else 1e-4)
        assert ("slots" in facts) == (metrics is not None)
        before = after
    for name in federation.names:
        assert federation.epsilon_spent(name) <= 8.0 + (metrics.epsilon if metrics else 0.0)


def forged(part: str, data: bytes) -> bytes:
    """Another value of a part of the next task."""
    if part == "attempt":
        return b"[3,1]"  # a first pass
    numbers = np.frombuffer(data, dtype=np.float32 if part == "basis" else np.uint32).copy()
    numbers[:1] += 1 if part == "basis" else 1 << 24
    return numbers.tobytes()


@pytest.mark.parametrize("part", ["first", "basis", "sum", "attempt"])
def test_a_site_refuses_published_sums_that_do_not_give_the_adapter(
    tmp_path, plan, monkeypatch, part
):
    """In round 2; the first round and every other test here is the control."""
    honest = Fold.state

    def lying(self: Fold) -> State:
        state = honest(self)
        if part not in state.previous:
            return state
        told = {**state.previous, part: forged(part, state.previous[part])}
        return dataclasses.replace(state, previous=told)

    monkeypatch.setattr(Fold, "state", lying)
    trainers = tiny.recorders(tiny.make_sites(3))
    federation = tiny.make_federation(tmp_path, plan, trainers)
    with pytest.raises((CohortTooSmall, RoundError), match="protocol-aborted"):
        federation.run()
    assert len(tiny.cohorts(tmp_path)) == 1


MIXED = {"a": 1, "b": 2}  # of 3; the third site trains all


def test_sites_of_other_ranks_are_in_one_mean(tmp_path, base):
    """Who trains fewer components has moved by zero in the others: whole products have a mean."""
    arguments = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    plan = tiny.make_plan(
        base,
        aggregation=SKETCH,
        rounds=dataclasses.replace(ROUNDS, count=3),
        tuner=Tuner(arguments=arguments, ranks=MIXED),
    )
    trainers = tiny.recorders(tiny.make_sites(3))
    federation = tiny.make_federation(tmp_path, plan, trainers)
    federation.run()
    assert tiny.cohorts(tmp_path) == [[0, 1, 2]] * 3
    before, layout = tuned_model(plan).start, tuned_model(plan).layout
    for number, (_, facts) in enumerate(tiny.facts_of(tmp_path, Phase.COMMITTED)):
        after, updates = tiny.blob(tmp_path, facts["adapter"]), []
        for name, trainer in trainers.items():
            asked, rank = trainer.requests[number], MIXED.get(name)
            assert asked.plan.tuner.arguments["r"] == (rank or 3)
            scale = asked.plan.tuner.arguments["lora_alpha"] / (rank or 3)
            assert scale == pytest.approx(2.0), "one factor before every product"
            whole = dataclasses.replace(asked, plan=plan, layout=layout)
            updates.append(widened(trainer.results[number], whole, rank).update)
        for name, rank in MIXED.items():
            mine, theirs = vector_of(before, layout), trainers[name].requests[number]
            for pair, part in zip(split(layout)[0], split(theirs.layout)[0], strict=True):
                (b, a), own = pair.factors(mine), vector_of(theirs.adapter, theirs.layout)
                assert np.array_equal(part.factors(own)[0], b[:, :rank])
                assert np.array_equal(part.factors(own)[1], a[:rank])
                assert not pair.factors(updates[MIXED[name] - 1])[0][:, rank:].any()
        new, apart = product_error(plan, before, after, updates)
        assert new < 1e-4 < 1e-3 < apart, "control: padded factors averaged apart"
        before = after


def test_ranks_of_unknown_sites_are_refused(tmp_path, base):
    tuner = Tuner(arguments={"r": 2, "target_modules": ["q_proj"]}, ranks={"A": 1})
    plan = tiny.make_plan(base, aggregation=SKETCH, rounds=ROUNDS, tuner=tuner)
    federation = tiny.make_federation(tmp_path, plan, tiny.recorders(tiny.make_sites(3)))
    with pytest.raises(InvalidValue, match=r"ranks = \['A'\]: expected names of sites"):
        federation.run()


@pytest.mark.parametrize(
    ("tuner", "scheme", "reason"),
    [
        ({"ranks": {"a": 4}}, "fedavg", "ranks.*none with 'fedavg': only 'sketch' mixes them"),
        ({"ranks": {"a": 9}}, "sketch", r"ranks\.a = 9: expected 1 to r = 8"),
        ({"ranks": {"a": 0}}, "sketch", r"ranks\.a = 0: expected 1 to r = 8"),
        (
            {"ranks": {"a": 4}, "arguments": {"rank_pattern": {"q": 2}}},
            "sketch",
            "one r for all layers",
        ),
    ],
)
def test_ranks_that_no_plan_can_have(base, tuner, scheme, reason):
    with pytest.raises(InvalidValue, match=reason):
        tiny.make_plan(base, aggregation=Aggregation(scheme=scheme), tuner=Tuner(**tuner))


def test_no_spare_round_ends_the_run_and_keeps_the_old_adapter(tmp_path, base):
    rounds = tiny.make_rounds(spare=0)
    plan = tiny.make_plan(base, aggregation=SKETCH, rounds=rounds)
    trainers = tiny.recorders(tiny.make_sites(3))
    federation = tiny.make_federation(tmp_path, plan, trainers, fault=Lost("masked"))
    with pytest.raises((CohortTooSmall, RoundError)):
        federation.run(reviving_at_once(federation))
