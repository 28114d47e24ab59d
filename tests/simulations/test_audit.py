"""The audit of a plan: passes the right engine, refutes a wrong one, and writes what it found."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from fedward.errors import ConfigurationError, InvalidValue, PrivacyError
from fedward.plan import Privacy, load_plan
from fedward.privacy.noise import SecureStream
from fedward.simulations.audit import AuditOptions, run_audit
from fedward.simulations.audit_rig import rig_pairs, tiny_rig
from fedward.simulations.audit_training import audit_training
from tests.privacy.test_audit_planted import no_noise
from tests.simulations import tiny

PLAN = """
name = "audited"
[model]
path = "nowhere"
[tuner]
r = 2
target_modules = ["q_proj", "v_proj"]
[task]
objective = "{objective}"
max_length = 32
[rounds]
count = 2
spare = 0
steps = 4
sampling_rate = 1.0
normaliser = 8
learning_rate = 0.01
[aggregation]
scheme = "fedavg"
[privacy]
epsilon = {epsilon}
delta = 1e-5
clip = 0.5
records_per_unit = 2
"""
QUIET = Console(quiet=True)


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.format(epsilon=2.0, objective="classify"), encoding="utf-8")
    return path


def options(plan: Path, **changes: object) -> AuditOptions:
    given = AuditOptions(plan=plan, out=plan.parent / "out", canaries=60, releases=60)
    return dataclasses.replace(given, **changes)  # type: ignore[arg-type]  # only in tests


def stream() -> SecureStream:
    return SecureStream(tiny.key("audit"))


def test_the_right_engine_passes_and_the_report_says_so(plan):
    document = run_audit(options(plan), QUIET, stream=stream())
    assert document["holds"] is True
    assert 1.9 < document["claimed_epsilon"] <= 2.0
    assert 0 <= document["empirical_lower_bound"] <= document["claimed_epsilon"]
    # Its negative control: the same attack where there is no noise.
    control = document["canaries_without_noise"]
    assert control["lower"] > 2
    assert control["auc"] > 0.95 > document["canaries"]["auc"]
    assert control["exposure"] > document["canary_exposure"] + 1
    assert json.loads((plan.parent / "out" / "audit.json").read_text("utf-8")) == document
    page = (plan.parent / "out" / "audit.html").read_text("utf-8")
    assert "REFUTED" not in page
    for finding in document["findings"]:
        assert finding["found"] in page


def test_a_wrong_engine_is_refuted_by_name_and_the_report_is_there(plan, monkeypatch):
    no_noise(monkeypatch)
    hard = options(plan, canaries=100)
    with pytest.raises(PrivacyError, match=r"refutes the claim: B: .*C: epsilon of the whole"):
        run_audit(hard, QUIET, stream=stream())
    document = json.loads((plan.parent / "out" / "audit.json").read_text("utf-8"))
    assert document["holds"] is False
    assert document["empirical_lower_bound"] > document["claimed_epsilon"]
    assert "REFUTED" in (plan.parent / "out" / "audit.html").read_text("utf-8")


def test_canaries_go_among_real_records(plan, base):
    data = tiny.write_data(plan.parent / "data", tiny.make_rows("a", 12))
    text = plan.read_text("utf-8").replace("nowhere", str(base))
    text = text.replace("max_length = 32", "max_length = 16") + '[data]\nunit = "patient"\n'
    plan.write_text(text, encoding="utf-8")
    document = run_audit(options(plan, data=data, rounds=1), QUIET, stream=stream())
    assert document["holds"] is True
    assert document["rounds"] == 1
    assert document["audited"] == "the plan's model on 12 units of real records"


@pytest.mark.parametrize("objective", ["sft", "classify"])
def test_a_tiny_rig_keeps_the_plans_constants_and_has_unlike_neighbours(tmp_path, objective):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.format(epsilon=2.0, objective=objective), encoding="utf-8")
    rig = tiny_rig(load_plan(path), tmp_path, stream())
    assert len(rig.units) == 8
    assert sorted(record for unit in rig.units for record in unit) == list(
        range(len(rig.encoded.examples))
    )
    assert {len(pair.units) for pair in rig_pairs(rig, stream())} == {0, 4}
    again = tiny_rig(load_plan(path), tmp_path, stream())
    assert again.encoded == rig.encoded


def test_canaries_that_need_too_much_memory_are_refused(plan, tmp_path):
    rig = tiny_rig(load_plan(plan), tmp_path, stream())
    with pytest.raises(ConfigurationError, match="or fewer, or without --data"):
        audit_training(rig, canaries=10**7, rounds=1, confidence=0.95, stream=stream())


def test_without_privacy_there_is_nothing_to_audit(plan):
    plan.write_text(PLAN.format(epsilon="inf", objective="sft"), encoding="utf-8")
    with pytest.raises(InvalidValue, match="nothing is claimed"):
        run_audit(options(plan), QUIET)
    assert not Privacy(epsilon=math.inf).enabled


@pytest.mark.parametrize("confidence", [0.5, 1.0])
def test_a_confidence_that_says_nothing_is_refused_before_the_work(plan, confidence):
    with pytest.raises(InvalidValue, match="confidence = "):
        run_audit(options(plan, confidence=confidence), QUIET)
