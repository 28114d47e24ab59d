"""Every check of the doctor passes on a site that is well, and fails on one made ill."""

import dataclasses
import json
import os
import shutil
from datetime import datetime, timedelta

import pytest
from typer.testing import CliRunner

from fedward.attempt import Attempt
from fedward.client import doctor
from fedward.client.operations_cli import operations_app
from fedward.client.policy import Policy, load_policy
from fedward.client.reach import Finding
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.client.site_records import add_source
from fedward.identity import Identity, Member, Roster, seal_roster
from fedward.privacy.accounting import SampledGaussian
from fedward.privacy.ledger import Ledger
from fedward.private_files import write_private
from fedward.tuning.models import fingerprint
from tests.client.well import make_site, source
from tests.simulations import tiny


def verdict(finding: Finding) -> str:
    """How a check ended; whatever is not well comes with what to do."""
    assert bool(finding.do) == (finding.verdict != "ok")
    return finding.verdict.value


@pytest.fixture
def site(tmp_path, base):
    return make_site(tmp_path, base)


def policy_of(site: SiteFolder) -> Policy:
    return load_policy(site.policy)


def spend(site: SiteFolder, *, noise: float = 3.0) -> None:
    ledger = Ledger.open(site.ledger, site.identity(), epsilon=8.0, delta=1e-5)
    event = SampledGaussian(noise_multiplier=noise, sampling_rate=1.0, steps=1)
    ledger.open_run("r", bytes(32), event, 1)
    ledger.reserve(Attempt(run="r", round=1))
    ledger.mark_sent(Attempt(run="r", round=1))
    ledger.close()


def test_a_site_that_is_well(site):
    found = {f.check: verdict(f) for f in doctor.examine(site)}
    assert found.pop("tcp") == "fail", "nobody serves the test's coordinator"
    assert set(found.values()) == {"ok"}, found
    model, data = f"model {fingerprint(site.root.parent / 'model')[:12]}", "data notes"
    assert set(found) == {
        "folder", "configuration", "roster", "proxy", "dns", "disk", "sandbox", "policy", "gpu",
        "ledger", model, data,
    }  # fmt: skip


def test_a_folder_that_others_can_open(site):
    site.key.chmod(0o644)
    assert verdict(doctor.check_folder(site)) == "fail"


def test_a_configuration_that_cannot_be_read_ends_the_examination(site):
    write_private(site.config_file, b"nme = 'north'\n")
    found = [(f.check, verdict(f)) for f in doctor.examine(site)]
    assert found == [("folder", "ok"), ("configuration", "fail")]


def test_a_roster_without_this_site_or_with_a_newer_one(site):
    newer = Identity(bytes([7]) * 32)
    mine = Member(id=0, name="north", public_key=site.identity().public_key)
    members = (mine, Member(id=1, name="east", public_key=Identity().public_key))
    roster = Roster(epoch=2, coordinator=newer.public_key, members=members)
    write_private(site.pending_roster, seal_roster(roster, newer))
    assert verdict(doctor.check_roster(site)) == "warn"
    roster = Roster(epoch=2, coordinator=newer.public_key, members=members[1:])
    write_private(site.roster, seal_roster(roster, newer))
    assert verdict(doctor.check_roster(site)) == "fail"
    site.roster.unlink()
    assert verdict(doctor.check_roster(site)) == "fail"


def test_a_site_that_is_not_enrolled(site):
    site.write_config(SiteConfig(name="north"))
    found = {f.check: f for f in doctor.examine(site)}
    assert verdict(found["coordinator"]) == "fail"
    assert "enrol" in found["coordinator"].do


@pytest.mark.parametrize(("free", "expected"), [(1 << 20, "fail"), (1 << 30, "warn")])
def test_a_disk_that_is_nearly_full(site, monkeypatch, free, expected):
    usage = shutil.disk_usage(site.root)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert verdict(doctor.check_disk(site)) == expected


def test_a_disk_that_cannot_be_written(site, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert verdict(doctor.check_disk(site)) == "fail"


def test_a_sandbox_that_does_not_hold(site, monkeypatch):
    monkeypatch.setattr(doctor, "_SANDBOX", doctor._SANDBOX.replace("confine(pathlib", "(pathlib"))
    finding = doctor.check_sandbox(site)
    assert verdict(finding) == "fail"
    assert finding.says == "a socket could be opened"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "ok"),
        ({"models": ()}, "fail"),
        ({"datasets": ()}, "fail"),
        ({"automatic": True}, "warn"),
        ({"max_epsilon": 30.0}, "warn"),
        ({"permit_until": "2020-01-01"}, "fail"),
        ({"permit_until": f"{datetime.now().astimezone() + timedelta(days=2):%Y-%m-%d}"}, "ok"),
    ],
)
def test_what_a_policy_says(more, expected):
    given = {"max_epsilon": 8.0, "delta": 1e-5, "max_rounds": 9}
    lists = {"models": ("a" * 64,), "datasets": ("notes",)}
    assert verdict(doctor.check_policy(Policy(**(given | lists | more)))) == expected


def test_no_policy_is_a_failure_and_the_rest_is_still_looked_at(site):
    site.policy.unlink()
    found = {f.check: verdict(f) for f in doctor.examine(site)}
    assert (found["policy"], found["gpu"]) == ("fail", "ok")


def test_a_device_that_is_not_there():
    config = SiteConfig(name="north", device="cuda:99")
    assert verdict(doctor.check_device(config, None)) == "fail"


def test_a_model_that_was_changed_or_is_gone(site):
    policy = policy_of(site)
    (weights,) = (site.root.parent / "model").glob("*.safetensors")
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert [verdict(f) for f in doctor.check_models(site, policy)] == ["fail"]
    shutil.rmtree(site.root.parent / "model")
    assert [verdict(f) for f in doctor.check_models(site, policy)] == ["fail"]


def test_records_that_cannot_be_used(site, tmp_path):
    policy, rows = policy_of(site), tiny.make_rows("a", 4)
    rows[0]["patient"] = ""
    tiny.write_data(tmp_path / "records", rows)
    assert [verdict(f) for f in doctor.check_datasets(site, policy)] == ["warn"]
    (tmp_path / "records" / "train.jsonl").write_text('{"patient": CANARY\n')
    (finding,) = doctor.check_datasets(site, policy)
    assert verdict(finding) == "fail"
    assert "CANARY" not in finding.says
    (site.data / "notes.toml").unlink()
    assert [verdict(f) for f in doctor.check_datasets(site, policy)] == ["fail"]


def test_records_of_nobody_knows_whom(site, tmp_path):
    add_source(site, "notes", source(tmp_path / "records", unit=None, unit_is_record=True))
    policy = policy_of(site)
    assert [verdict(f) for f in doctor.check_datasets(site, policy)] == ["fail"]
    loose = dataclasses.replace(policy, units=("patient", "record"))
    assert [verdict(f) for f in doctor.check_datasets(site, loose)] == ["warn"]


def test_a_ledger_that_was_spent_changed_or_lost(site):
    policy = policy_of(site)
    spend(site)
    assert verdict(doctor.check_ledger(site, policy)) == "ok"
    site.ledger.unlink()
    spend(site, noise=0.7)
    assert verdict(doctor.check_ledger(site, policy)) == "warn"
    data = site.ledger.read_bytes()
    site.ledger.write_bytes(data.replace(b'"round":1', b'"round":2', 1))
    assert verdict(doctor.check_ledger(site, policy)) == "fail"
    site.ledger.unlink()
    write_private(site.memory, b"{}\n")
    assert verdict(doctor.check_ledger(site, policy)) == "fail"


def test_the_ledger_is_examined_while_the_agent_holds_it(site):
    spend(site)
    held = Ledger.open(site.ledger, site.identity(), epsilon=8.0, delta=1e-5)
    assert verdict(doctor.check_ledger(site, policy_of(site))) == "ok"
    held.close()


def test_the_command_prints_json_and_fails_with_the_checks(site):
    done = CliRunner().invoke(operations_app, ["doctor", "--site", str(site.root), "--json"])
    assert done.exit_code == 1
    found = {entry["check"]: entry for entry in json.loads(done.output)}
    assert found["tcp"]["verdict"] == "fail"
    assert found["tcp"]["do"]
    told = CliRunner().invoke(operations_app, ["doctor", "--site", str(site.root)])
    assert "fail  tcp" in told.output
