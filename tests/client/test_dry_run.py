"""A dry run tells what a round would send and cost, and does neither."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import RecordDict

from fedward.aggregation.planned import planned_session
from fedward.attempt import Attempt
from fedward.client import dry_run as module
from fedward.client.dry_run import dry_run
from fedward.client.enrol import own_membership, pinned_roster
from fedward.client.site_folder import SiteFolder
from fedward.errors import ConfigurationError, DataError, ModelError
from fedward.messages import open_letter
from fedward.plan import Metrics
from fedward.plan_aggregation import Aggregation
from fedward.privacy.accounting import SampledGaussian
from fedward.privacy.ledger import Ledger
from tests.client.desk import PLAN, RUN, Desk
from tests.client.well import make_site
from tests.simulations import tiny


@pytest.fixture
def site(tmp_path, base):
    return make_site(tmp_path, base)


def files(site: SiteFolder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in site.root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("metrics", [None, Metrics(epsilon=1.0)])
def test_a_plan_is_tried_and_nothing_is_written(site, base, metrics):
    plan, before = tiny.make_plan(base, metrics=metrics), files(site)
    found = dry_run(site, plan, "notes")
    assert files(site) == before
    roster, attempt = pinned_roster(site), Attempt(run="r", round=1)
    session = planned_session(plan, roster, attempt, task_hash=bytes(32), dimension=384)
    assert found.update_bytes == session.words * 4
    assert found.bytes_out > found.update_bytes
    assert 0 < found.epsilon_round < found.epsilon_run
    assert found.epsilon_run <= 8.0 + (0 if metrics is None else 1.0)
    assert (found.rounds, found.refused) == (3, () if metrics is None else found.refused)
    assert found.rounds_left == (3 if metrics is None else found.rounds_left)
    assert found.round_seconds > 0
    assert found.memory_bytes > 1 << 20


def test_a_plan_with_two_passes_and_a_rank_of_its_own(site, base):
    """A round then has two sessions; what is sent does not depend on the site's rank."""
    plan = tiny.make_plan(base, aggregation=Aggregation(scheme="sketch"))
    name = own_membership(site, pinned_roster(site)).name
    narrow = dataclasses.replace(plan, tuner=dataclasses.replace(plan.tuner, ranks={name: 1}))
    one, two, third = (
        dry_run(site, each, "notes") for each in (tiny.make_plan(base), plan, narrow)
    )
    assert two.update_bytes == third.update_bytes > one.update_bytes
    letters = [found.bytes_out - found.update_bytes for found in (one, two, third)]
    assert letters[0] < letters[1] == letters[2] < 2 * letters[0]
    assert one.epsilon_round == two.epsilon_round == third.epsilon_round


def test_a_dry_run_is_of_a_round_that_asks_this_site(site, base):
    few = tiny.make_plan(base, rounds=tiny.make_rounds(participants=3))
    one, two = (dry_run(site, each, "notes") for each in (tiny.make_plan(base), few))
    assert one.update_bytes == two.update_bytes
    assert one.epsilon_run == two.epsilon_run, "a draw buys no epsilon"
    sites = len(pinned_roster(site).members)
    assert (two.bytes_out < one.bytes_out) is (sites > 3)
    many = tiny.make_plan(base, rounds=tiny.make_rounds(participants=sites + 1))
    with pytest.raises(ConfigurationError, match=f"at most the {sites} sites there are"):
        dry_run(site, many, "notes")


def test_the_letters_are_as_long_as_those_of_a_real_round(tmp_path, monkeypatch):
    desk, sent = Desk(tmp_path), list[RecordDict]()
    answer = desk.agents[0].answer

    def kept(records: RecordDict) -> RecordDict:
        sent.append(answer(records))
        return sent[-1]

    monkeypatch.setattr(desk.agents[0], "answer", kept)
    desk.round(1)
    desk.ask("evaluate", Attempt(run=RUN, round=1), 0, desk.task_parts())
    size, update = 0, 0
    for records in sent:
        letter = open_letter(records, desk.roster.key(0), "site")
        size += len(letter.header()) + 64 + sum(map(len, letter.parts.values()))
        update += len(letter.parts.get("words", b""))
    assert len(sent) == 7
    predicted = module._letters(PLAN, desk.roster, 0)
    assert update == 40
    # The desk gives no receipts, which ask for a second line of the ledger in each answer.
    second = len(',[2,"' + "0" * 64 + '"]')
    assert abs(predicted - (size - update) - 7 * second) < 60
    desk.close()


def test_what_was_spent_before_leaves_less(site, base):
    plan = tiny.make_plan(base)
    with_ledger = Ledger.open(site.ledger, site.identity(), epsilon=8.0, delta=1e-5)
    event = SampledGaussian(noise_multiplier=1.2, sampling_rate=1.0, steps=1)
    with_ledger.open_run("before", bytes(32), event, 1)
    with_ledger.close()
    assert dry_run(site, plan, "notes").rounds_left < 3


def test_what_the_policy_says_against_it_is_told(site, base):
    plan = tiny.make_plan(base, rounds=tiny.make_rounds(count=20))
    assert "above max_rounds" in dry_run(site, plan, "notes").refused[0]


def test_a_plan_that_cannot_be_tried(site, base, tmp_path):
    plan = tiny.make_plan(base)
    other = dataclasses.replace(plan, model=dataclasses.replace(plan.model, sha256="0" * 64))
    with pytest.raises(ModelError, match="model add"):
        dry_run(site, other, "notes")
    with pytest.raises(ConfigurationError, match="no data source"):
        dry_run(site, plan, "letters")
    (tmp_path / "records" / "train.jsonl").write_text("")
    with pytest.raises(DataError):
        dry_run(site, plan, "notes")


@pytest.mark.slow
def test_the_command_says_it_in_a_process_without_a_network(site, base):
    plan = site.root.parent / "plan.json"
    plan.write_bytes(tiny.make_plan(base).to_json())
    command = [sys.executable, "-m", "fedward", "site", "dry-run", str(plan), "--json"]
    done = subprocess.run([*command, "--site", str(site.root)], capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert (found["dataset"], found["rounds_left"]) == ("notes", 3)
