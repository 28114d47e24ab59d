"""Whole federations: the sum is exact whoever dies when, and every site spends what it sent."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from fedward.aggregation.fixed_point import Grid, decode
from fedward.aggregation.rules import Rule, masked_bytes
from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.errors import CohortTooSmall, RoundError
from fedward.messages import MESSAGE_TYPES, open_letter
from fedward.plan import Plan
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.server.sessions import Observer
from fedward.server.store import Phase
from fedward.simulations.federation import Federation
from fedward.simulations.grid import FIRST_NODE, LocalGrid
from fedward.tuning.adapter import from_bytes
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import moments_of, replace_vector, vector_of
from tests.simulations import tiny

ACTIONS = ("task", "hello", "shares", "masked", "consistency", "unmask")
VICTIM = 1


class Accident:
    """Kills one site at its first message of an action in round 1."""

    def __init__(self, action: str, site: int = VICTIM) -> None:
        self.kind, self.node, self.happened = MESSAGE_TYPES[action], site + FIRST_NODE, False

    def __call__(self, node: int, message: Message) -> bool:
        metadata = message.metadata
        here = (node, metadata.message_type, metadata.group_id) == (self.node, self.kind, "1")
        now = here and not self.happened
        self.happened = self.happened or now
        return now


class LosingGrid(LocalGrid):
    """The site answers, and both its process and the answer are lost."""

    accident: Accident

    def _deliver(self, message: Message) -> Message:
        reply = super()._deliver(message)
        node = message.metadata.dst_node_id
        if not self.accident(node, message):
            return reply
        self.kill(node)
        return Message(Error(ErrorCode.NODE_UNAVAILABLE), reply_to=message)


def losing(federation: Federation, accident: Accident) -> None:
    """Let a federation run over a grid that loses one answer."""
    federation.grid.close()
    grid = LosingGrid(federation.grid._factories)
    grid.accident = accident
    federation.grid = grid


def reviving_at_once(federation: Federation) -> Observer:
    """Starts killed sites again as soon as an attempt or a round is over."""

    def observe(attempt: Attempt, phase: Phase, site: int, facts: Json) -> None:
        if phase in {Phase.ABORTED, Phase.COMMITTED}:
            for node in federation.nodes.values():
                federation.grid.revive(node)

    return observe


def check_sums(
    folder: Path, plan: Plan, federation: Federation, trainers: dict[str, tiny.Recorder]
) -> None:
    """Every committed sum is that of its cohort's clipped updates, to one grid step a site."""
    grid = Grid(clip=plan.aggregation.update_clip, sites=len(federation.names), word_bits=32)
    before = tuned_model(plan).start
    for attempt, facts in tiny.facts_of(folder, Phase.COMMITTED):
        total = decode(tiny.words_of(tiny.blob(folder, facts["sum"])), grid)
        updates = tiny.plain_updates(federation, trainers, attempt, facts["cohort"])
        plain = np.sum(updates, axis=0, dtype=np.float64)
        assert np.abs(total - plain).max() <= len(updates) * grid.gamma
        assert np.abs(total - plain + updates[0]).max() > 100 * grid.gamma, "negative control"
        layout = tuned_model(plan).layout
        rule = Rule(settings=plan.aggregation, layout=layout, attempt=attempt)
        start, moments = vector_of(before, rule.trained), moments_of(before)
        vector, moments = rule.advance(start, moments, total / len(updates))
        after = replace_vector(before, rule.trained, vector, moments)
        assert tiny.blob(folder, facts["adapter"]) == after
        before = after


def check_spend(
    folder: Path,
    plan: Plan,
    federation: Federation,
    *,
    lost: Iterable[tuple[int, tuple[int, int, int]]] = (),
) -> None:
    """Each ledger has as sent what the coordinator received, and what was lost on the way."""
    received = [e for e in tiny.events_of(folder) if e.phase is Phase.MASKED]
    for site, name in enumerate(federation.names):
        expected = {e.attempt.order for e in received if e.site == site}
        expected |= {order for where, order in lost if where == site}
        assert set(tiny.sent(folder, site)) == expected
        assert len(tiny.sent(folder, site)) == len(expected)
        assert federation.epsilon_spent(name) <= plan.privacy.epsilon


@pytest.mark.parametrize("privacy", [None, tiny.NAKED], ids=["epsilon-8", "epsilon-inf"])
def test_every_sum_is_the_sum_of_the_clipped_updates(tmp_path, base, privacy):
    plan = tiny.make_plan(base, **({"privacy": privacy} if privacy else {}))
    trainers = tiny.recorders(tiny.make_sites(4))
    federation = tiny.make_federation(tmp_path, plan, trainers)
    adapter = federation.run()
    assert tiny.cohorts(tmp_path) == [[0, 1, 2, 3]] * 2
    check_sums(tmp_path, plan, federation, trainers)
    check_spend(tmp_path, plan, federation)
    (_, last) = tiny.facts_of(tmp_path, Phase.COMMITTED)[-1]
    assert tiny.blob(tmp_path, last["adapter"]) == adapter


def bytes_of_masked(federation: Federation, seen: Iterable[Message]) -> list[int]:
    """Bytes of masked words in each site's answer, as it went over the wire."""
    found = []
    for message in seen:
        site = message.metadata.src_node_id - FIRST_NODE
        if message.metadata.message_type == MESSAGE_TYPES["masked"] and site >= 0:
            letter = open_letter(message.content, federation.roster.key(site), "site")
            found.append(len(letter.part("words")))
    return found


@pytest.mark.parametrize(
    "aggregation",
    [
        {"scheme": "ffa"},
        {"scheme": "alternating"},
        {"scheme": "sketch-once"},
        {"optimizer": "adam"},
        {"coordinates": 0.25, "optimizer": "adam"},
        {"coordinates": 0.4, "scheme": "ffa"},
    ],
)
def test_every_rule_of_aggregation_on_real_updates(tmp_path, base, aggregation):
    plan = tiny.make_plan(
        base,
        aggregation=Aggregation(**{"scheme": "fedavg", **aggregation}),
        rounds=tiny.make_rounds(count=3, proximal=0.1),
    )
    trainers = tiny.recorders(tiny.make_sites(4))
    seen = list[Message]()
    federation = tiny.make_federation(tmp_path, plan, trainers, watch=seen.append)
    adapter = federation.run()
    assert tiny.cohorts(tmp_path) == [[0, 1, 2, 3]] * 3
    check_sums(tmp_path, plan, federation, trainers)
    check_spend(tmp_path, plan, federation)
    odd, even = masked_bytes(plan, tuned_model(plan).layout)
    assert bytes_of_masked(federation, seen) == [odd] * 4 + [even] * 4 + [odd] * 4
    requests = trainers["a"].requests
    assert not any(moments_of(request.adapter) for request in requests)
    assert bool(moments_of(adapter)) == ("optimizer" in aggregation)
    start = from_bytes(tuned_model(plan).start)
    for name, moved in (("lora_A", requests[2]), ("lora_B", requests[1])):
        parts = {n: t for n, t in from_bytes(moved.adapter).items() if name in n}
        still = all(torch.equal(part, start[n]) for n, part in parts.items())
        assert still == (name == "lora_A" and aggregation.get("scheme") == "ffa")


def test_alternating_moves_one_factor_a_round(tmp_path, base):
    plan = tiny.make_plan(base, aggregation=Aggregation(scheme="alternating"))
    trainers = tiny.recorders(tiny.make_sites(3))
    federation = tiny.make_federation(tmp_path, plan, trainers)
    last = from_bytes(federation.run())
    first, second = (from_bytes(r.adapter) for r in trainers["a"].requests)
    for name in first:
        moved = [not torch.equal(x[name], y[name]) for x, y in ((first, second), (second, last))]
        expected = {"lora_A": [False, True], "lora_B": [True, False]}
        kind = next((part for part in expected if part in name), "")
        assert moved == expected.get(kind, [True, True]), name
    sizes = [len(result.update) for result in trainers["a"].results]
    whole = sum(math.prod(shape) for _, shape in tuned_model(plan).layout)
    assert max(sizes) < whole, "a round sends one factor alone"


@pytest.mark.parametrize("action", ACTIONS)
def test_a_killed_site_costs_at_most_its_own_update(tmp_path, base, action):
    """Four sites, three are enough; the dead one comes back in round 2 from its folder."""
    plan, trainers = tiny.make_plan(base), tiny.recorders(tiny.make_sites(4))
    accident = Accident(action)
    federation = tiny.make_federation(tmp_path, plan, trainers, fault=accident)
    federation.run(tiny.reviving(federation))
    assert accident.happened
    counted = action in {"consistency", "unmask"}  # its update was in already
    assert tiny.cohorts(tmp_path) == [[0, 1, 2, 3] if counted else [0, 2, 3], [0, 1, 2, 3]]
    assert len(tiny.facts_of(tmp_path, Phase.STARTED)) == 2, "no round was tried again"
    check_sums(tmp_path, plan, federation, trainers)
    check_spend(tmp_path, plan, federation)


@pytest.mark.parametrize("action", ACTIONS)
def test_a_lost_answer_is_spent_if_it_was_an_update(tmp_path, base, action):
    plan, trainers = tiny.make_plan(base), tiny.recorders(tiny.make_sites(4))
    federation = tiny.make_federation(tmp_path, plan, trainers)
    losing(federation, Accident(action))
    federation.run(tiny.reviving(federation))
    counted = action in {"consistency", "unmask"}
    assert tiny.cohorts(tmp_path) == [[0, 1, 2, 3] if counted else [0, 2, 3], [0, 1, 2, 3]]
    lost = [(VICTIM, (1, 1, 1))] if action == "masked" else []
    check_sums(tmp_path, plan, federation, trainers)
    check_spend(tmp_path, plan, federation, lost=lost)


@pytest.mark.parametrize("action", ACTIONS)
def test_below_the_minimum_the_round_is_tried_again(tmp_path, base, action):
    """Three sites and all are needed: what was sent before the accident has cost a spare round.

    Two sites hold enough shares, so that the last accident costs nothing.
    """
    plan, trainers = tiny.make_plan(base), tiny.recorders(tiny.make_sites(3))
    federation = tiny.make_federation(tmp_path, plan, trainers, fault=Accident(action))
    federation.run(reviving_at_once(federation))
    assert tiny.cohorts(tmp_path) == [[0, 1, 2]] * 2
    check_sums(tmp_path, plan, federation, trainers)
    check_spend(tmp_path, plan, federation)
    assert len(tiny.facts_of(tmp_path, Phase.ABORTED)) == (action != "unmask")
    repeated = action in {"masked", "consistency"}
    assert len(tiny.sent(tmp_path, 0)) == (3 if repeated else 2)
    # What has not left is masked again, without another look at the records.
    assert len(trainers["a"].results) == (3 if repeated else 2)


def test_no_spare_round_no_second_update(tmp_path, base):
    """One reservation too few: the sites refuse, and the run says so by their codes."""
    plan = tiny.make_plan(base, rounds=tiny.make_rounds(spare=0))
    trainers = tiny.recorders(tiny.make_sites(3))
    federation = tiny.make_federation(tmp_path, plan, trainers, fault=Accident("consistency"))
    with pytest.raises(CohortTooSmall, match=r"0 of 3 sites are ready.*a: refused-budget"):
        federation.run(reviving_at_once(federation))
    assert [len(tiny.sent(tmp_path, site)) for site in range(3)] == [2, 2, 2]
    check_spend(tmp_path, plan, federation)


def test_a_site_that_stays_away_ends_a_run_that_needs_it(tmp_path, base):
    plan, trainers = tiny.make_plan(base), tiny.recorders(tiny.make_sites(3))
    federation = tiny.make_federation(tmp_path, plan, trainers, fault=Accident("task"))
    with pytest.raises(RoundError, match=r"round 1 failed in 4 attempts.*b: no answer"):
        federation.run()
    assert tiny.sent(tmp_path, 0) == [], "nothing left, nothing was spent"


def forbid(folder: Path, *sites: int) -> None:
    """Let some sites' policies allow a little less than the plan asks for."""
    for site in sites:
        (path,) = folder.glob(f"sites/{site:04d}-*/policy.toml")
        path.write_text(path.read_text().replace("max_epsilon = 8.0", "max_epsilon = 7.999"))


def test_a_site_that_refuses_is_left_out_by_its_code(tmp_path, base):
    trainers = tiny.recorders(tiny.make_sites(4))
    federation = tiny.make_federation(tmp_path, tiny.make_plan(base), trainers)
    forbid(tmp_path, VICTIM)
    federation.run()
    assert tiny.cohorts(tmp_path) == [[0, 2, 3]] * 2
    left_out = tiny.facts_of(tmp_path, Phase.LEFT_OUT)
    assert [facts for _, facts in left_out] == [{"at": "task", "reason": "refused-policy"}] * 2
    assert tiny.ledger_entries(tmp_path, VICTIM) == []
    assert trainers["b"].results == []


def test_too_many_refusals_end_the_run_with_every_code(tmp_path, base):
    trainers = tiny.recorders(tiny.make_sites(4))
    federation = tiny.make_federation(tmp_path, tiny.make_plan(base), trainers)
    forbid(tmp_path, 1, 3)
    with pytest.raises(CohortTooSmall, match="b: refused-policy; d: refused-policy"):
        federation.run()
    assert len(tiny.facts_of(tmp_path, Phase.STARTED)) == 1, "another attempt would fail alike"


def test_fewer_sites_than_the_minimum_are_refused_at_once(tmp_path, base):
    plan = tiny.make_plan(base, cohort=Cohort(minimum=5, colluders=1))
    with pytest.raises(CohortTooSmall, match=r"makes 4 sites, but \[cohort\] minimum = 5"):
        tiny.make_federation(tmp_path, plan, tiny.recorders(tiny.make_sites(4)))


def test_a_site_with_one_patient_takes_part_like_any_other(tmp_path, base):
    sites = {**tiny.make_sites(3), "b": tiny.make_records("b", 1, notes=1)}
    plan, trainers = tiny.make_plan(base), tiny.recorders(sites)
    federation = tiny.make_federation(tmp_path, plan, trainers)
    federation.run()
    assert tiny.cohorts(tmp_path) == [[0, 1, 2]] * 2
    check_sums(tmp_path, plan, federation, trainers)


def test_names_that_are_no_file_names_get_folders_of_their_own(tmp_path, base):
    names = ("St. Mary's/1", "St. Mary's 1", "../up")
    sites = {name: tiny.make_records("x", 3) for name in names}
    federation = tiny.make_federation(tmp_path, tiny.make_plan(base), tiny.recorders(sites))
    federation.run()
    folders = sorted(path.name for path in (tmp_path / "sites").iterdir())
    assert len(folders) == 3
    assert not any(set(name) & set("/'.") for name in folders)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coordinator", "sites"]


def test_the_secret_keys_lie_readable_for_their_owner_only(tmp_path, base):
    trainers = tiny.recorders(tiny.make_sites(3))
    federation = tiny.make_federation(tmp_path, tiny.make_plan(base), trainers)
    federation.run()
    files = [*tmp_path.glob("sites/*/key"), *tmp_path.glob("sites/*/*.jsonl")]
    assert len(files) == 9
    assert {path.stat().st_mode & 0o077 for path in files} == {0}
