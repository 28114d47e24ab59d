"""Personal parts stay: trained and kept at each site, and in nothing that leaves it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from fedward.attempt import Attempt
from fedward.client import trainer as module
from fedward.client.personal import PersonalParts
from fedward.client.remote_trainer import RemoteTrainer
from fedward.client.trainer import LocalTrainer, mechanism
from fedward.client.trainer_service import serve
from fedward.client.training import TrainRequest, TrainResult
from fedward.errors import ConfigurationError, InvalidValue, ModelError, SiteCode
from fedward.messages import parts_of
from fedward.plan import Plan, Tuner
from fedward.plan_aggregation import Aggregation
from fedward.server.store import Phase
from fedward.tuning.adapter import from_bytes
from fedward.tuning.records import Records
from fedward.tuning.tuned import tuned_model
from fedward.tuning.tuners import personal, trainable
from fedward.tuning.vector import dimension
from tests.client.desk import RUN, SITES, Desk, Scripted
from tests.simulations import tiny

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def plan_of(base: Path, *names: str, **sections: Any) -> Plan:
    given: dict[str, Any] = {
        "tuner": Tuner(arguments=LORA, personal=names),
        "rounds": tiny.make_rounds(optimizer="sgd", learning_rate=0.5),
        "aggregation": Aggregation(scheme="fedavg", update_clip=10.0),
        "privacy": tiny.NAKED,
    }
    return tiny.make_plan(base, **(given | sections))


def request(plan: Plan, number: int = 1, **changes: Any) -> TrainRequest:
    return tiny.make_request(plan, number, **({"spent": number - 1} | changes))


def trainer(keep: Path | None, patients: int = 4) -> LocalTrainer:
    return LocalTrainer(tiny.make_records("a", patients), key=tiny.key("a"), keep=keep)


class TestThePlan:
    def test_names_what_is_personal(self, base):
        model = tuned_model(plan_of(base, "score"))
        assert [n for n, _ in model.layout if "score" in n] == []
        assert any("score" in n for n in trainable(model.model))
        halves = tuned_model(plan_of(base, "score", "lora_B")).layout
        assert all("lora_A" in name for name, _ in halves)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (("scor",), "nothing that is trained is named 'scor'"),
            (("core",), "nothing that is trained"),
            (("score", "q_proj"), "nothing is left"),
        ],
    )
    def test_a_name_that_does_not_fit_the_model_is_refused(self, base, names, message):
        with pytest.raises(ConfigurationError, match=message):
            tuned_model(plan_of(base, *names))

    @pytest.mark.parametrize("name", ["", "a*", "a b", "é"])
    def test_a_pattern_is_no_name(self, name):
        with pytest.raises(InvalidValue, match="plain names"):
            Tuner(personal=(name,))

    def test_what_needs_both_factors_or_noise_is_refused(self, base):
        ffa: Any = Aggregation(scheme="ffa")
        with pytest.raises(InvalidValue, match="one of A and B is personal"):
            plan_of(base, "lora_B", aggregation=ffa)
        plan_of(base, "score", aggregation=ffa)
        with pytest.raises(InvalidValue, match="beside personal"):
            Tuner(arguments=LORA, personal=("score",), ranks={"a": 1})
        with pytest.raises(InvalidValue, match="none in mode 'pooled'"):
            plan_of(base, "score", mode="pooled")

    def test_a_plan_without_any_has_the_hash_that_it_had(self, base):
        assert b"personal" not in plan_of(base).to_json()
        assert plan_of(base).hash() != plan_of(base, "score").hash()


class TestTheSocket:
    def test_a_trainer_behind_it_goes_on_alike(self, base, tmp_path):
        """How many updates have left crosses it; what is personal does not."""
        plan, keeps = plan_of(base, "score"), (tmp_path / "here", tmp_path / "there")
        folder = tmp_path / "s"
        folder.mkdir(mode=0o700)
        server = serve(folder / "t.sock", lambda *_: trainer(keeps[1]))
        try:
            here, there = trainer(keeps[0]), RemoteTrainer(folder / "t.sock", start_seconds=5)
            for number in (1, 2):
                mine, theirs = (one.train(request(plan, number)) for one in (here, there))
                assert mine.update.tobytes() == theirs.update.tobytes()
        finally:
            server.stop(None).wait()
        one, other = (sorted(k.rglob("*.safetensors")) for k in keeps)
        assert [p.stem for p in one] == [p.stem for p in other] == ["1", "2"]
        assert [p.read_bytes() for p in one] == [p.read_bytes() for p in other]


class TestTheTrainer:
    def test_the_update_is_what_is_shared(self, base, tmp_path):
        plan = plan_of(base, "score")
        update = trainer(tmp_path).train(request(plan)).update
        everything = trainer(None).train(request(plan_of(base))).update
        assert len(update) == dimension(tuned_model(plan).layout) < len(everything)
        assert update.any()

    @pytest.mark.parametrize("factor", [1.0, 0.5, 2.0])
    def test_what_stays_is_noised_like_what_is_sent(self, base, tmp_path, monkeypatch, factor):
        """A step that sees nobody: the plan's noise in either part. The controls: other noise."""
        plan = plan_of(base, "score", privacy=tiny.make_plan(base).privacy)
        usual = mechanism(plan)
        less = dataclasses.replace(usual, noise_multiplier=usual.noise_multiplier * factor)
        monkeypatch.setattr(module, "mechanism", lambda _: less)
        nobody = LocalTrainer(Records(rows=(), units=()), key=tiny.key("a"), keep=tmp_path)
        update = nobody.train(request(plan)).update
        (file,) = tmp_path.rglob("*.safetensors")
        kept, start = from_bytes(file.read_bytes()), from_bytes(tuned_model(plan).start)
        stayed = np.concatenate([(kept[n] - start[n]).numpy().ravel() for n in kept])
        rounds = plan.rounds
        scale = rounds.learning_rate * usual.noise_multiplier * usual.clip / rounds.normaliser
        for part in (update, stayed):
            near = abs(float(part.std()) / scale - 1) < 5 / (2 * len(part)) ** 0.5
            assert near == (factor == 1.0)

    def test_the_next_round_goes_on_from_what_was_kept(self, base, tmp_path):
        plan = plan_of(base, "score")
        first = trainer(tmp_path)
        first.train(request(plan))
        again = trainer(tmp_path)  # a restart
        again.train(request(plan, 2))
        anew = trainer(tmp_path / "other")
        anew.train(request(plan, 2))
        (one,) = (from_bytes(p.read_bytes()) for p in tmp_path.glob("*/*/2.safetensors"))
        (other,) = (
            from_bytes(p.read_bytes()) for p in (tmp_path / "other").glob("*/*/2.safetensors")
        )
        assert one.keys() == other.keys()
        assert not any(torch.equal(one[n], other[n]) for n in one)

    def test_a_training_whose_update_never_left_is_forgotten(self, base, tmp_path):
        """What goes on from it would spend privacy that the ledger does not know of."""
        plan, parts = plan_of(base, "score"), PersonalParts(tmp_path)
        trainer(tmp_path).train(request(plan))
        lost = request(plan, 2, spent=0)
        assert parts.before(lost) == {}
        assert parts.before(request(plan, 2)).keys() == personal_names(plan)
        trainer(tmp_path, patients=6).train(lost)
        assert [p.stem for p in tmp_path.rglob("*.safetensors")] == ["1"]

    def test_two_runs_of_a_plan_stay_apart(self, base, tmp_path):
        plan = plan_of(base, "score")
        trainer(tmp_path).train(request(plan))
        other = dataclasses.replace(request(plan, 2), attempt=Attempt(run="s", round=2))
        assert PersonalParts(tmp_path).before(other) == {}

    def test_only_the_last_two_are_kept_and_nobody_else_reads_them(self, base, tmp_path):
        plan = plan_of(base, "score")
        for number in (1, 2, 3):
            trainer(tmp_path).train(request(plan, number))
        files = sorted(tmp_path.rglob("*.safetensors"))
        assert [file.stem for file in files] == ["2", "3"]
        assert all(file.stat().st_mode & 0o077 == 0 for file in files)

    def test_a_run_is_forgotten_and_no_other(self, base, tmp_path):
        plan, parts = plan_of(base, "score"), PersonalParts(tmp_path)
        other = dataclasses.replace(request(plan), attempt=Attempt(run="s", round=1))
        for asked in (request(plan), request(plan, 2), other):
            trainer(tmp_path).train(asked)
        kept = parts.newest(plan, "s")
        assert parts.forget("r") == 2
        assert parts.newest(plan, "r") == {}
        assert parts.newest(plan, "s").keys() == kept.keys() == personal_names(plan)
        assert parts.forget("r") == 0
        assert PersonalParts(None).forget("r") == 0

    def test_without_a_folder_nothing_is_written(self, base, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        plan = plan_of(base, "score")
        trainer(None).train(request(plan))
        assert not list(tmp_path.iterdir())
        assert PersonalParts(None).newest(plan, "r") == {}

    def test_the_sites_own_evaluation_uses_them(self, base, tmp_path):
        plan = plan_of(base, "score")
        records = tiny.make_records("a", 4)
        own = LocalTrainer(records, held_out=records, key=tiny.key("a"), keep=tmp_path)
        before = own.evaluate(plan, tuned_model(plan).start, "r").loss
        for number in (1, 2, 3):
            own.train(request(plan, number))
        after = own.evaluate(plan, tuned_model(plan).start, "r").loss
        assert after < before
        assert own.evaluate(plan, tuned_model(plan).start, "another").loss == before
        stranger = LocalTrainer(records, held_out=records, keep=tmp_path / "empty")
        assert stranger.evaluate(plan, tuned_model(plan).start, "r").loss == before


def personal_names(plan: Plan) -> Any:
    return personal(tuned_model(plan).model, plan).keys()


def run(folder: Path, plan: Plan) -> tuple[list[bytes], dict[str, Path]]:
    """A federation of four; everything that crossed, and where each site keeps its parts."""
    seen = list[bytes]()

    def watch(message: Message) -> None:
        if message.has_content():
            seen.extend(parts_of(message.content).values())

    sites = tiny.make_sites()
    keeps = {name: folder / "personal" / name for name in sites}
    trainers = {
        name: LocalTrainer(records, key=tiny.key(name), keep=keeps[name])
        for name, records in sites.items()
    }
    tiny.make_federation(folder / "run", plan, trainers, watch=watch).run()
    return seen, keeps


def test_nothing_of_them_leaves_the_site(base, tmp_path):
    plan = plan_of(base, "score")
    seen, keeps = run(tmp_path, plan)
    everything = b"".join(seen)
    assert tiny.cohorts(tmp_path / "run") == [[0, 1, 2, 3]] * 2
    start = from_bytes(tuned_model(plan).start)
    found = set[bytes]()
    for keep in keeps.values():
        for file in keep.rglob("*.safetensors"):
            for name, part in from_bytes(file.read_bytes()).items():
                assert not torch.equal(part, start[name]), "it was trained"
                numbers = part.numpy().ravel()
                found |= {numbers[i : i + 2].tobytes() for i in range(0, len(numbers) - 1, 2)}
    assert len(found) > 100
    assert len({keep.name for keep in keeps.values()}) == 4
    assert not any(piece in everything for piece in found)
    # The control: every tensor of the first task, their public start among them, is found so.
    for name, part in start.items():
        assert part.numpy().ravel()[:2].tobytes() in everything, name
    (*_, facts) = [facts for _, facts in tiny.facts_of(tmp_path / "run", Phase.COMMITTED)]
    # The coordinator's adapter has them as the plan starts them.
    last = from_bytes(tiny.blob(tmp_path / "run", facts["adapter"]))
    for name in personal_names(plan):
        assert torch.equal(last[name], start[name])
    moved = [name for name in last if not torch.equal(last[name], start[name])]
    assert moved


def test_masked_words_are_those_of_the_shared_parts(base, tmp_path):
    sizes = []
    for names in ((), ("score",)):
        plan = plan_of(base, *names)
        seen, _ = run(tmp_path / str(len(names)), plan)
        words = 4 * dimension(tuned_model(plan).layout)
        assert sum(len(part) == words for part in seen) >= 8, "two rounds of four sites"
        sizes.append(words)
    assert sizes[0] > sizes[1]


class Keeping(Scripted):
    """Keeps the number of each training where a real one keeps its parts, then perhaps fails."""

    def __init__(self) -> None:
        super().__init__(0)
        self.kept, self.trainings, self.fails = dict[int, int](), 0, False

    def train(self, request: TrainRequest) -> TrainResult:
        self.trainings += 1
        self.kept[request.spent + 1] = self.trainings
        if self.fails:
            raise ModelError("lost after its parts were kept")
        return super().train(request)


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.close()


class TestAHostileCoordinator:
    """Parts may only go on from the very training whose update the ledger has charged."""

    @pytest.mark.parametrize("late", [False, True])
    def test_cannot_send_one_update_and_keep_another_ones_parts(self, desk, late):
        """A later training keeps its parts, and fails; then the first one's session goes on."""
        first = Attempt(run=RUN, round=1)
        trainer = Keeping()
        desk.agents[0] = desk.agent(0, trainer)
        for site in range(SITES):
            assert desk.task(first, site) is SiteCode.READY
        _, todo = desk.session(first, until="masked")
        trainer.fails = late
        if late:
            assert desk.task(dataclasses.replace(first, session=2), 0) is not SiteCode.READY
            assert trainer.kept == {1: 2}, "the first training's are gone"
        code, _ = desk.ask("masked", first, 0, {"message": todo[0]})
        assert (code is SiteCode.DONE) == (not late)
        assert desk.ledger(0).spent(RUN) == (not late)

    def test_cannot_make_one_noise_hide_two_trainings(self, desk):
        """After one has left, and after a crash: another draw, or the very same training again."""
        trainer = Keeping()
        for number in (1, 2):
            desk.agents[0] = desk.agent(0, trainer)  # it was killed
            attempt = Attempt(run=RUN, round=1, attempt=number)
            for site in range(SITES):
                assert desk.task(attempt, site) is SiteCode.READY
        tally, todo = desk.session(attempt, until="masked")
        desk.exchange(tally, attempt, "masked", todo)
        assert desk.task(dataclasses.replace(attempt, attempt=3), 0) is SiteCode.READY
        asked = [(request.draw, request.spent) for request in trainer.requests]
        assert asked == [(0, 0), (0, 0), (1, 1)]
