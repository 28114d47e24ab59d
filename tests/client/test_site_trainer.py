"""The trainer of a site: confined, killed in the middle of a round, and nothing is lost by it."""

import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward.client import trainer_pb2 as wire
from fedward.client.approval import approve
from fedward.client.data_sources import Columns, load_source
from fedward.client.policy import Policy
from fedward.client.remote_trainer import RemoteTrainer, site_remote_trainer
from fedward.client.sandbox import offline_environment
from fedward.client.site_folder import SiteFolder
from fedward.client.site_records import add_source
from fedward.client.site_trainer import admission, check_trained, trainer_maker
from fedward.client.trainer import LocalTrainer
from fedward.client.trainer_process import TrainerProcess
from fedward.client.trainer_service import TrainerService
from fedward.errors import DataError, ModelError, PolicyRefusal
from fedward.plan import Plan
from tests.client.well import declare, make_site, source
from tests.simulations import tiny

ROOT = Path(__file__).parent.parent.parent
SITES = {"a": 4, "b": 5, "c": 6}
CHILD = """
import os, socket, sys, time
from pathlib import Path
from fedward.client.sandbox import confine, seal
cache, listening, marker = map(Path, sys.argv[1:])
confine(cache)
from fedward.client.trainer import LocalTrainer
from fedward.client.trainer_service import serve
from tests.simulations import tiny

def make(plan, dataset, on_step):
    def step(number):
        if not marker.exists():
            marker.touch()
            time.sleep(60)
        on_step(number)
    try:
        socket.socket()
    except PermissionError:
        return LocalTrainer(tiny.make_records("b", 5), key=tiny.key("b"), on_step=step)
    raise AssertionError("it has a network")

server = serve(listening, make)
seal()
sys.stdin.buffer.read()
os._exit(0)
"""


def trainers() -> Any:
    return tiny.recorders({name: tiny.make_records(name, n) for name, n in SITES.items()})


@pytest.mark.slow
def test_a_trainer_killed_mid_round_changes_nothing(base, tmp_path, caplog):
    """The very adapter of the undisturbed run, one reservation a round, and a clear word."""
    # Nobody's deadline, or a slow machine would make the coordinator try again.
    plan = tiny.make_plan(base, rounds=tiny.make_rounds(deadline="30m"))
    undisturbed = tiny.make_federation(tmp_path / "one", plan, trainers()).run()
    sockets, marker = tmp_path / "s", tmp_path / "reached"
    sockets.mkdir(mode=0o700)
    cache = tmp_path / "cache"
    arguments = [str(cache), str(sockets / "t.sock"), str(marker)]
    process = TrainerProcess(
        [sys.executable, "-c", CHILD, *arguments],
        offline_environment(cache) | {"PYTHONPATH": str(ROOT)},
    )
    remote = RemoteTrainer(sockets / "t.sock", process=process, start_seconds=600)
    killed: list[int] = []

    def kill() -> None:
        while not marker.exists():
            time.sleep(0.05)
        killed.append(process.pid or 0)
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    mixed = {**trainers(), "b": tiny.Recorder(remote)}
    disturbed = tiny.make_federation(tmp_path / "two", plan, mixed).run()
    assert process.pid not in {None, *killed}
    remote.close()
    assert process.pid is None
    assert disturbed == undisturbed
    assert tiny.sent(tmp_path / "two", 1) == [(1, 1, 1), (2, 1, 1)]
    kinds = [entry["kind"] for entry in tiny.ledger_entries(tmp_path / "two", 1)]
    assert kinds.count("reserve") == 2, "the killed update's reservation served the next"
    assert "died at its task" in caplog.text


def test_a_frozen_module_is_found_by_what_the_model_trains():
    policy = Policy(max_epsilon=1.0, delta=1e-5, max_rounds=1, models=())
    check_trained((("base.layers.0.q_proj.lora_A.default.weight", (2, 8)),), policy)
    for name in ("base.embed_tokens.lora_A.default.weight", "base.lm_head.weight"):
        with pytest.raises(ModelError, match="policy's frozen"):
            check_trained(((name, (2, 8)),), policy)


def test_a_sites_trainer_needs_neither_its_keys_nor_its_ledger(base, tmp_path):
    """The shipped unit hides them from it."""
    site, plan = make_site(tmp_path, base), tiny.make_plan(base)
    for path in (site.key, site.fleet_key):
        path.unlink()
    elsewhere = dataclasses.replace(plan, model=dataclasses.replace(plan.model, path="no/such"))
    request, steps = dataclasses.replace(tiny.make_request(plan), plan=elsewhere), list[int]()
    trainer = trainer_maker(site)(elsewhere, "notes", steps.append)
    trainer.prepare(request)
    assert np.isfinite(trainer.train(request).update).all()
    assert steps == [1]


def test_an_agent_that_was_taken_over_gets_no_update_without_noise(base, tmp_path):
    site, plan = make_site(tmp_path, base), tiny.make_plan(base)
    bare = dataclasses.replace(plan, privacy=dataclasses.replace(plan.privacy, epsilon=math.inf))
    with pytest.raises(PolicyRefusal, match="max_epsilon"):
        admission(site)(bare, "notes", load_source(site, "notes").hash())


def test_an_agent_that_was_taken_over_gets_no_other_records(base, tmp_path):
    site, plan = make_site(tmp_path, base), tiny.make_plan(base)
    approved = load_source(site, "notes").hash()
    declare(site, "letters")
    admit = admission(site)
    admit(plan, "notes", approved)
    for dataset, given, reason in (
        ("letters", load_source(site, "letters").hash(), "'letters' is not in datasets"),
        ("notes", load_source(site, "letters").hash(), "has changed since the agent looked"),
    ):
        with pytest.raises(PolicyRefusal, match=reason):
            admit(plan, dataset, given)
    reader = dataclasses.replace(plan, data=dataclasses.replace(plan.data, text="hospital"))
    with pytest.raises(PolicyRefusal, match="it reads column 'hospital'"):
        admit(reader, "notes", approved)


def file_changes(site: SiteFolder, records: Path) -> None:
    tiny.write_data(records, tiny.make_rows("a", 5))


def file_is_replaced(site: SiteFolder, records: Path) -> None:
    path = records / "train.jsonl"
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def file_comes(site: SiteFolder, records: Path) -> None:
    tiny.write_data(records, tiny.make_rows("b", 3), "test")


def map_changes(site: SiteFolder, records: Path) -> None:
    add_source(site, "notes", source(records, columns=Columns(names={"text": "x", "label": "y"})))


def policy_changes(site: SiteFolder, records: Path) -> None:
    site.policy.write_text(site.policy.read_text() + "gpu_memory = 1.0\n")


def configuration_changes(site: SiteFolder, records: Path) -> None:
    site.write_config(dataclasses.replace(site.config(), physical_batch=2))


@pytest.mark.parametrize(
    "change",
    [
        file_changes,
        file_is_replaced,
        file_comes,
        map_changes,
        policy_changes,
        configuration_changes,
    ],
)
def test_no_trainer_outlives_what_it_was_made_of(base, tmp_path, change):
    site, plan, records = make_site(tmp_path, base), tiny.make_plan(base), tmp_path / "records"
    rows = [{**row, "x": row["text"], "y": row["label"]} for row in tiny.make_rows("a", 4)]
    tiny.write_data(records, rows)
    made = list[str]()

    def make(plan: Plan, dataset: str, on_step: Callable[[int], None]) -> LocalTrainer:
        made.append(dataset)
        return trainer_maker(site)(plan, dataset, on_step)

    service = TrainerService(make, admission(site))

    def ask() -> LocalTrainer:
        name, approved = "notes", load_source(site, "notes").hash()
        return service._trainer(plan, wire.Task(dataset=name, source=approved))

    first = ask()
    assert ask() is first, "control: it is kept while nothing changes"
    change(site, records)
    assert ask() is not first
    assert len(made) == 2


def test_a_patient_who_does_not_fit_is_left_out_without_a_word_to_the_agent(base, tmp_path, caplog):
    site, plan, records = make_site(tmp_path, base), tiny.make_plan(base), tmp_path / "records"
    rows = tiny.make_rows("a", 4)
    odd = [{**row, "patient": "odd", "label": "CANARY"} for row in tiny.make_rows("b", 1)]
    path = tiny.write_data(records, [*odd, *rows]) / "train.jsonl"
    path.write_text("{ CANARY\n" + path.read_text())
    service = TrainerService(trainer_maker(site), admission(site))
    task = wire.Task(dataset="notes", source=load_source(site, "notes").hash())
    trainer = service._trainer(plan, task)
    assert trainer.units == 4
    assert np.isfinite(trainer.train(tiny.make_request(plan)).update).all()
    assert f"{len(odd) + 1} rows do not fit the plan; their patients are left out" in caplog.text
    assert "CANARY" not in caplog.text


def test_what_was_added_to_the_file_is_trained_on(base, tmp_path):
    site, plan, records = make_site(tmp_path, base), tiny.make_plan(base), tmp_path / "records"
    service = TrainerService(trainer_maker(site), admission(site))
    task = wire.Task(dataset="notes", source=load_source(site, "notes").hash())
    assert service._trainer(plan, task).units == 4
    tiny.write_data(records, tiny.make_rows("a", 9))
    assert service._trainer(plan, task).units == 9


@pytest.mark.slow
def test_the_command_trains_as_a_child_of_the_agent(base, tmp_path):
    site, plan = make_site(tmp_path, base), tiny.make_plan(base)
    remote = site_remote_trainer(site, child=True)
    with pytest.raises(PolicyRefusal, match="waits for approval"):
        remote.prepare(tiny.make_request(plan))
    approve(site, plan, who="jo", now=datetime.now().astimezone())
    remote.prepare(tiny.make_request(plan))
    assert np.isfinite(remote.train(tiny.make_request(plan)).update).all()
    with pytest.raises(DataError):  # it keeps nobody apart
        remote.evaluate(plan, tiny.make_request(plan).adapter, "r")
    remote.close()
