"""SCAFFOLD at a site: the correction follows the noise, and goes on only from what was charged."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedward.aggregation.control import CONTROL, next_control
from fedward.aggregation.fixed_point import clip_update
from fedward.attempt import Attempt
from fedward.canonical import Json, canonical_json
from fedward.client import shared_variate
from fedward.client.remote_trainer import RemoteTrainer
from fedward.client.scaffold import Variates
from fedward.client.shared_variate import with_control
from fedward.client.trainer import LocalTrainer, mechanism
from fedward.client.trainer_service import serve
from fedward.client.training import TrainRequest, TrainResult
from fedward.errors import InvalidValue, ModelError, SiteCode
from fedward.identity import Identity, Member, Roster
from fedward.plan import Plan, Tuner
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.plan_fallback import Fallback
from fedward.plan_gate import Gate
from fedward.tuning.adapter import State, from_bytes
from fedward.tuning.records import Records
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import Vector, dimension, moments_of, replace_vector
from tests.client.desk import LAYOUT, PLAN, RUN, SITES, Desk, Scripted
from tests.simulations import tiny

STEPS, RATE = 3, 0.5


def plan_of(base: Path, *, rounds: dict[str, Any] | None = None, **sections: Any) -> Plan:
    given = {"steps": STEPS, "learning_rate": RATE, "optimizer": "sgd", "scaffold": True}
    settings = {"aggregation": Aggregation(scheme="fedavg", update_clip=10.0)} | sections
    return tiny.make_plan(base, rounds=tiny.make_rounds(**(given | (rounds or {}))), **settings)


def request(plan: Plan, number: int = 1, **changes: Any) -> TrainRequest:
    given = {"spent": number - 1, "counted": number - 1} | changes
    return tiny.make_request(plan, number, **given)


def numbers(plan: Plan, seed: int) -> Vector:
    length = dimension(tuned_model(plan).layout)
    return np.random.default_rng(seed).normal(0, 0.1, length).astype(np.float32)


def trainer(keep: Path | None, records: Records | None = None) -> LocalTrainer:
    records = tiny.make_records("a", 4) if records is None else records
    return LocalTrainer(records, key=tiny.key("a"), keep=keep)


class TestThePlan:
    @pytest.mark.parametrize(
        ("sections", "message"),
        [
            ({"rounds": {"optimizer": "adamw"}}, "'sgd' beside scaffold"),
            ({"rounds": {"proximal": 0.1}}, "0 beside scaffold"),
            ({"rounds": {"learning_rate": 1e-12}}, "1e-9 to 1e9 beside scaffold"),
            ({"mode": "pooled", "rounds": {"steps": 1}}, "'local' beside scaffold"),
            ({"aggregation": Aggregation(scheme="alternating")}, "'fedavg' or 'ffa'"),
            ({"aggregation": Aggregation(scheme="sketch")}, "'fedavg' or 'ffa'"),
            ({"aggregation": Aggregation(scheme="sketch-once")}, "'fedavg' or 'ffa'"),
            ({"aggregation": Aggregation(scheme="fedavg", coordinates=0.5)}, "1 beside scaffold"),
            ({"cohort": Cohort(groups=3)}, "a median is no mean beside scaffold"),
            ({"fallback": Fallback(after=1, job="a")}, "none beside scaffold"),
            ({"tuner": Tuner(personal=("score",))}, "none beside scaffold"),
            ({"tuner": Tuner(method="lora+")}, "two rates beside scaffold"),
        ],
    )
    def test_what_it_would_be_wrong_beside_is_refused(self, base, sections, message):
        with pytest.raises(InvalidValue, match=message):
            plan_of(base, **sections)

    @pytest.mark.parametrize("scheme", ["fedavg", "ffa"])
    def test_what_it_is_right_beside(self, base, scheme):
        aggregation: Any = Aggregation(scheme=scheme, optimizer="adam", word_bits=16)
        plan_of(base, aggregation=aggregation, rounds={"participants": 5})


def moved(plan: Plan, kept: State, asked: TrainRequest, *, corrected: bool = True) -> Vector:
    """What a training of nobody, with the noise of one stream, changes."""
    correct = Variates(asked, kept).correct if corrected else None
    return tiny.trained(plan, mechanism(plan), steps=STEPS, before_step=correct)


class TestTheStep:
    def test_the_correction_follows_clip_and_noise(self, base):
        """Whatever it is, the noise under it is the very same: privacy is what it was."""
        plan = plan_of(base)
        shared, own = numbers(plan, 1), numbers(plan, 2)
        asked = request(plan, 2, adapter=with_control(tuned_model(plan).start, shared))
        kept = {CONTROL: torch.from_numpy(own)}
        with_it, without = (moved(plan, kept, asked, corrected=each) for each in (True, False))
        np.testing.assert_allclose(
            with_it - without, -STEPS * RATE * (shared - own), rtol=0, atol=1e-5
        )
        assert np.abs(without).max() > 0.1, "there is noise"
        assert np.abs(with_it - without).max() > 0.1, "negative control"

    def test_a_first_round_has_none(self, base):
        plan = plan_of(base)
        first, plain = (moved(plan, {}, request(plan), corrected=each) for each in (True, False))
        assert first.tobytes() == plain.tobytes()

    @pytest.mark.parametrize("part", ["shared", "own"])
    def test_one_of_another_length_is_refused(self, base, part):
        plan = plan_of(base)
        short = np.zeros(3, dtype=np.float32)
        asked = request(plan, 2, adapter=with_control(tuned_model(plan).start, short))
        with pytest.raises(ModelError, match="control variate of shape"):
            if part == "shared":
                Variates(asked, {})
            else:
                Variates(request(plan, 2), {CONTROL: torch.from_numpy(short)})


class TestTheTrainer:
    @pytest.mark.parametrize("clip", [10.0, 0.01])
    def test_it_keeps_what_follows_from_the_update_as_it_is_sent(self, base, tmp_path, clip):
        plan = plan_of(base, aggregation=Aggregation(scheme="fedavg", update_clip=clip))
        first = trainer(tmp_path).train(request(plan)).update
        shared = numbers(plan, 1)
        asked = request(plan, 2, adapter=with_control(tuned_model(plan).start, shared))
        second = trainer(tmp_path).train(asked).update  # a restart
        assert (np.linalg.norm(second) > clip) == (clip < 1)
        own = -clip_update(first, clip) / (STEPS * RATE)
        for number, expected in (
            (1, own),
            (2, own - shared - clip_update(second, clip) / (STEPS * RATE)),
        ):
            (file,) = tmp_path.glob(f"*/*/{number}.safetensors")
            kept = from_bytes(file.read_bytes())[CONTROL].numpy()
            np.testing.assert_allclose(kept, expected, rtol=0, atol=1e-5)

    def test_it_goes_on_from_the_update_that_counts(self, base, tmp_path):
        """The second was sent in vain: the third goes on from the first, the fourth from it."""
        plan, at = plan_of(base), tmp_path
        trainer(at).train(request(plan))
        trainer(at).train(request(plan, 2))
        trainer(at).train(request(plan, 2, attempt=Attempt(run="r", round=2, attempt=2), draw=1,
                                  spent=2))  # fmt: skip
        assert sorted(file.stem for file in at.rglob("*.safetensors")) == ["1", "3"]
        trainer(at).train(request(plan, 3, spent=3, counted=3))
        assert sorted(file.stem for file in at.rglob("*.safetensors")) == ["3", "4"]

    def test_one_that_is_lost_begins_at_zero_and_the_log_says_so(self, base, tmp_path, caplog):
        plan = plan_of(base)
        with caplog.at_level(logging.WARNING):
            trainer(tmp_path).train(request(plan))
            assert not caplog.messages
            anew = trainer(tmp_path / "other").train(request(plan, 2)).update
        assert caplog.messages == ["what this site kept of run 'r' is gone: it begins anew"]
        again = trainer(tmp_path / "third").train(request(plan, 2, counted=0)).update
        assert anew.tobytes() == again.tobytes()
        assert anew.tobytes() != trainer(tmp_path).train(request(plan, 2)).update.tobytes()


class TestTheSocket:
    def test_a_trainer_behind_it_goes_on_alike(self, base, tmp_path):
        plan, keeps, folder = plan_of(base), (tmp_path / "a", tmp_path / "b"), tmp_path / "s"
        start = tuned_model(plan).start
        adapter = with_control(start, numbers(plan, 1))
        asked = [request(plan), request(plan, 2, adapter=adapter, spent=3, counted=1)]
        folder.mkdir(mode=0o700)
        server = serve(folder / "t.sock", lambda *_: trainer(keeps[1]))
        try:
            here, there = trainer(keeps[0]), RemoteTrainer(folder / "t.sock", start_seconds=5)
            for each in asked:
                there.prepare(each)
                mine, theirs = (one.train(each) for one in (here, there))
                assert mine.update.tobytes() == theirs.update.tobytes()
            wrong = with_control(start, np.zeros(3, dtype=np.float32))
            with pytest.raises(ModelError):
                there.prepare(request(plan, 2, adapter=wrong))
        finally:
            server.stop(None).wait()
        one, other = (sorted(k.rglob("*.safetensors")) for k in keeps)
        assert [p.stem for p in one] == [p.stem for p in other] == ["1", "4"]
        assert [p.read_bytes() for p in one] == [p.read_bytes() for p in other]


ROUNDS = dataclasses.replace(PLAN.rounds, optimizer="sgd", scaffold=True)


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path, plan=dataclasses.replace(PLAN, rounds=ROUNDS))
    yield desk
    desk.close()


def counted(*order: Json) -> dict[str, bytes]:
    return {"counted": canonical_json(list(order))}


class TestAHostileCoordinator:
    def test_an_honest_one_is_believed(self, desk):
        desk.round(1)
        desk.restart(0)
        assert desk.task(Attempt(run=RUN, round=2), 0, **counted(1, 1, 1)) is SiteCode.READY
        assert [asked.counted for asked in desk.trainers[0].requests] == [0, 1]
        control = moments_of(desk.trainers[0].requests[1].adapter)[CONTROL]
        whole = moments_of(desk.adapter)[CONTROL]
        np.testing.assert_array_equal(control, (whole / np.float64(SITES)).astype(np.float32))

    @pytest.mark.parametrize(
        "said",
        [
            counted(1, 1, 2),
            counted(2, 1, 1),
            counted(1, 1),
            counted(1, 1, "1"),
            counted(1, 1, 0),
            {"counted": b"1"},
            {"counted": b"["},
        ],
    )
    def test_an_update_that_never_left_does_not_count(self, desk, said):
        """What a site kept beside it would tell of patients what no noise is charged for."""
        desk.round(1)
        assert desk.task(Attempt(run=RUN, round=2), 0, **said) is SiteCode.PROTOCOL_ABORTED
        assert len(desk.trainers[0].requests) == 1
        assert desk.task(Attempt(run=RUN, round=2), 0, **counted(1, 1, 1)) is SiteCode.READY

    def test_an_update_that_was_trained_and_not_sent_does_not_count(self, desk):
        attempt = Attempt(run=RUN, round=1)
        for site in range(SITES):
            assert desk.task(attempt, site) is SiteCode.READY
        again = dataclasses.replace(attempt, attempt=2)
        assert desk.task(again, 0, **counted(1, 1, 1)) is SiteCode.PROTOCOL_ABORTED
        assert desk.task(again, 0) is SiteCode.READY

    @pytest.mark.parametrize("restart", [False, True])
    def test_beside_one_adapter_one_update_counts(self, desk, restart):
        """Else two sums over the same sites would differ by what one of them kept: its update."""
        desk.round(1)
        attempts = [Attempt(run=RUN, round=2, attempt=number) for number in (1, 2, 3)]
        assert desk.task(attempts[0], 0, **counted(1, 1, 1)) is SiteCode.READY
        if restart:
            desk.restart(0)
        assert desk.task(attempts[1], 0) is SiteCode.PROTOCOL_ABORTED
        assert desk.task(attempts[2], 0, **counted(1, 1, 1)) is SiteCode.READY

    def test_of_a_round_that_the_gate_refused_as_well(self, tmp_path):
        """Its adapter, and so the gradients, are those of the round after it."""
        gate = Gate(data="r.jsonl")
        desk = Desk(tmp_path, plan=dataclasses.replace(PLAN, rounds=ROUNDS, gate=gate))
        desk.round(1)
        said, refused = counted(1, 1, 1), {"refused": canonical_json([2, 2])}
        assert desk.task(Attempt(run=RUN, round=2), 0, **said) is SiteCode.READY
        third = Attempt(run=RUN, round=3)
        assert desk.task(third, 0, **refused) is SiteCode.PROTOCOL_ABORTED
        assert desk.task(third, 0, **refused, **said) is SiteCode.READY
        desk.close()

    def test_another_shared_control_variate_is_refused(self, desk):
        desk.round(1)
        honest = desk.adapter
        control = moments_of(honest)[CONTROL].copy()
        control[0] += 1e-3
        desk.adapter = replace_vector(honest, (), np.zeros(0, dtype=np.float32), {CONTROL: control})
        attempt = Attempt(run=RUN, round=2)
        assert desk.task(attempt, 0) is SiteCode.PROTOCOL_ABORTED
        desk.adapter = honest
        assert desk.task(attempt, 0) is SiteCode.READY


class Steady(Scripted):
    """Updates of a gradient that is always the same, corrected; no noise hides what is read."""

    def __init__(self, site: int) -> None:
        super().__init__(site)
        self.kept = dict[int, State]()
        self.gradient = torch.linspace(-0.1, 0.1, dimension(LAYOUT)) * (site + 1)

    def train(self, request: TrainRequest) -> TrainResult:
        self.requests.append(request)
        variates = Variates(request, self.kept.get(request.basis, {}))
        y = torch.nn.Parameter(torch.zeros_like(self.gradient))
        y.grad = self.gradient.clone()
        variates.correct([y])
        update = -y.grad.numpy()
        self.kept[request.spent + 1] = variates.after(update)
        return TrainResult(update=update, slots=np.zeros(0))


def test_twin_two_words_about_one_site_tell_its_update(desk, monkeypatch):
    """Sums of two attempts over the same sites, site 1's control variate once in and once out."""
    monkeypatch.setattr(shared_variate, "read_refused", lambda *_: 99)  # the check is off
    trainers = [Steady(site) for site in range(SITES)]
    desk.agents = {site: desk.agent(site, trainers[site]) for site in range(SITES)}
    desk.round(1)
    sums = list[Numbers]()
    for number in (1, 2):
        now = Attempt(run=RUN, round=2, attempt=number)
        for site in range(SITES):
            said = {} if (site, number) == (1, 2) else counted(1, 1, 1)
            assert desk.task(now, site, **said) is SiteCode.READY
        sums.append(desk.session(now)[0].result().mean * SITES)
    first = -trainers[1].gradient.numpy()  # the update that it sent in round 1
    np.testing.assert_allclose(sums[1] - sums[0], first, rtol=0, atol=1e-5)
    assert np.abs(first).max() > 0.05


Numbers = npt.NDArray[np.float64]


def distance(*, scaffold: bool, steps: int = 10, rounds: int = 60, sites: int = 5) -> float:
    """How far from the optimum sites end whose losses are quadratics with other centres.

    The local steps are the real correction's, the means the real sum of control variates.
    """
    draw, key = np.random.default_rng(7), Identity(bytes(32)).public_key
    layout, size = LAYOUT, dimension(LAYOUT)
    bends, centres = draw.uniform(0.2, 2.0, (sites, size)), draw.normal(0, 3, (sites, size))
    best = (bends * centres).sum(0) / bends.sum(0)
    rate = 0.1
    plan = dataclasses.replace(
        PLAN,
        rounds=dataclasses.replace(ROUNDS, steps=steps, learning_rate=rate, count=rounds),
        aggregation=Aggregation(scheme="fedavg", update_clip=1e3),
    )
    members = tuple(
        Member(id=i, name=str(i), public_key=key[:-1] + bytes([i])) for i in range(sites)
    )
    roster = Roster(epoch=1, coordinator=key, members=members)
    x, kept, control = np.zeros(size), [State()] * sites, np.zeros(size, dtype=np.float32)
    for number in range(1, rounds + 1):
        start = replace_vector(b"\x02\0\0\0\0\0\0\0{}", layout, x.astype(np.float32))
        asked = TrainRequest(
            plan=plan,
            attempt=Attempt(run="r", round=number),
            draw=0,
            adapter=with_control(start, control / np.float32(sites)),
            layout=layout,
        )
        updates = []
        for i in range(sites):
            variates, y = Variates(asked, kept[i]), torch.nn.Parameter(torch.tensor(x))
            for _ in range(steps):
                y.grad = torch.from_numpy(bends[i]) * (y.detach() - torch.from_numpy(centres[i]))
                if scaffold:
                    variates.correct([y])
                y.data -= rate * y.grad
            update = (y.detach().numpy() - x).astype(np.float32)
            kept[i] = variates.after(update)
            updates.append(update)
        mean: Numbers = np.mean(np.array(updates, dtype=np.float64), axis=0)
        control = next_control(control, mean, plan, roster, range(sites))[CONTROL]
        x = x + mean
    return float(np.linalg.norm(x - best))


def test_many_local_steps_drift_less():
    """The paper's claim (section 5): FedAvg ends beside the optimum, SCAFFOLD in it."""
    with_it, without = distance(scaffold=True), distance(scaffold=False)
    assert without > 0.1
    assert with_it < 1e-3 * without
    # With one step there is no drift, and nothing to gain: FedAvg is gradient descent.
    assert distance(scaffold=False, steps=1, rounds=300) < 1e-3 * without
