"""Nothing is trained that nobody at the site has approved, and an approval is for exactly that."""

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedward.client import approval as approval_module
from fedward.client.approval import (
    Approval,
    Consent,
    approve,
    approved_source,
    dataset_of,
    plan_signature,
    waiting_plan,
    waiting_plans,
    withdraw,
)
from fedward.client.data_sources import Columns
from fedward.client.journal import Journal
from fedward.client.policy import Policy, load_policy
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.errors import ConfigurationError, IdentityError, LedgerError, PolicyRefusal
from fedward.identity import Identity
from fedward.plan import Data, Plan
from fedward.private_files import remove_durably
from fedward.typed_toml import dump
from tests.client.test_policy import PLAN, POLICY
from tests.client.well import declare

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
MANUAL = dataclasses.replace(POLICY, automatic=False, datasets=("notes",))
OTHER = dataclasses.replace(PLAN, seed=1)


class Site:
    def __init__(self, root: Path, policy: Policy) -> None:
        self.folder = SiteFolder.create(root / "site", SiteConfig(name="a"))
        declare(self.folder, "notes", "others", "a", "b")
        self.write(policy)

    def write(self, policy: Policy) -> None:
        self.folder.policy.write_text(dump(policy))

    def approve(self, plan: Plan = PLAN, **given: Any) -> Approval:
        return approve(self.folder, plan, who="jo", now=NOW, **given)

    def check(self, plan: Plan = PLAN, now: datetime = NOW) -> Any:
        return Consent(load_policy(self.folder.policy), self.folder).check(plan, now)

    def refusal(self, plan: Plan = PLAN, now: datetime = NOW) -> tuple[str, ...]:
        with pytest.raises(PolicyRefusal) as caught:
            self.check(plan, now)
        return caught.value.reasons


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path, MANUAL)


def test_a_plan_waits_until_somebody_approves_it(site):
    (reason,) = site.refusal()
    assert reason.startswith(f"plan {PLAN.hash().hex()[:12]} waits for approval")
    assert waiting_plans(site.folder) == [PLAN]
    assert waiting_plan(site.folder, PLAN.hash().hex()[:12]) == PLAN
    made = site.approve()
    assert site.check() == made
    assert (made.who, made.dataset, made.when) == ("jo", "notes", "2026-05-01T12:00:00+00:00")
    assert waiting_plans(site.folder) == []
    assert dataset_of(site.folder, PLAN) == "notes"


def test_an_approval_is_for_one_plan_one_policy_and_one_set_of_data(site):
    site.approve()
    assert site.refusal(OTHER)
    site.write(dataclasses.replace(MANUAL, max_epsilon=3.0))
    assert "waits for approval" in site.refusal()[0]
    site.write(dataclasses.replace(MANUAL, datasets=("others",)))
    assert "waits for approval" in site.refusal()[0]
    site.write(MANUAL)
    site.check()


@pytest.mark.parametrize(
    "change",
    [
        {"path": "/elsewhere"},
        {"unit": "ward"},
        {"columns": Columns(names={"text": "letter"})},
        {"columns": Columns(names={"text": "text", "label": "label", "more": "more"})},
    ],
)
def test_an_approval_is_for_the_records_as_they_were_declared(site, change):
    site.approve()
    declare(site.folder, **change)
    assert "waits for approval" in site.refusal()[0]
    with pytest.raises(PolicyRefusal, match="waits for approval"):
        approved_source(site.folder, PLAN)
    made = site.approve()
    assert approved_source(site.folder, PLAN) == ("notes", bytes.fromhex(made.source))
    declare(site.folder)
    assert site.refusal()
    (site.folder.data / "notes.toml").unlink()
    assert len(site.refusal()) == 2, "it waits, and there are no records"


def test_a_comment_in_the_declaration_takes_no_approval_back(site):
    site.approve()
    path = site.folder.data / "notes.toml"
    path.write_text("# since May\n" + path.read_text())
    site.check()


def test_single_records_are_protected_only_where_source_and_policy_say_so(site):
    declare(site.folder, unit=None, unit_is_record=True)
    assert any("'record' is not in units" in reason for reason in site.refusal())
    with pytest.raises(PolicyRefusal, match="'record' is not in units"):
        site.approve()
    site.write(dataclasses.replace(MANUAL, units=("patient", "record")))
    site.approve()
    site.check()


def test_a_plan_reads_no_column_that_the_site_has_not_declared(site):
    """Not by its text, its label or its template, and not the patient's number."""
    for data in (Data(text="patient"), Data(text="address"), Data(template="{text} {address}")):
        plan = dataclasses.replace(PLAN, data=data)
        with pytest.raises(PolicyRefusal, match="which the data source does not declare"):
            site.approve(plan)
        site.write(dataclasses.replace(MANUAL, automatic=True))
        (reason,) = site.refusal(plan)
        assert "it reads column" in reason
        site.write(MANUAL)
    site.approve(dataclasses.replace(PLAN, data=Data(template="{text} is {label}")))


def test_a_withdrawn_approval_no_longer_holds(site, monkeypatch):
    made = site.approve()
    removed = list[Path]()

    def remove(path: Path) -> None:
        removed.append(path)
        remove_durably(path)

    monkeypatch.setattr(approval_module, "remove_durably", remove)
    withdraw(site.folder, made.plan[:8])
    assert [path.stem for path in removed] == [made.plan], "a crash brings it not back"
    assert site.refusal()
    with pytest.raises(ConfigurationError, match="0 approved plans"):
        withdraw(site.folder, made.plan[:8])


@pytest.mark.parametrize("spoil", [b"", b"x" * 200])
def test_a_file_that_the_site_has_not_signed_approves_nothing(site, spoil):
    made = site.approve()
    path = site.folder.approvals / f"{made.plan}.signed"
    path.write_bytes(spoil)
    with pytest.raises(IdentityError, match="not an approval of this site"):
        site.check()


def test_an_approval_that_was_renamed_to_another_plan_approves_nothing(site):
    made = site.approve()
    path = site.folder.approvals / f"{made.plan}.signed"
    path.rename(site.folder.approvals / f"{OTHER.hash().hex()}.signed")
    assert site.refusal(OTHER)


def test_nobody_can_approve_what_the_policy_refuses(site):
    dear = dataclasses.replace(PLAN, privacy=dataclasses.replace(PLAN.privacy, epsilon=3.0))
    with pytest.raises(PolicyRefusal, match="epsilon 3"):
        site.approve(dear)
    assert site.refusal(dear)[0].startswith("epsilon 3")
    assert waiting_plans(site.folder) == [], "what the policy refuses does not wait"


def test_limits_and_approval_are_told_at_once(site):
    dear = dataclasses.replace(PLAN, privacy=dataclasses.replace(PLAN.privacy, epsilon=3.0))
    assert len(site.refusal(dear)) == 2


def test_a_plan_can_be_approved_by_day_and_runs_by_night(site):
    site.write(dataclasses.replace(MANUAL, hours=("20:00-06:00",)))
    site.approve()
    assert "outside of hours" in site.refusal()[0]
    site.check(now=NOW + timedelta(hours=9))


def test_a_plan_that_comes_outside_of_the_hours_waits_too(site):
    site.write(dataclasses.replace(MANUAL, hours=("20:00-06:00",)))
    assert len(site.refusal()) == 2
    assert waiting_plans(site.folder) == [PLAN]


def test_what_the_journal_cannot_say_is_not_approved(site):
    with Journal(site.folder.command_journal, site.folder.identity()):
        with pytest.raises(LedgerError, match="another process holds it"):
            site.approve()
        assert site.refusal()
    site.approve()
    site.check()


def test_automatic_needs_no_approval_within_the_limits(site):
    site.write(dataclasses.replace(MANUAL, automatic=True))
    assert site.check() is None
    assert dataset_of(site.folder, PLAN) == "notes"


def test_with_several_data_sources_somebody_chooses(site):
    site.write(dataclasses.replace(MANUAL, automatic=True, datasets=("a", "b")))
    assert "no data source is chosen" in site.refusal()[0]
    with pytest.raises(ConfigurationError, match=r"choose a data source.*a, b"):
        site.approve()
    with pytest.raises(ConfigurationError, match="'c' is not in the policy's datasets: a, b"):
        site.approve(dataset="c")
    site.approve(dataset="b")
    assert site.check().dataset == dataset_of(site.folder, PLAN) == "b"


def test_without_a_data_source_nothing_is_trained(site):
    site.write(dataclasses.replace(MANUAL, automatic=True, datasets=()))
    assert "no data source" in site.refusal()[0]


def test_signers_must_have_signed(site):
    board, stranger = Identity(), Identity()
    policy = dataclasses.replace(MANUAL, automatic=True, signers=(board.public_key.hex(),))
    site.write(policy)
    assert "none of signers" in site.refusal()[0]
    site.approve()
    assert "none of signers" in site.refusal()[0], "an approval without a signature is not enough"
    for wrong in (stranger.sign(*plan_signature(PLAN)), board.sign(*plan_signature(OTHER))):
        with pytest.raises(IdentityError, match="none of the policy's signers"):
            site.approve(signature=wrong)
    site.approve(signature=board.sign(*plan_signature(PLAN)))
    assert site.check().signer == board.public_key.hex()


def test_a_policy_that_changed_under_the_daemon_stops_it(site):
    site.write(dataclasses.replace(MANUAL, automatic=True))
    consent = Consent(load_policy(site.folder.policy), site.folder)
    consent.check(PLAN, NOW)
    site.write(dataclasses.replace(MANUAL, automatic=True, max_epsilon=5.0))
    with pytest.raises(PolicyRefusal, match="has changed"):
        consent.check(PLAN, NOW)
    site.folder.policy.unlink()
    with pytest.raises(ConfigurationError, match="no such file"):
        consent.check(PLAN, NOW)


def test_waiting_plans_do_not_fill_the_disk(site):
    for seed in range(105):
        site.refusal(dataclasses.replace(PLAN, seed=seed))
    assert len(waiting_plans(site.folder)) == 100


def test_a_waiting_plan_is_named_by_the_start_of_its_hash(site):
    site.refusal()
    for wrong in ("", "zz", "0123456789"):
        with pytest.raises(ConfigurationError, match="expected one"):
            waiting_plan(site.folder, wrong)


def test_a_simulation_has_only_automatic_policies():
    assert Consent(POLICY).check(PLAN, NOW) is None
    with pytest.raises(PolicyRefusal, match="automatic is off"):
        Consent(dataclasses.replace(POLICY, automatic=False)).check(PLAN, NOW)
