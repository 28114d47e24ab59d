"""The gate: a round that hurts is refused, sites follow, and a run that gets nowhere pauses."""

import dataclasses
import math
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedward import failpoints, typed_toml
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.cli import app
from fedward.client.approval import approve
from fedward.client.last_round import read_refused
from fedward.client.training import Scores, TrainRequest, TrainResult
from fedward.errors import (
    ConfigurationError,
    DataError,
    ModelError,
    ProtocolError,
    RoundError,
    SiteCode,
)
from fedward.plan import Plan
from fedward.plan_aggregation import Aggregation
from fedward.plan_gate import Gate
from fedward.private_files import write_private
from fedward.server.control_client import open_control
from fedward.server.gate import gate_records, held_out_loss, judge, loss_apart
from fedward.server.registry import Registry
from fedward.server.registry_entries import add_run
from fedward.server.store import Phase
from fedward.simulations.poisoning import hostile_trainer
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import replace_vector, vector_of
from tests.client import desk
from tests.client.test_continuity import at, bent, field  # noqa: F401  # a fixture
from tests.server import office, test_coordinator
from tests.server.test_coordinator import House, state, wait_for
from tests.server.test_rounds import Rig, tasks
from tests.simulations import tiny

GATED = dataclasses.replace(desk.PLAN, gate=Gate(data="held-out.jsonl", refusals=2))
ONES = np.ones(4)


@pytest.mark.parametrize(
    ("now", "then", "given", "reason"),
    [
        (1.0, 1.1, {}, ""),
        (1.0, 0.2, {}, ""),
        (1.0, 1.2, {}, "held-out loss 1.2000, above 1.0000 + 0.1"),
        (1.0, 1.2, {"worse_by": 0.5}, ""),
        (1.0, math.nan, {}, "held-out loss nan"),
        (1.0, math.inf, {"worse_by": 1e300}, "inf"),
        (1.0, 0.2, {"norm": 2.0}, ""),
        (1.0, 0.2, {"norm": 1.9}, "the mean's norm is 2, above 1.9"),
    ],
)
def test_what_the_gate_refuses(now, then, given, reason):
    gate, losses = Gate(data="x", **given), {b"now": now, b"then": then}
    said, figures = judge(gate, losses.__getitem__, b"now", b"then", ONES)
    assert said.startswith(reason) if reason != "inf" else "inf" in said
    assert bool(said) == bool(reason)
    assert figures["norm"] == 2.0
    if "norm" not in said:
        assert figures["after"] == (then if math.isfinite(then) else None)
    canonical_json(figures)


@pytest.mark.parametrize(
    "values",
    [{"data": ""}, {"worse_by": -0.1}, {"worse_by": math.inf}, {"norm": 0.0}, {"refusals": 0}],
)
def test_limits_of_the_section(values):
    with pytest.raises(ConfigurationError, match=next(iter(values))):
        Gate(**({"data": "x"} | values))


def test_a_plan_without_a_gate_has_the_hash_that_it_had():
    assert b"gate" not in desk.PLAN.to_json()
    assert desk.PLAN.hash() != GATED.hash()


class Losses:
    """Refuses what comes out of some rounds: each adapter not seen before is worse, or better."""

    def __init__(self, *bad: int) -> None:
        self.bad, self.known, self.asked = bad, dict[bytes, float](), 0

    def __call__(self, adapter: bytes) -> float:
        if adapter not in self.known:
            worse = self.asked in self.bad  # the first one asked for is the run's start
            self.known[adapter] = self.asked + 100.0 if worse else -self.asked
            self.asked += 1
        return self.known[adapter]


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path, plan=GATED)
    yield rig
    rig.close()


def ends(rig: Rig) -> list[tuple[int, str]]:
    phases = {Phase.COMMITTED, Phase.REFUSED}
    found = [event for event in rig.store.events(desk.RUN) if event.phase in phases]
    return [(event.attempt.round, event.phase.value) for event in found]


def test_a_refused_round_is_paid_and_the_next_begins_with_the_same_adapter(rig):
    last = rig.run(gate=Losses(2))
    assert ends(rig) == [(1, "committed"), (2, "refused"), (3, "committed")]
    ((_, refused),) = rig.facts(Phase.REFUSED)
    first, third = (facts for _, facts in rig.facts(Phase.COMMITTED))
    assert refused["reason"].startswith("held-out loss 102.0000, above -1.0000 + 0.1")
    assert refused["gate"] == {"norm": refused["gate"]["norm"], "lowest": -1, "after": 102}
    assert refused["adapter"] == first["adapter"] != third["adapter"]
    assert third["gate"]["lowest"] == -1, "what was refused is no yardstick"
    assert last == rig.store.blob(third["adapter"])
    started = [trainer.requests[2].adapter for trainer in rig.desk.trainers]
    assert started == [rig.store.blob(first["adapter"])] * 4
    for site in range(4):
        ledger = rig.desk.files[site][0]
        assert [ledger.spent_in(Attempt(run=desk.RUN, round=n)) for n in (1, 2, 3)] == [1, 1, 1]
    parts = {number: names for (number, _, _), names in tasks(rig).items()}
    assert "refused" in parts[3], "and no adapter: they have it"
    assert "adapter" not in parts[3]


def test_poison_in_small_portions_is_measured_by_the_best_that_there_was(rig):
    plan = dataclasses.replace(GATED, gate=Gate(data="x", worse_by=0.1, refusals=3))
    losses = iter([1.0, 1.06, 1.12])  # each 0.06 above the one before
    known = dict[bytes, float]()

    def loss(adapter: bytes) -> float:
        if adapter not in known:
            known[adapter] = next(losses, 1.1)
        return known[adapter]

    rig.run(plan=plan, gate=loss)
    assert ends(rig) == [(1, "committed"), (2, "refused"), (3, "committed")]


def test_rounds_refused_from_the_first_on(rig):
    plan = dataclasses.replace(GATED, gate=Gate(data="x", refusals=3))
    rig.run(plan=plan, gate=Losses(1, 2))
    assert ends(rig) == [(1, "refused"), (2, "refused"), (3, "committed")]
    assert [trainer.requests[2].adapter for trainer in rig.desk.trainers] == [desk.START] * 4


def test_a_site_that_missed_the_refused_round_checks_the_sum_before_it(rig):
    def observe(attempt, phase, site, facts):
        if (attempt.round, phase) == (1, Phase.COMMITTED):
            rig.grid.kill(rig.nodes[3])
        if (attempt.round, phase) == (2, Phase.REFUSED):
            rig.grid.revive(rig.nodes[3])

    rig.run(gate=Losses(2), observer=observe)
    assert ends(rig) == [(1, "committed"), (2, "refused"), (3, "committed")]
    assert rig.cohorts == [[0, 1, 2, 3]] * 2
    assert rig.facts(Phase.REFUSED)[0][1]["cohort"] == [0, 1, 2]


def test_refusals_in_a_row_stop_the_run_and_it_can_be_resumed(rig):
    losses = Losses(1, 2, 3)
    with pytest.raises(RoundError, match=r"refused 2 rounds in a row, up to round 2"):
        rig.run(gate=losses)
    assert ends(rig) == [(1, "refused"), (2, "refused")]
    assert rig.run(gate=losses) == desk.START
    assert ends(rig)[2:] == [(3, "refused")]
    with pytest.raises(RoundError, match="no round is committed"):
        add_run(Registry(rig.folder / "registry"), GATED, desk.RUN, rig.store)


def test_a_kill_behind_the_decision_leaves_it_as_it_was(rig):
    def handler(name):
        if name == "round.committed" and ends(rig)[-1] == (2, "refused"):
            failpoints.fail("error")

    with failpoints.armed(handler), pytest.raises(OSError, match="error"):
        rig.run(gate=Losses(2))
    before = ends(rig)
    rig.run(gate=lambda adapter: -9.0)  # whoever is asked now would let everything through
    assert ends(rig) == [*before, (3, "committed")]
    assert before == [(1, "committed"), (2, "refused")]


def test_a_gate_that_cannot_be_asked_stops_the_run_before_anybody_trains(rig):
    with pytest.raises(RoundError, match="nobody is here to try"):
        rig.run()

    def broken(adapter):
        raise ModelError("gone")

    with pytest.raises(ModelError, match="gone"):
        rig.run(gate=broken)
    assert rig.facts(Phase.STARTED) == []


def test_what_a_site_takes_of_a_refusal(
    field,  # noqa: F811  # the fixture
):
    approve(field.site(0), GATED, who="jo", now=datetime(2026, 5, 1, tzinfo=UTC))

    def task(number: int, said: Any, attempt: int = 1, **parts: Any) -> SiteCode | None:
        code: SiteCode | None = field.task(
            at(number, attempt), 0, plan=GATED, refused=canonical_json(said), **parts
        )
        return code

    assert field.task(at(1), 0, plan=GATED) is SiteCode.READY
    code = task(2, [1, 1], adapter=bent(field))
    field.refused(code, SiteCode.PROTOCOL_ABORTED, "the adapter changed")
    assert task(2, [1, 1], adapter=desk.START) is SiteCode.READY
    code = task(3, [1, 1])
    field.refused(code, SiteCode.PROTOCOL_ABORTED, "other rounds than the last")
    notes = [entry["rounds"] for entry in field.journal() if entry["what"].startswith("rounds ref")]
    assert notes == [[1, 1], [1, 1]]


@pytest.mark.parametrize("said", [b"x", b"1", b"[1]", b"[1,2,3]", b"[0,2]", b"[true,2]", b"[3,2]"])
def test_what_a_task_says_of_refusals_is_read_strictly(said):
    with pytest.raises(ProtocolError):
        read_refused(said, at(3), GATED)
    with pytest.raises(ProtocolError, match=r"no \[gate\]"):
        read_refused(b"[1,2]", at(3), desk.PLAN)
    assert read_refused(b"[1,2]", at(3), GATED) == 1
    assert read_refused(None, at(3), desk.PLAN) == 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.build_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Notes of the coordinator: no patient and no hospital stands in them."""
    rows = [{k: row[k] for k in ("text", "label")} for row in tiny.make_rows("public", 8)]
    folder = tiny.write_data(tmp_path_factory.mktemp("public"), rows)
    return folder / "train.jsonl"


def make_plan(base: Any, held_out: Any, **changes: Any) -> Plan:
    given: dict[str, Any] = {
        "rounds": tiny.make_rounds(count=4, learning_rate=0.05),
        "privacy": tiny.NAKED,
        "aggregation": Aggregation(
            scheme="fedavg", update_clip=10.0
        ),  # five times an update are sent whole
        "gate": Gate(data=str(held_out), worse_by=0.0),
    }
    return tiny.make_plan(base, **(given | changes))


@dataclasses.dataclass
class Turning:
    """A trainer that is bought between rounds 2 and 3."""

    before: Any
    after: Any

    def prepare(self, request: TrainRequest) -> None:
        self.before.prepare(request)

    def train(self, request: TrainRequest) -> TrainResult:
        result: TrainResult = (self.before, self.after)[request.attempt.round > 2].train(request)
        return result

    def evaluate(self, plan: Plan, adapter: bytes, run: str) -> Scores:
        raise AssertionError("nobody asks")


@pytest.mark.parametrize("gated", [True, False])
def test_a_site_that_turns_from_good_to_hostile_is_refused_round_by_round(
    base, held_out, tmp_path, gated
):
    """Hostile from round 3 on: with the gate the model stays what it was, without it is worse."""
    plan = make_plan(base, held_out)
    loss = held_out_loss(plan, gate_records(plan, held_out))
    if not gated:
        plan = dataclasses.replace(plan, gate=None)
    sites = tiny.make_sites(4)
    trainers: dict[str, Any] = dict(tiny.recorders(sites))
    trainers["d"] = Turning(trainers["d"], hostile_trainer("sign-flip", sites["d"], plan))
    federation = tiny.make_federation(tmp_path, plan, trainers, gate=loss)
    final = loss(federation.run())
    good = loss(tiny.blob(tmp_path, tiny.facts_of(tmp_path, Phase.COMMITTED)[1][1]["adapter"]))
    refused = [attempt.round for attempt, _ in tiny.facts_of(tmp_path, Phase.REFUSED)]
    if gated:
        assert refused == [3, 4]
        assert final == good < loss(tuned_model(plan).start)
    else:
        assert refused == []
        assert final > good


def test_records_that_do_not_fit_the_plan_are_refused(base, held_out, tmp_path):
    plan = make_plan(base, held_out)
    assert len(gate_records(plan, held_out).units) == 16, "each row stands for itself"
    folder = tiny.write_data(tmp_path, [{"text": "cough", "label": "liver"}])
    with pytest.raises(DataError, match="one of the plan's labels"):
        gate_records(plan, folder / "train.jsonl")


@pytest.mark.slow
def test_a_process_of_its_own_finds_the_same_loss_and_says_what_went_wrong(
    base, held_out, tmp_path
):
    plan = make_plan(base, held_out)
    start, layout = tuned_model(plan).start, tuned_model(plan).layout
    moved = replace_vector(start, layout, vector_of(start, layout) + np.float32(0.1))
    loss = held_out_loss(plan, gate_records(plan, held_out))
    for adapter in (start, moved):
        found = loss_apart(plan, held_out, base, adapter, tmp_path)
        assert found == pytest.approx(loss(adapter), abs=1e-6)
    assert loss(start) != loss(moved)
    assert loss_apart(plan, held_out, tmp_path / "gone", moved, tmp_path) == found, "it is known"
    with pytest.raises(ModelError, match=r"ended with 1: .*nowhere"):
        loss_apart(plan, tmp_path / "nowhere.jsonl", base, start, tmp_path / "other")


class Anything(desk.Scripted):
    """A scripted trainer of any model."""

    def prepare(self, request: TrainRequest) -> None:
        pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_served_run_is_refused_paused_and_resumed(base, held_out, tmp_path, monkeypatch):
    """Sites on the real wire, whose updates are scripted numbers: too long for the gate."""
    monkeypatch.setattr(test_coordinator, "Slow", Anything)
    house, toml = House(tmp_path / "house"), tmp_path / "plan.toml"
    data = tmp_path / "held-out.jsonl"
    data.write_bytes(held_out.read_bytes())
    plan = make_plan(base, data, gate=Gate(data=str(data), norm=1e-9, refusals=2))
    rounds = dataclasses.replace(plan.rounds, count=3, spare=1)
    plan = dataclasses.replace(plan, rounds=rounds, privacy=desk.PLAN.privacy)
    toml.write_text(typed_toml.dump(plan))
    for site in house.sites:
        text = site.policy.read_text().replace("a" * 64, str(plan.model.sha256))
        write_private(site.policy, (text + 'objectives = ["classify"]\n').encode())
    with (
        office.serving(house.folder),
        house.engine(),
        house.online(house.sites),
        open_control(house.folder) as control,
    ):
        words = ["run", "start", str(toml), "--name", "gated", "--coordinator"]
        started = CliRunner().invoke(app, [*words, str(house.folder.root)])
        assert started.exit_code == 0, started.output
        data.unlink()  # the coordinator has a copy
        wait_for(lambda: state(control, "gated") in {"finished", "paused"}, seconds=120)
        shown = control.call("Show", "gated")
        assert shown["state"] == "paused", shown
        assert "refused 2 rounds in a row" in shown["reason"]
        assert [line.partition(": ")[0] for line in shown["refused"]] == ["round 1", "round 2"]
        assert "the mean's norm is" in shown["refused"][0]
        control.call("Resume", "gated")
        wait_for(lambda: state(control, "gated") in {"finished", "paused"}, seconds=120)
        assert "no round is committed" in control.call("Show", "gated")["reason"]
        control.call("Abort", "gated")
        phases = [event["phase"] for event in control.watch("gated") if not event["site"]]
    assert phases.count("refused") == 3
