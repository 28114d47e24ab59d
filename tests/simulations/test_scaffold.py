"""SCAFFOLD in whole federations: what the paper's Algorithm 1 gives, whoever is lost when."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import Message

from fedward.aggregation.control import CONTROL
from fedward.aggregation.rules import masked_bytes
from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.client.trainer import LocalTrainer
from fedward.messages import parts_of
from fedward.plan import Plan
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.plan_gate import Gate
from fedward.server.store import Phase
from fedward.tuning.adapter import flatten, from_bytes, load_adapter, unflatten_into
from fedward.tuning.objectives import collate, encode, loss_per_example
from fedward.tuning.records import Records
from fedward.tuning.tuned import tuned_model
from fedward.tuning.tuners import trainable
from fedward.tuning.vector import moments_of, vector_of
from tests.simulations import tiny
from tests.simulations.test_federation import Accident, bytes_of_masked, losing, reviving_at_once

STEPS, RATE = 3, 0.5
Numbers = npt.NDArray[np.float64]


def plan_of(base: Path, *, rounds: dict[str, Any] | None = None, **sections: Any) -> Plan:
    settings = {"count": 3, "steps": STEPS, "learning_rate": RATE, "optimizer": "sgd"}
    given: dict[str, Any] = {
        "rounds": tiny.make_rounds(**(settings | {"scaffold": True} | (rounds or {}))),
        "aggregation": Aggregation(scheme="fedavg", update_clip=10.0),
        "privacy": tiny.NAKED,
    }
    return tiny.make_plan(base, **(given | sections))


def make_trainers(sites: dict[str, Records], keep: Path) -> dict[str, LocalTrainer]:
    return {
        name: LocalTrainer(records, key=tiny.key(name), keep=keep / name)
        for name, records in sites.items()
    }


def gradient(plan: Plan, records: Records, at: Numbers) -> Numbers:
    """The site's gradient without any of the engine, at these parameters."""
    tuned = tuned_model(plan)
    load_adapter(tuned.model, from_bytes(tuned.start))
    unflatten_into(tuned.model, at.astype(np.float32))
    encoded = encode(records, tuned.tokenizer, plan)
    everything = list(range(len(encoded.examples)))
    notes = {len(unit) for unit in records.units}
    assert notes == {2}, "a patient's loss is the mean of the notes'"
    parameters = list(trainable(tuned.model).values())
    loss = loss_per_example(tuned.model, collate(encoded, everything, torch.device("cpu"))).sum()
    parts = torch.autograd.grad(loss / 2 / plan.rounds.normaliser, parameters)
    return np.concatenate([part.double().numpy().ravel() for part in parts])


@dataclasses.dataclass
class Reference:
    """Algorithm 1 of the paper, option II, in the order in which it is printed there."""

    plan: Plan
    sites: list[Records]
    weights: list[float]
    corrected: bool = True

    def __post_init__(self) -> None:
        tuned = tuned_model(self.plan)
        load_adapter(tuned.model, from_bytes(tuned.start))
        self.x = flatten(tuned.model).astype(np.float64)
        self.c = np.zeros_like(self.x)
        self.own = [np.zeros_like(self.x) for _ in self.sites]

    def round(self, cohort: Sequence[int]) -> None:
        moves, more = np.zeros_like(self.x), np.zeros_like(self.x)
        for i in cohort:
            y = self.x.copy()
            for _ in range(STEPS):
                y -= RATE * (gradient(self.plan, self.sites[i], y) - self.own[i] + self.c)
            new = self.own[i] - self.c + (self.x - y) / (STEPS * RATE)
            moves += self.weights[i] * (y - self.x)
            more += self.weights[i] * (new - self.own[i])
            if self.corrected:
                self.own[i] = new
        self.x += moves / sum(self.weights[i] for i in cohort)
        if self.corrected:
            self.c += more / sum(self.weights)


def kept(folder: Path, keep: Path, site: int, name: str) -> Numbers | None:
    """The c_i that a site goes on from: of its last update in a committed sum."""
    committed = tiny.facts_of(folder, Phase.COMMITTED)
    orders = [attempt.order for attempt, facts in committed if site in facts["cohort"]]
    if not orders:
        return None
    number = tiny.sent(folder, site).index(orders[-1]) + 1
    (file,) = (keep / name).glob(f"*/*/{number}.safetensors")
    return from_bytes(file.read_bytes())[CONTROL].double().numpy()


def check(folder: Path, plan: Plan, sites: dict[str, Records], adapter: bytes) -> None:
    """Adapter, c and every c_i are the paper's; the control: without its correction nothing is."""
    given = plan.aggregation.weights or {}
    weights = [given.get(name, 1.0) for name in sites]
    right, wrong = (
        Reference(plan, list(sites.values()), weights, corrected) for corrected in (True, False)
    )
    for cohort in tiny.cohorts(folder):
        for each in (right, wrong):
            each.round(cohort)
    layout = tuned_model(plan).layout
    got = vector_of(adapter, layout)
    moved = np.abs(right.x - vector_of(tuned_model(plan).start, layout)).max()
    np.testing.assert_allclose(got, right.x, rtol=0, atol=1e-5 * moved)
    assert np.abs(got - wrong.x).max() > 100 * 1e-5 * moved, "negative control"
    shared = moments_of(adapter)[CONTROL] / sum(weights)
    scale = np.abs(right.c).max()
    np.testing.assert_allclose(shared, right.c, rtol=0, atol=1e-4 * scale)
    total = np.zeros_like(right.c)
    for site, name in enumerate(sites):
        own = kept(folder, folder / "keep", site, name)
        if own is None:
            own = np.zeros_like(right.c)
        np.testing.assert_allclose(own, right.own[site], rtol=0, atol=1e-4 * scale)
        total += weights[site] * own
    np.testing.assert_allclose(shared, total / sum(weights), rtol=0, atol=1e-4 * scale)


def uneven(count: int) -> dict[str, Records]:
    """Sites that differ: of two classes each has the one more often, or the other."""
    sites = tiny.make_sites(count, patients=2)
    for place, (name, records) in enumerate(sites.items()):
        rows = [{**row, "label": tiny.LABELS[place % 2]} for row in records.rows]
        sites[name] = dataclasses.replace(records, rows=tuple(rows))
    return sites


WEIGHED: dict[str, Any] = {
    "aggregation": Aggregation(
        scheme="fedavg", update_clip=10.0, weights={"a": 2.0, "b": 1.0, "c": 1.5, "d": 1.0}
    ),
    "cohort": Cohort(minimum=4, colluders=1),
}


@pytest.mark.parametrize(
    ("count", "sections"),
    [
        (3, {}),
        (4, {"aggregation": Aggregation(scheme="ffa", update_clip=10.0)}),
        (4, WEIGHED),
        (6, {"rounds": {"participants": 4}}),
    ],
    ids=["fedavg", "ffa", "weights", "participants"],
)
def test_a_federation_is_the_papers(tmp_path, base, count, sections):
    plan, sites = plan_of(base, **sections), uneven(count)
    trainers = make_trainers(sites, tmp_path / "keep")
    adapter = tiny.make_federation(tmp_path, plan, trainers).run()
    cohorts = tiny.cohorts(tmp_path)
    assert {len(cohort) for cohort in cohorts} == {plan.rounds.participants or count}
    check(tmp_path, plan, sites, adapter)


def test_beside_a_server_optimizer_and_narrow_words(tmp_path, base):
    """The adapter is another than the paper's; the shared control variate is the sites' mean."""
    settings = Aggregation(scheme="fedavg", update_clip=2.0, optimizer="adam", word_bits=16)
    plan, sites = plan_of(base, aggregation=settings), uneven(3)
    trainers = make_trainers(sites, tmp_path / "keep")
    adapter = tiny.make_federation(tmp_path, plan, trainers).run()
    moments = moments_of(adapter)
    assert sorted(moments) == [CONTROL, "first", "second"]
    own = [kept(tmp_path, tmp_path / "keep", i, name) for i, name in enumerate(sites)]
    assert all(each is not None and each.any() for each in own)
    mean = np.mean([each for each in own if each is not None], axis=0)
    off = float(np.linalg.norm(moments[CONTROL] / 3 - mean))
    # Each of three rounds rounds an update of three sites to a 2^15th of update_clip or finer.
    assert 0 < off < 3 * 3 * 2.0 / 2**15 * np.sqrt(len(mean)) / (STEPS * RATE)
    assert float(np.linalg.norm(moments[CONTROL] / 3 - mean / 2)) > 10 * off, "negative control"


@pytest.mark.parametrize("count", [3, 4], ids=["tried-again", "goes-on"])
@pytest.mark.parametrize("lost", [False, True], ids=["killed", "answer-lost"])
def test_an_update_that_is_in_no_sum_moves_no_control_variate(tmp_path, base, count, lost):
    """It was charged, and its c_i kept: the site goes on from the one before, or from none.

    With three sites all are needed: the first attempt's updates of everybody are in no sum.
    """
    plan, sites = plan_of(base), uneven(count)
    trainers, accident = make_trainers(sites, tmp_path / "keep"), Accident("masked")
    options = {} if lost else {"fault": accident}
    federation = tiny.make_federation(tmp_path, plan, trainers, **options)
    if lost:
        losing(federation, accident)
    adapter = federation.run(reviving_at_once(federation))
    assert accident.happened
    assert tiny.cohorts(tmp_path)[0] == ([0, 1, 2] if count == 3 else [0, 2, 3])
    charged = sum(len(tiny.sent(tmp_path, site)) for site in range(count))
    assert charged > sum(map(len, tiny.cohorts(tmp_path))) or not (lost or count == 3)
    check(tmp_path, plan, sites, adapter)


class _Stop(Exception):
    pass


def test_coordinator_and_sites_resume_with_what_they_kept(tmp_path, base):
    plan, sites = plan_of(base), uneven(3)

    def stop(attempt: Attempt, phase: Phase, site: int, facts: Json) -> None:
        if phase is Phase.COMMITTED:
            raise _Stop

    for _ in range(2):
        federation = tiny.make_federation(tmp_path, plan, make_trainers(sites, tmp_path / "keep"))
        with pytest.raises(_Stop):
            federation.run(stop)
    trainers = make_trainers(sites, tmp_path / "keep")
    adapter = tiny.make_federation(tmp_path, plan, trainers).run()
    check(tmp_path, plan, sites, adapter)


def test_a_round_that_the_gate_refuses_moves_no_control_variate(tmp_path, base):
    plan, sites = plan_of(base, gate=Gate(data="x")), uneven(3)
    tried = list[bytes]()

    def loss(adapter: bytes) -> float:
        if adapter not in tried:
            tried.append(adapter)
        return float(tried.index(adapter) == 2)  # after the start and the first round's

    trainers = make_trainers(sites, tmp_path / "keep")
    adapter = tiny.make_federation(tmp_path, plan, trainers, gate=loss).run()
    assert len(tiny.facts_of(tmp_path, Phase.REFUSED)) == 1
    assert len(tiny.cohorts(tmp_path)) == 2
    assert [len(tiny.sent(tmp_path, site)) for site in range(3)] == [3] * 3
    check(tmp_path, plan, sites, adapter)


def pieces(vector: npt.NDArray[np.float32]) -> Iterator[bytes]:
    return (vector[i : i + 2].tobytes() for i in range(0, len(vector) - 1, 2))


def test_what_leaves_is_the_update_alone(tmp_path, base):
    """With privacy: as many bytes and as much epsilon as without, and no c_i in any letter."""
    private = tiny.make_plan(base).privacy
    spent, crossed = [], b""
    for scaffold in (True, False):
        plan = plan_of(base, privacy=private, rounds={"scaffold": scaffold})
        folder, seen = tmp_path / str(scaffold), list[Message]()
        trainers = make_trainers(uneven(3), folder / "keep")
        federation = tiny.make_federation(folder, plan, trainers, watch=seen.append)
        federation.run()
        words, _ = masked_bytes(plan, tuned_model(plan).layout)
        assert bytes_of_masked(federation, seen) == [words] * 9
        spent.append(federation.epsilon_spent("a"))
        if scaffold:
            crossed = b"".join(
                part for message in seen if message.has_content()
                for part in parts_of(message.content).values()
            )  # fmt: skip
            files = list((folder / "keep").rglob("*.safetensors"))
            own = [from_bytes(file.read_bytes())[CONTROL].numpy() for file in files]
            assert len(files) == 6, "of three sites the last two"
            assert not any(piece in crossed for c_i in own for piece in pieces(c_i))
        else:
            assert not list((folder / "keep").rglob("*.safetensors"))
    start = vector_of(tuned_model(plan).start, tuned_model(plan).layout)
    assert all(piece in crossed for piece in pieces(start)), "what crosses is found so"
    assert spent[0] == spent[1] > 0
