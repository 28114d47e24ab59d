"""The coordinator completes a round that too few sites came to, and the federation goes on."""

import contextlib
import dataclasses
import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from typer.testing import CliRunner

from fedward import failpoints, typed_toml
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.cli import app
from fedward.client.approval import approve, waiting_plans
from fedward.client.last_round import read_fallback
from fedward.errors import ConfigurationError, ModelError, ProtocolError, RoundError, SiteCode
from fedward.plan import Data, Plan, Task
from fedward.plan_fallback import Fallback
from fedward.server.central.loading import open_trained
from fedward.server.control_client import open_control
from fedward.server.fallback import fallback_job, train_apart, train_on
from fedward.server.registry import Registry
from fedward.server.registry_card import model_card
from fedward.server.registry_entries import add_run
from fedward.server.store import Phase, RunStore
from fedward.simulations.federation import RUN
from fedward.simulations.grid import FIRST_NODE
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import dimension, replace_vector, vector_of
from tests.client import desk
from tests.client.test_continuity import at, field  # noqa: F401  # a fixture
from tests.server import office
from tests.server.test_coordinator import House, state, wait_for
from tests.server.test_rounds import Rig
from tests.simulations import tiny

GONE = (2, 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.build_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """Notes that the coordinator may use."""
    rows = [{"text": f"note {number}: chest pain after stairs"} for number in range(6)]
    folder = tiny.write_data(tmp_path_factory.mktemp("public"), rows)
    return folder / "train.jsonl"


def make_plan(base: Path, after: int = 2, **changes: Any) -> Plan:
    given: dict[str, Any] = {
        "task": Task(objective="sft", max_length=16),
        "data": Data(unit="patient", site="hospital"),
        "rounds": tiny.make_rounds(count=3, deadline="5s"),
        "fallback": Fallback(after=after, job="fallback.toml"),
    }
    return tiny.make_plan(base, **(given | changes))


def write_job(
    folder: Path, base: Path, public: Path, *, rate: float = 0.05, steps: int = 4, **changes: Any
) -> Path:
    """A job whose base and tuner are the plan's."""
    given = {"stage": "sft", "path": base, "quantize": "none", "r": 2, "save": steps} | changes
    path = folder / "fallback.toml"
    path.write_text(f"""
name = "alone"
stage = "{given["stage"]}"
[model]
path = "{given["path"]}"
quantize = "{given["quantize"]}"
[tuner]
method = "lora"
r = {given["r"]}
lora_alpha = 4
target_modules = ["q_proj"]
[data]
train = "{given.get("train", public)}"
[train]
max_steps = {steps}
save_steps = {given["save"]}
learning_rate = {rate}
per_device_train_batch_size = 4
max_length = 16
""")
    return path


def bent(plan: Plan, seed: int = 1) -> bytes:
    """An adapter of the plan that is not its start, with numbers that bfloat16 does not have."""
    tuned = tuned_model(plan)
    drawn = np.random.default_rng(seed).normal(0, 0.1, dimension(tuned.layout))
    return replace_vector(tuned.start, tuned.layout, drawn.astype(np.float32))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": "kto"}, r"stage = 'kto': expected 'sft'"),
        ({"path": "elsewhere"}, r"path = 'elsewhere': expected"),
        ({"quantize": "nf4"}, r"quantize = 'nf4': expected 'none'"),
        ({"r": 4}, r"\[tuner\] = .*expected"),
        ({"train": "nowhere.jsonl"}, r"nowhere.jsonl: no such file"),
    ],
)
def test_a_job_that_would_not_go_on_with_the_adapter_is_refused(
    base, public, tmp_path, changes, words
):
    job = write_job(tmp_path, base, public, **changes)
    with pytest.raises(ConfigurationError, match=words):
        fallback_job(make_plan(base), job)


def test_a_plan_of_preferences_has_no_job(base, public, tmp_path):
    pairs = Data(unit="patient", site="hospital", prompt="p", chosen="c", rejected="r")
    plan = make_plan(base, task=Task(objective="dpo", max_length=16), data=pairs)
    with pytest.raises(ConfigurationError, match="'dpo' cannot be trained on centrally, only sft"):
        fallback_job(plan, write_job(tmp_path, base, public))


CLASSES = Task(objective="classify", labels=tiny.LABELS, max_length=16)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Notes with their classes, that the coordinator may use."""
    folder = tiny.write_data(tmp_path_factory.mktemp("labelled"), tiny.make_rows("public", 4))
    return folder / "train.jsonl"


def test_a_class_that_the_plan_does_not_have_is_refused(base, labelled, tmp_path):
    plan = make_plan(base, task=dataclasses.replace(CLASSES, labels=("heart", "liver")))
    with pytest.raises(ConfigurationError, match=r"label 'lung': expected one of .* heart, liver"):
        fallback_job(plan, write_job(tmp_path, base, labelled, stage="classify"))


@pytest.mark.parametrize(
    ("stage", "quantize"), [("sft", "none"), ("sft", "nf4"), ("classify", "none")]
)
def test_the_training_goes_on_from_the_adapter_bit_for_bit(
    base, public, labelled, tmp_path, stage, quantize
):
    model = dataclasses.replace(make_plan(base).model, quantize=quantize)
    task = CLASSES if stage == "classify" else make_plan(base).task
    plan = make_plan(base, model=model, task=task)
    rows = labelled if stage == "classify" else public
    given = {"stage": stage, "quantize": quantize}
    start, layout = bent(plan), tuned_model(plan).layout
    still = fallback_job(plan, write_job(tmp_path, base, rows, rate=0.0, **given))
    assert train_on(plan, still, base, start, tmp_path / "still") == start
    step = fallback_job(plan, write_job(tmp_path, base, rows, **given))
    end = train_on(plan, step, base, start, tmp_path / "work")
    moved = vector_of(end, layout) - vector_of(start, layout)
    assert np.abs(moved).max() > 1e-3
    assert end != train_on(plan, step, base, bent(plan, seed=2), tmp_path / "other")


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_same_and_survives_a_kill(base, public, tmp_path):
    plan = make_plan(base)
    step = fallback_job(plan, write_job(tmp_path, base, public, steps=40, save=1))
    start = bent(plan)
    expected = train_on(plan, step, base, start, tmp_path / "here")

    class Killed(Exception):
        pass

    def look():
        if any((tmp_path / "apart").glob("*/checkpoints/checkpoint-*/trainer_state.json")):
            raise Killed

    with pytest.raises(Killed):
        train_apart(plan, step, base, start, tmp_path / "apart", look)
    done = [
        int(p.name.split("-")[1]) for p in (tmp_path / "apart").glob("*/checkpoints/checkpoint-*")
    ]
    assert 0 < max(done) < 40
    assert train_apart(plan, step, base, start, tmp_path / "apart") == expected
    gone = dataclasses.replace(step, data=dataclasses.replace(step.data, train="/nowhere"))
    with pytest.raises(ModelError, match="/nowhere: cannot be read"):
        train_apart(plan, gone, base, start, tmp_path / "gone")
    columns = {"text": "nothing"}
    broken = dataclasses.replace(step, data=dataclasses.replace(step.data, columns=columns))
    with pytest.raises(ModelError, match=r"ended with 1: .*nothing"):
        train_apart(plan, broken, base, start, tmp_path / "broken")


class Leaving:
    """Two of four sites are gone from round 2, until somebody lets them return."""

    def __init__(self) -> None:
        self.gone = True

    def __call__(self, node: int, message: Message) -> bool:
        late = int(message.metadata.group_id) >= 2
        return self.gone and late and node - FIRST_NODE in GONE


def test_two_of_four_sites_leave_the_round_is_completed_and_they_return(base, public, tmp_path):
    plan, leaving = make_plan(base), Leaving()
    step = fallback_job(plan, write_job(tmp_path, base, public))
    trainers = tiny.recorders(tiny.make_sites(4))
    given = list[tuple[int, bytes]]()

    def alone(number, adapter):
        given.append((number, adapter))
        return train_on(plan, step, base, adapter, tmp_path / f"alone-{number}")

    federation = tiny.make_federation(tmp_path, plan, trainers, fault=leaving, fallback=alone)

    def observe(attempt, phase, site, facts):
        if phase is Phase.FALLBACK:  # they are back
            leaving.gone = False
            for node in federation.nodes.values():
                federation.grid.revive(node)

    last = federation.run(observe)
    ends = [
        (event.attempt.round, event.phase.value)
        for event in tiny.events_of(tmp_path)
        if event.phase in {Phase.COMMITTED, Phase.FALLBACK}
    ]
    assert ends == [(1, "committed"), (2, "fallback"), (3, "committed")]
    assert tiny.cohorts(tmp_path) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    ((attempt, facts),) = tiny.facts_of(tmp_path, Phase.FALLBACK)
    assert (attempt.round, attempt.attempt, facts["missed"]) == (2, 2, 2)
    first, third = (facts for _, facts in tiny.facts_of(tmp_path, Phase.COMMITTED))
    assert given == [(2, tiny.blob(tmp_path, first["adapter"]))], "from the last good adapter"
    middle = tiny.blob(tmp_path, facts["adapter"])
    trained = [r.adapter for r in trainers["a"].requests if r.attempt.round == 3]
    assert trained == [middle], "the federation goes on from what the coordinator made"
    assert tiny.blob(tmp_path, third["adapter"]) == last != middle
    for site in range(4):  # a round that came to no sum has cost no site anything
        assert [order[0] for order in tiny.sent(tmp_path, site)] == [1, 3]
    with contextlib.closing(RunStore(tmp_path / "coordinator")) as store:
        version = add_run(Registry(tmp_path / "registry"), plan, RUN, store)
    assert version.spent is not None
    assert (version.spent.rounds, version.spent.central_rounds) == (2, 1)


def test_nobody_comes_and_the_coordinator_completes_every_round(base, tmp_path):
    plan = make_plan(base, after=1)
    layout = tuned_model(plan).layout

    def alone(number, adapter):
        return replace_vector(adapter, layout, vector_of(adapter, layout) + np.float32(number))

    trainers = tiny.recorders(tiny.make_sites(4))
    federation = tiny.make_federation(
        tmp_path, plan, trainers, fault=lambda node, message: True, fallback=alone
    )
    last = federation.run()
    moved = vector_of(last, layout) - vector_of(tuned_model(plan).start, layout)
    assert moved == pytest.approx(6.0, abs=1e-5)
    rounds = [attempt.round for attempt, _ in tiny.facts_of(tmp_path, Phase.FALLBACK)]
    assert rounds == [1, 2, 3]


FALLEN = dataclasses.replace(desk.PLAN, fallback=Fallback(after=2, job="job.toml"))


def absent(rig: Rig, *sites: int) -> None:
    """These sites answer nothing."""
    for site in sites:
        rig.grid.kill(rig.nodes[site])


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path, plan=FALLEN)
    yield rig
    rig.close()


def plus_one(number: int, adapter: bytes) -> bytes:
    return replace_vector(adapter, desk.LAYOUT, vector_of(adapter, desk.LAYOUT) + np.float32(1))


def test_a_kill_between_the_last_miss_and_the_training_asks_nobody_again(rig):
    absent(rig, *GONE)

    def killed(number, adapter):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rig.run(fallback=killed)
    asked = len(rig.facts(Phase.STARTED))
    assert asked == 2
    done = dict[str, int]()

    def observe(attempt, phase, site, facts):
        if phase is Phase.FALLBACK:
            done.setdefault("asked", len(rig.facts(Phase.STARTED)))
            for node in rig.nodes.values():
                rig.grid.revive(node)

    rig.run(fallback=plus_one, observer=observe)
    assert done == {"asked": asked}
    assert rig.cohorts == [[0, 1, 2, 3]] * 2


def test_a_crash_while_the_round_is_recorded_leaves_it_open_or_complete(rig):
    absent(rig, *GONE)
    made = list[int]()

    def alone(number, adapter):
        made.append(number)
        return plus_one(number, adapter)

    def handler(name):
        if name == "store.commit" and made == [1]:
            failpoints.fail("error")

    with failpoints.armed(handler), pytest.raises(OSError, match="error"):
        rig.run(fallback=alone)
    assert rig.facts(Phase.FALLBACK) == []
    rig.run(
        fallback=alone, observer=lambda *event: [rig.grid.revive(n) for n in rig.nodes.values()]
    )
    assert made == [1, 1]
    assert len(rig.facts(Phase.FALLBACK)) == 1


def test_misses_that_are_not_in_a_row_do_not_count(rig):
    plan = dataclasses.replace(FALLEN, fallback=Fallback(after=2, job="job.toml"))
    seen = list[str]()

    def observe(attempt, phase, site, facts):
        if phase is Phase.STARTED:  # every other attempt misses the minimum
            odd = attempt.attempt % 2 == 1
            for place in GONE:
                (rig.grid.kill if odd else rig.grid.revive)(rig.nodes[place])
        seen.append(phase)

    rig.run(plan=plan, fallback=plus_one, observer=observe)
    assert Phase.FALLBACK not in seen
    assert rig.cohorts == [[0, 1, 2, 3]] * 3


def test_sites_that_refuse_are_no_miss(tmp_path):
    greedy = dataclasses.replace(FALLEN, privacy=dataclasses.replace(FALLEN.privacy, epsilon=500.0))
    rig = Rig(tmp_path, plan=greedy)
    try:
        with pytest.raises(RoundError, match="refused-policy"):
            rig.run(fallback=plus_one)
        assert rig.facts(Phase.FALLBACK) == []
    finally:
        rig.close()


def test_an_engine_without_a_job_says_so(rig):
    absent(rig, *GONE)
    with pytest.raises(RoundError, match="nobody is here to train its job"):
        rig.run()


def test_a_plan_without_a_fallback_records_what_it_always_did(tmp_path):
    rig = Rig(tmp_path, plan=dataclasses.replace(FALLEN, fallback=None))
    try:
        absent(rig, *GONE)
        with pytest.raises(RoundError, match="failed in 4 attempts"):
            rig.run(fallback=plus_one)
        assert all("missed" not in facts for _, facts in rig.facts(Phase.ABORTED))
    finally:
        rig.close()


def test_a_site_takes_the_coordinators_adapter_only_when_somebody_has_approved_it(
    field,  # noqa: F811  # the fixture
):
    """It has approved the plan; with the adapter of its fallback it is a plan of its own."""
    now = datetime(2026, 5, 1, tzinfo=UTC)
    approve(field.site(0), FALLEN, who="jo", now=now)
    assert field.task(at(1), 0, plan=FALLEN) is SiteCode.READY
    made = plus_one(1, desk.START)
    digest = hashlib.sha256(made).hexdigest()
    named, said = FALLEN.after_fallback(digest), canonical_json([1, digest])

    def task(attempt: Attempt, adapter: bytes = made) -> SiteCode | None:
        code: SiteCode | None = field.task(attempt, 0, plan=FALLEN, adapter=adapter, fallback=said)
        return code

    field.refused(task(at(2)), SiteCode.REFUSED_POLICY, "waits for approval")
    assert [plan.hash() for plan in waiting_plans(field.site(0))] == [named.hash()]
    approve(field.site(0), named, who="jo", now=now)
    code = task(at(2), plus_one(1, made))
    field.refused(code, SiteCode.PROTOCOL_ABORTED, "not the one that the coordinator names")
    assert task(at(2, 2)) is SiteCode.READY
    assert "sums not checked" not in {entry["what"] for entry in field.journal()}


@pytest.mark.parametrize(
    "said",
    [b"x", b"1", b"[1]", b'[2,"a"]', b'[0,"a"]', b'[true,"a"]', b"[1,5]", b'[1,"a"]'],
)
def test_what_a_task_says_of_a_fallback_is_read_strictly(said):
    with pytest.raises((ProtocolError, ConfigurationError)):
        _, digest = read_fallback(said, at(2), FALLEN) or (0, "")
        FALLEN.after_fallback(digest)
    with pytest.raises(ProtocolError, match=r"no \[fallback\]"):
        read_fallback(canonical_json([1, "a" * 64]), at(2), desk.PLAN)
    assert read_fallback(canonical_json([1, "a" * 64]), at(2), FALLEN) == (1, "a" * 64)
    assert read_fallback(None, at(2), desk.PLAN) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_coordinator_whose_sites_stay_away_completes_the_run_and_registers_it(
    base, public, tmp_path
):
    house = House(tmp_path / "house")
    job = write_job(tmp_path, base, public)
    plan = make_plan(
        base,
        rounds=tiny.make_rounds(count=2, deadline="1s"),
        fallback=Fallback(after=2, job=str(job)),
    )
    toml = tmp_path / "plan.toml"
    toml.write_text(typed_toml.dump(plan))
    with office.serving(house.folder), house.engine(), open_control(house.folder) as control:
        words = ["run", "start", str(toml), "--name", "lonely", "--coordinator"]
        started = CliRunner().invoke(app, [*words, str(house.folder.root)])
        assert started.exit_code == 0, started.output
        job.unlink()  # the coordinator has a copy
        wait_for(lambda: state(control, "lonely") in {"finished", "paused"})
        shown = control.call("Show", "lonely")
        assert (shown["state"], shown["committed"]) == ("finished", 2), shown
        events = [(e["round"], e["phase"]) for e in control.watch("lonely")]
    assert [e for e in events if e[1] in {"aborted", "fallback"}] == [
        (number, phase) for number in (1, 2) for phase in ("aborted", "aborted", "fallback")
    ]
    registry = Registry(house.folder.registry)
    version = registry.verify("tiny")
    assert version.signer == house.folder.identity().public_key.hex()
    spent = version.spent
    assert spent is not None
    assert (spent.rounds, spent.sites, spent.central_rounds) == (0, 0, 2)
    assert "without** differential privacy" not in model_card(version, [])
    open_trained(registry.path("tiny"))
