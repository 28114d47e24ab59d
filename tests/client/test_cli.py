"""What a hospital types, from nothing to an approved plan, and what each step says."""

import contextlib
import dataclasses
import json
import os
import pty
import shutil
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedward.attempt import Attempt
from fedward.canonical import digest
from fedward.cli import app
from fedward.client.approval import Consent
from fedward.client.enrol import pinned_roster
from fedward.client.policy import Policy, load_policy
from fedward.client.site_folder import SiteFolder
from fedward.errors import ConfigurationError, FedwardError, LedgerError, PolicyRefusal
from fedward.identity import Identity
from fedward.privacy.accounting import SampledGaussian
from fedward.privacy.ledger import Ledger
from fedward.server.coordinator_folder import CoordinatorFolder
from fedward.server.enrolment import enrolment_app
from fedward.typed_toml import dump, parse
from tests.client.test_policy import PLAN
from tests.server.tls import free_port, serving

PLAN_TOML = """
name = "notes"
[model]
path = "never used here"
sha256 = "{digest}"
[data]
unit = "patient"
[rounds]
count = 4
spare = 1
steps = 1
sampling_rate = 0.1
normaliser = 1.0
learning_rate = 1.0
[privacy]
epsilon = 2.0
"""


class Shell:
    """Types commands in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.enrolled: Any = None

    def __call__(self, line: str, stdin: str = "") -> str:
        """What a command prints; what it raises is raised."""
        line = line.replace("SITE", f"--site {self.root}/site")
        line = line.replace("COORDINATOR", f"--coordinator {self.root}/coordinator")
        arguments = line.replace("ROOT", str(self.root)).split()
        result = CliRunner().invoke(app, arguments, input=stdin)
        if isinstance(result.exception, FedwardError):
            raise result.exception
        assert result.exit_code == 0, (line, result.output, result.exception)
        return result.stdout

    def json(self, line: str, stdin: str = "") -> Any:
        return json.loads(self(f"{line} --json", stdin))


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory):
    """A coordinator and an enrolled site; the coordinator's port is closed again."""
    shell = Shell(tmp_path_factory.mktemp("enrolled"))
    shell(f"coordinator init --host 127.0.0.1 --port {free_port()} ROOT/coordinator")
    shell("site init --name st-mary ROOT/site")
    token = shell("coordinator invite st-mary COORDINATOR")
    folder = CoordinatorFolder.load(shell.root / "coordinator")
    with serving(enrolment_app(folder), folder):
        return shell.root, shell.json("site enrol - SITE", token)


@pytest.fixture
def member(enrolled, shell):
    """A shell beside a copy of both folders."""
    root, shell.enrolled = enrolled
    shutil.copytree(root, shell.root, dirs_exist_ok=True)
    return shell


def test_the_token_is_asked_for_where_somebody_sits_and_not_shown(shell, tmp_path):
    """At a terminal, whose other end is here; so it is in no list of processes and no history."""
    shell("site init --name st-mary ROOT/site")
    mine, theirs = pty.openpty()
    code = "from fedward.cli import main; main()"
    command = [sys.executable, "-c", code, "site", "enrol", "--site", f"{tmp_path}/site"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    said = b""
    while b"token: " not in said:
        said += os.read(mine, 1024)
    os.write(mine, b"fedward-CANARY\n")
    assert process.wait(60) == 2
    said += os.read(mine, 4096)
    os.close(mine)
    assert b"not an enrolment token" in said
    assert b"CANARY" not in said


def test_both_sides_show_the_same_fingerprints(member):
    theirs = member.json("coordinator roster COORDINATOR")
    mine = member.json("site roster SITE")
    assert theirs["sites"][0]["fingerprint"] == member.enrolled["site"]
    assert theirs["coordinator"] == member.enrolled["coordinator"]
    assert mine["pinned"]["coordinator"] == member.enrolled["coordinator"]
    assert mine["waiting"] is None
    assert member.enrolled["site"] in member("coordinator roster COORDINATOR")
    assert member.enrolled["coordinator"] in member("site roster SITE")


def test_init_again_changes_nothing(shell):
    first = shell.json("coordinator init --host h.example --port 9999 ROOT/coordinator")
    again = shell.json("coordinator init --host h.example --port 9999 ROOT/coordinator")
    assert first["certificate_issued"]
    assert again == {**first, "certificate_issued": False}
    one = shell.json("site init --name a ROOT/site")
    assert shell.json("site init --name a ROOT/site") == one
    with pytest.raises(ConfigurationError, match="is the folder of site 'a'"):
        shell("site init --name b ROOT/site")


def test_an_invitation_is_shown_until_it_is_used(member):
    assert member.json("coordinator roster COORDINATOR")["invited"] == []
    invited = member.json("coordinator invite other --hours 2 COORDINATOR")
    roster = member.json("coordinator roster COORDINATOR")
    assert roster["invited"] == [{"name": "other", "expires": invited["expires"]}]
    assert "invited until" in member("coordinator roster COORDINATOR")


@pytest.mark.parametrize("name", ["../x", "a\u202eb", "x" * 65, "n\u043erth"])
def test_a_name_that_no_site_can_have_is_not_invited(shell, name):
    shell("coordinator init --host h.example --port 9999 ROOT/coordinator")
    with pytest.raises(ConfigurationError, match="1 to 64 letters, digits"):
        shell(f"coordinator invite {name} COORDINATOR")


def test_revoke_makes_a_new_epoch(member):
    assert member.json("coordinator revoke st-mary COORDINATOR") == {"epoch": 2, "members": []}
    assert "revoked" in member("coordinator roster COORDINATOR")
    with pytest.raises(ConfigurationError, match="not a member"):
        member("coordinator revoke st-mary COORDINATOR")


def prepare(shell: Shell, base: Path, **changes: Any) -> str:
    """Data, model and policy of a site, and a plan that fits; the model's digest."""
    notes = shell.root / "notes.csv"
    notes.write_text("note,mrn\na,1\nb,1\nc,2\nd,\n")
    added = shell.json(f"site data add notes {notes} --map text=note --unit mrn SITE")
    assert (added["rows"], added["units"], added["without_unit"]) == (4, 2, 1)
    digest: str = shell.json(f"site model add {base} SITE")["model"]
    policy = Policy(
        max_epsilon=2.0, delta=1e-6, max_rounds=5, models=(digest,), datasets=("notes",)
    )
    site = SiteFolder.load(shell.root / "site")
    site.policy.write_text(dump(dataclasses.replace(policy, **changes)))
    (shell.root / "plan.toml").write_text(PLAN_TOML.format(digest=digest))
    return digest


def test_a_plan_is_checked_approved_and_withdrawn(member, base):
    prepare(member, base)
    assert "within the policy" in member("site policy check ROOT/plan.toml SITE")
    assert "no plan waits" in member("site approve SITE")
    made = member.json("site approve ROOT/plan.toml SITE")
    assert (made["dataset"], len(made["plan"])) == ("notes", 64)
    folder = SiteFolder.load(member.root / "site")
    assert (folder.approvals / f"{made['plan']}.signed").exists()
    assert "is withdrawn" in member(f"site approve {made['plan'][:10]} --withdraw SITE")
    assert not (folder.approvals / f"{made['plan']}.signed").exists()


def test_a_column_that_is_not_mapped_is_told_before_anybody_approves(member, base):
    prepare(member, base)
    plan = member.root / "plan.toml"
    plan.write_text(plan.read_text().replace("[data]", '[data]\ntext = "mrn"'))
    for line in ("site policy check ROOT/plan.toml SITE", "site approve ROOT/plan.toml SITE"):
        with pytest.raises(PolicyRefusal, match="it reads column 'mrn'"):
            member(line)


def test_a_plan_beyond_the_policy_is_refused_with_every_reason(member, base):
    prepare(member, base, max_epsilon=1.0, max_rounds=4)
    for line in ("site policy check ROOT/plan.toml SITE", "site approve ROOT/plan.toml SITE"):
        with pytest.raises(PolicyRefusal) as caught:
            member(line)
        assert len(caught.value.reasons) == 2
    line = f"site policy check {member.root}/plan.toml --site {member.root}/site --json"
    result = CliRunner().invoke(app, line.split())
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["allowed"], len(facts["reasons"])) == (1, False, 2)


def test_a_plan_that_came_from_the_coordinator_waits_and_is_approved_by_its_hash(member, base):
    digest = prepare(member, base)
    plan = dataclasses.replace(PLAN, model=dataclasses.replace(PLAN.model, sha256=digest))
    folder = SiteFolder.load(member.root / "site")
    with pytest.raises(PolicyRefusal, match="waits for approval"):
        Consent(load_policy(folder.policy), folder).check(plan)
    start = plan.hash().hex()[:12]
    assert start in member("site approve SITE")
    assert [found["name"] for found in member.json("site approve SITE")] == ["p"]
    member(f"site approve {start} SITE")
    assert Consent(load_policy(folder.policy), folder).check(plan) is not None


def test_a_signer_s_signature_comes_as_a_file(member, base):
    prepare(member, base)
    board = member.json("site policy sign ROOT/plan.toml --key ROOT/board SITE")
    prepare(member, base, signers=(board["public_key"],))
    signature = member("site policy sign ROOT/plan.toml --key ROOT/board SITE").splitlines()[0]
    assert signature == board["signature"]
    (member.root / "signature").write_text(signature)
    made = member.json("site approve ROOT/plan.toml --signature ROOT/signature SITE")
    assert made["signer"] == board["public_key"]
    (member.root / "signature").write_text("no hex")
    with pytest.raises(ConfigurationError, match="in hex"):
        member("site approve ROOT/plan.toml --signature ROOT/signature SITE")


def test_data_is_listed_in_the_site_s_words(member, base):
    prepare(member, base)
    assert member.json("site data list SITE")["notes"]["unit"] == "mrn"
    assert "text=note" in member("site data list SITE")
    for wrong in ("text=", "=note"):
        with pytest.raises(ConfigurationError, match="expected PLAN=OWN"):
            member(f"site data add x ROOT/notes.csv --unit mrn --map {wrong} SITE")


def test_whom_the_records_protect_is_asked(member, base):
    prepare(member, base)
    for said in ("", "--unit mrn --unit-is-record"):
        with pytest.raises(ConfigurationError, match="say whom privacy protects"):
            member(f"site data add x ROOT/notes.csv --map note {said} SITE")
    added = member("site data add x ROOT/notes.csv --map note --unit-is-record SITE")
    assert "each row is protected by itself" in added
    found = member.json("site data list SITE")["x"]
    assert (found["unit"], found["unit_is_record"]) == (None, True)
    assert found["columns"]["names"] == {"note": "note"}
    assert "no plan may read" in member("site data add y ROOT/notes.csv --unit mrn SITE")


def test_what_was_done_stands_in_the_journal_and_an_auditor_can_check_it(member, base):
    prepare(member, base)
    member("site approve ROOT/plan.toml SITE")
    said = [json.loads(line) for line in member("site journal show --json SITE").splitlines()]
    assert [entry["what"] for entry in said] == [
        "enrols", "enrolled", "data added", "model added", "plan approved"
    ]  # fmt: skip
    assert all("who" in entry for entry in said if entry["what"] != "enrolled")
    assert "plan approved" in member("site journal show --last 1 SITE")
    assert member.json("site journal verify SITE") == {"entries": 5}
    key = member("site journal export ROOT/export.json SITE").splitlines()[-1]
    assert member.json(f"site journal verify ROOT/export.json --key {key}") == {"entries": 6}
    for wrong, error in ((Identity().public_key.hex(), FedwardError), ("xyz", ConfigurationError)):
        with pytest.raises(error):
            member(f"site journal verify ROOT/export.json --key {wrong}")


def test_the_ledger_starts_with_nothing_spent(member, base):
    prepare(member, base)
    folder = SiteFolder.load(member.root / "site")
    folder.ledger.touch(mode=0o600)
    assert member.json("site ledger SITE") == {
        "epsilon_spent": 0.0, "max_epsilon": 2.0, "delta": 1e-6, "runs": {}
    }  # fmt: skip
    assert "epsilon 0.000 of 2" in member("site ledger SITE")


def test_the_roster_of_a_site_that_was_revoked_is_not_taken(member):
    folder = SiteFolder.load(member.root / "site")
    before = pinned_roster(folder)
    member("coordinator revoke st-mary COORDINATOR")
    coordinator = CoordinatorFolder.load(member.root / "coordinator")
    with serving(enrolment_app(coordinator), coordinator), pytest.raises(FedwardError, match="rev"):
        member("site roster --fetch SITE")
    assert pinned_roster(folder) == before


def test_a_newer_roster_is_fetched_and_approved(member, tmp_path):
    coordinator = CoordinatorFolder.load(member.root / "coordinator")
    token = member("coordinator invite other COORDINATOR")
    with serving(enrolment_app(coordinator), coordinator):
        member("site init --name other ROOT/other")
        member("site enrol - --site ROOT/other", token)
        facts = member.json("site roster --fetch SITE")
    assert (facts["pinned"]["epoch"], facts["waiting"]["epoch"]) == (1, 2)
    assert "waiting: approve it" in member("site roster SITE")
    facts = member.json("site roster --approve SITE")
    assert (facts["pinned"]["epoch"], facts["waiting"]) == (2, None)


def test_a_site_pauses_and_goes_on_and_its_journal_says_so_once(member):
    for _ in range(2):
        assert member.json("site pause SITE") == {"paused": True}
    status = CliRunner().invoke(app, ["site", "status", "--site", str(member.root / "site")])
    assert "paused" in status.output
    for _ in range(2):
        assert "takes rounds" in member("site resume SITE")
    said = [json.loads(line) for line in member("site journal show --json SITE").splitlines()]
    assert [entry["what"] for entry in said][-2:] == ["paused", "resumed"]


def test_a_site_closes_a_run_and_what_it_had_not_spent_is_free(member):
    folder = SiteFolder.load(member.root / "site")
    policy = Policy(max_epsilon=8.0, delta=1e-5, max_rounds=9, models=("a" * 64,))
    folder.policy.write_text(dump(policy))
    with pytest.raises(ConfigurationError, match="knows no run 'one'"):
        member("site close one SITE")
    assert not folder.ledger.exists()
    event = SampledGaussian(noise_multiplier=4.0, sampling_rate=0.01, steps=10)

    def ledger() -> Ledger:
        return Ledger.open(
            folder.ledger, folder.identity(), epsilon=policy.max_epsilon, delta=policy.delta
        )

    with contextlib.closing(ledger()) as books:
        books.open_run("one", bytes(32), event, 5)
        attempt = Attempt(run="one", round=1)
        books.reserve(attempt)
        books.mark_sent(attempt)
        books.reserve(dataclasses.replace(attempt, round=2))  # held by an update that never left
        booked = books.epsilon_committed()
        with pytest.raises(FedwardError, match="another process"):
            member("site close one SITE")
    assert member.json("site close one SITE") == {"run": "one", "spent": 1, "freed": 4}
    assert "1 rounds spent, 0 free" in member("site close one SITE"), "again changes nothing"
    with pytest.raises(ConfigurationError, match="knows no run 'other'"):
        member("site close other SITE")
    with contextlib.closing(ledger()) as books:
        assert books.epsilon_spent() == books.epsilon_committed() < booked
        with pytest.raises(LedgerError, match="closed"):
            books.open_run("one", bytes(32), event, 5)
    said = [json.loads(line) for line in member("site journal show --json SITE").splitlines()]
    assert [(entry["what"], entry["run"]) for entry in said[-2:]] == [("closes", "one")] * 2


def test_a_site_forgets_what_it_kept_of_one_run(member):
    folder = SiteFolder.load(member.root / "site")
    kept = [folder.personal / "plan" / digest("run", run).hex() for run in ("one", "two")]
    for place in kept:
        place.mkdir(parents=True)
        (place / "1.safetensors").write_bytes(b"x")
    assert member.json("site forget one SITE") == {"run": "one", "files": 1}
    assert [len(list(place.iterdir())) for place in kept] == [0, 1]
    assert "0 files" in member("site forget one SITE")
    said = [json.loads(line) for line in member("site journal show --json SITE").splitlines()]
    assert [(entry["what"], entry["run"]) for entry in said[-2:]] == [("forgets", "one")] * 2


def test_a_site_leaves_and_joins_another_federation_with_the_same_books(member):
    folder = SiteFolder.load(member.root / "site")
    key = folder.identity().public_key
    coordinator = CoordinatorFolder.load(member.root / "coordinator")
    with pytest.raises(FedwardError, match="cannot be reached"):
        member("site leave SITE")
    with serving(enrolment_app(coordinator), coordinator):
        assert member.json("site leave SITE")["told"]
    assert "left" in member("coordinator roster COORDINATOR")
    with pytest.raises(ConfigurationError, match="not enrolled"):
        member("site roster SITE")
    member(f"coordinator init --host 127.0.0.1 --port {free_port()} ROOT/second")
    token = member("coordinator invite st-mary --coordinator ROOT/second")
    second = CoordinatorFolder.load(member.root / "second")
    with serving(enrolment_app(second), second):
        member("site enrol - SITE", token)
    assert pinned_roster(folder).members[0].public_key == key
    member("site leave --untold SITE")
    said = [json.loads(line) for line in member("site journal show --json SITE").splitlines()]
    assert [entry["what"] for entry in said] == [
        "enrols", "enrolled", "leaves", "leaves", "left", "enrols", "enrolled", "leaves", "left"
    ]  # fmt: skip


def test_the_example_of_a_policy_is_one_and_its_comments_are_keys():
    text = files("fedward.client").joinpath("policy.example.toml").read_text()
    example = parse(Policy, tomllib.loads(text))
    assert not example.automatic
    assert example.models == example.datasets == ()
    commented = "\n".join(
        line.removeprefix("# ")
        for line in text.splitlines()
        if line.startswith("# ") and "=" in line
    )
    commented = commented.replace('"64 hex digits"', f'"{"0a" * 32}"')
    parse(Policy, {**tomllib.loads(text), **tomllib.loads(commented)})
