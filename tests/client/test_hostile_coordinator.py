"""A coordinator with the true key that wants more than the sum: refused, and in the journal.

The sites are whole: folders with keys, policy, approvals, ledger, memory and journal.
"""

import copy
import dataclasses
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedward.aggregation import wire
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.client.agent import Agent
from fedward.client.approval import Consent, approve
from fedward.client.journal import Journal, verify_journal
from fedward.client.memory import SiteMemory
from fedward.client.policy import load_policy
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.errors import IdentityError, LedgerRolledBack, SiteCode
from fedward.identity import Identity
from fedward.messages import Letter, open_letter, seal_letter
from fedward.plan import Plan, Privacy, Tuner
from fedward.plan_aggregation import Cohort
from fedward.privacy.ledger import Ledger
from fedward.typed_toml import dump
from tests.client.desk import PLAN, POLICY, RUN, SITES, Desk, replaced
from tests.client.well import declare

FIRST = Attempt(run=RUN, round=1)
SECOND = Attempt(run=RUN, round=2)
MANUAL = dataclasses.replace(POLICY, automatic=False, datasets=("notes",))


class Field(Desk):
    """The desk, with sites as hospitals have them; every site has approved the desk's plan."""

    def agent(self, site: int, trainer: Any = None) -> Agent:
        for file in self.files.pop(site, ()):
            file.close()
        folder, key = self.site(site), self.keys[site]
        if not folder.config_file.exists():
            folder.root.mkdir(mode=0o700)
            key.save(folder.key)
            SiteFolder.create(folder.root, SiteConfig(name=f"site{site}"))
            folder.policy.write_text(dump(self.policy))
            declare(folder)
            now = datetime(2026, 5, 1, tzinfo=UTC)
            approve(folder, PLAN, who="jo", now=now)
        policy = load_policy(folder.policy)
        ledger = Ledger.open(folder.ledger, key, epsilon=policy.max_epsilon, delta=policy.delta)
        memory = SiteMemory.open(folder.memory, key, ledger)
        journal = Journal(folder.journal, key)
        self.files[site] = (ledger, memory, journal)  # type: ignore[assignment]  # one more
        return Agent(
            site=site,
            identity=key,
            roster=self.roster,
            policy=policy,
            consent=Consent(policy, folder),
            ledger=ledger,
            memory=memory,
            journal=journal,
            trainer=trainer or self.trainers[site],
            key=bytes([site]) * 32,
        )

    def site(self, site: int) -> SiteFolder:
        return SiteFolder(root=self.folder / str(site))

    def journal(self, site: int = 0) -> list[dict[str, Any]]:
        """What the site's journal says, checked; its process holds the file."""
        return verify_journal(self.site(site), self.keys[site].public_key)

    def refused(self, code: SiteCode | None, expected: SiteCode, reason: str) -> None:
        """The code is the expected one, the journal says so and why, and nothing left."""
        assert code is expected
        why, answer = self.journal()[-2:]
        assert why["what"] == "refused"
        assert reason in why["reason"]
        assert (answer["what"], answer["code"], answer["sent"]) == ("answered", expected.value, {})


@pytest.fixture
def field(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # durability is tested elsewhere
    field = Field(tmp_path, policy=MANUAL)
    yield field
    field.close()


def untouched(field: Field) -> bool:
    """No record of site 0 was read and nothing of its budget is reserved."""
    return not field.trainers[0].requests and field.ledger(0).head[0] == 0


def test_an_honest_run_is_served_and_journalled(field):
    """Control of every test below: the same sites, and nothing is refused."""
    for number in (1, 2):
        field.round(number)
    for site in range(SITES):
        approved, *entries = field.journal(site)
        assert (approved["what"], approved["who"]) == ("plan approved", "jo")
        said = [(e["what"], e.get("action")) for e in entries]
        exchanges = ["hello", "shares", "masked", "consistency", "unmask"]
        one = [("reserved", None), *(("answered", a) for a in ("task", *exchanges))]
        assert said == one * 2
        assert all(e["code"] in ("ready", "done") for e in entries if e["what"] == "answered")
        assert entries[0]["plan"] == PLAN.hash().hex()
        assert entries[0]["epsilon"] == 8.0
        assert entries[0]["approved"]["who"] == "jo"
        assert entries[3]["sent"].keys() == {"message"} != entries[4]["sent"].keys()


# Shipping code.


class Bomb:
    """What unpickling would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_a_pickle_as_adapter_is_not_unpickled(field, tmp_path):
    import pickle  # the attack

    bomb = pickle.dumps(Bomb(tmp_path / "owned"))
    code = field.task(FIRST, 0, adapter=bomb)
    field.refused(code, SiteCode.TRAINING_FAILED, "ModelError")
    assert not (tmp_path / "owned").exists()
    pickle.loads(bomb).close()  # noqa: S301  # control: it is a bomb
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "key", ["code", "trust_remote_code", "auto_map", "hooks", "requirements", "__class__"]
)
def test_a_plan_has_no_place_for_code(field, key):
    fields = json.loads(PLAN.to_json())
    for changed in (
        {**fields, key: "import os"},
        {**fields, "model": {**fields["model"], key: True}},
        {**fields, "task": {**fields["task"], key: "os.system"}},
    ):
        parts = {**field.task_parts(), "plan": canonical_json(changed)}
        code, _ = field.ask("task", FIRST, 0, parts)
        field.refused(code, SiteCode.REFUSED_PLAN, key)
    assert untouched(field)


def test_code_beside_a_task_is_not_looked_at(field):
    """An extra part is signed for like any other and read by nobody."""
    parts = {**field.task_parts(), "bundle": b"import os; os.abort()"}
    assert field.ask("task", FIRST, 0, parts)[0] is SiteCode.READY
    assert field.trainers[0].requests[0].plan == PLAN


@pytest.mark.parametrize("action", ["exec", "install", "shell", "", None, ["task"]])
def test_an_order_outside_of_the_closed_list_is_no_letter(field, action):
    sealed = field.letter("task", FIRST, 0, field.task_parts())
    header = json.loads(sealed.config_records["letter"]["header"])
    header = canonical_json({**header, "action": action})
    signature = field.identity.sign("fedward/1/coordinator", header)
    with pytest.raises(IdentityError):
        field.agents[0].answer(replaced(sealed, header=header, signature=signature))
    assert field.journal()[-1]["what"] == "no letter for us"
    assert untouched(field)


# Plans that nobody approved, and plans that ask for more.


def asked(field: Field, plan: Plan, run: str = RUN) -> SiteCode | None:
    return field.task(Attempt(run=run, round=1), 0, plan=plan)


def with_privacy(**changes: Any) -> Plan:
    return dataclasses.replace(PLAN, privacy=dataclasses.replace(PLAN.privacy, **changes))


def test_a_plan_that_nobody_approved_is_not_trained(field):
    other = dataclasses.replace(PLAN, seed=1)
    field.refused(asked(field, other), SiteCode.REFUSED_POLICY, "waits for approval")
    assert untouched(field)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (with_privacy(epsilon=8.5), "epsilon 8.5 is above max_epsilon = 8"),
        (with_privacy(epsilon=float("inf")), "epsilon inf"),
        (with_privacy(delta=1e-4), "delta 0.0001"),
        (
            dataclasses.replace(PLAN, rounds=dataclasses.replace(PLAN.rounds, spare=9)),
            "12 rounds with spares",
        ),
        (
            dataclasses.replace(PLAN, model=dataclasses.replace(PLAN.model, sha256="b" * 64)),
            "not in models",
        ),
        (
            dataclasses.replace(PLAN, tuner=Tuner(arguments={"modules_to_save": ["lm_head"]})),
            "it would train 'lm_head' whole",
        ),
    ],
)
def test_more_than_the_policy_allows_is_refused_even_if_somebody_had_approved(field, plan, reason):
    field.refused(asked(field, plan), SiteCode.REFUSED_POLICY, reason)
    assert untouched(field)


def test_a_raised_epsilon_within_an_open_run_is_refused(field):
    """Approved or not: a run goes on under the plan it started with, or not at all."""
    field.round(1)
    other = with_privacy(epsilon=7.0)
    approve(field.site(0), other, who="jo", now=datetime(2026, 5, 2, tzinfo=UTC))
    code = field.task(SECOND, 0, plan=other)
    field.refused(code, SiteCode.REFUSED_BUDGET, "another plan or cost")
    assert len(field.trainers[0].requests) == 1


def test_the_same_plan_again_as_another_run_finds_no_budget(field):
    field.round(1)
    field.refused(asked(field, PLAN, "again"), SiteCode.REFUSED_BUDGET, "the population's whole")
    assert len(field.trainers[0].requests) == 1


# Replays.


def test_a_replayed_task_is_refused_and_trains_nothing(field):
    old = field.letter("task", FIRST, 0, field.task_parts())
    field.round(1)
    field.round(2)
    answer = open_letter(field.agents[0].answer(old), field.roster.key(0), "site")
    assert answer.code is SiteCode.REFUSED_STALE
    last = field.journal()[-1]
    assert (last["code"], last["order"], last["sent"]) == ("refused-stale", [1, 1, 1], {})
    assert len(field.trainers[0].requests) == 2
    field.restart(0)
    assert field.task(SECOND, 0) is SiteCode.REFUSED_STALE
    assert field.ledger(0).spent(RUN) == 2


# One site's own input.


@pytest.mark.parametrize("minimum", [0, 1, 2])
def test_a_plan_with_a_cohort_of_one_is_no_plan(field, minimum):
    fields = json.loads(PLAN.to_json())
    fields["cohort"]["minimum"] = minimum
    parts = {**field.task_parts(), "plan": canonical_json(fields)}
    code, _ = field.ask("task", FIRST, 0, parts)
    field.refused(code, SiteCode.REFUSED_PLAN, "minimum")
    assert untouched(field)


def test_a_smaller_cohort_than_the_site_asks_for_is_refused(tmp_path):
    strict = Field(tmp_path, policy=dataclasses.replace(MANUAL, minimum=3))
    for site in range(SITES):
        policy = dataclasses.replace(strict.policy, minimum=4)
        strict.site(site).policy.write_text(dump(policy))
        strict.restart(site)
    strict.refused(strict.task(FIRST, 0), SiteCode.REFUSED_POLICY, "below minimum = 4")
    strict.close()


def test_a_session_with_one_site_reveals_nothing(field):
    """The coordinator shows the site a cohort of itself alone, or of itself and its own puppets."""
    for site in range(SITES):
        field.task(FIRST, site)
    hellos = {}
    for site in range(SITES):
        _, answer = field.ask("hello", FIRST, site, {"message": field.tally(FIRST).request()})
        hellos[site] = wire.decode_hello(answer.part("message"))
    for shown in ([hellos[0]], [hellos[0], hellos[1]]):
        code, _ = field.ask("shares", FIRST, 0, {"message": wire.encode_hellos(shown)})
        field.refused(code, SiteCode.PROTOCOL_ABORTED, "")
    code, _ = field.ask("masked", FIRST, 0, {"message": b""})
    field.refused(code, SiteCode.PROTOCOL_ABORTED, "")
    assert field.ledger(0).spent(RUN) == 0, "nothing of it left, so nothing is spent"


@pytest.mark.parametrize("survivors", [[0], [0, 1]])
def test_a_published_cohort_of_fewer_than_the_minimum_is_refused(field, survivors):
    field.round(1)
    code = field.task(SECOND, 0, cohort=canonical_json(survivors))
    field.refused(code, SiteCode.PROTOCOL_ABORTED, "published cohort")
    assert len(field.trainers[0].requests) == 1


# Posing as somebody else.


@pytest.mark.parametrize("poser", ["a site", "a stranger"])
def test_only_the_pinned_coordinator_gives_orders(field, poser):
    key = field.keys[1] if poser == "a site" else Identity()
    letter = Letter(action="task", attempt=FIRST, site=0, parts=field.task_parts())
    for sender in ("coordinator", "site"):
        with pytest.raises(IdentityError):
            field.agents[0].answer(seal_letter(letter, key, sender))
        assert field.journal()[-1]["what"] == "no letter for us"
    assert untouched(field)


def test_a_letter_to_another_site_is_not_served(field):
    with pytest.raises(IdentityError):
        field.agents[0].answer(field.letter("task", FIRST, 1, field.task_parts()))
    assert "for site 1" in field.journal()[-1]["reason"]
    assert untouched(field)


def test_nobody_can_answer_for_a_site(field):
    letter = Letter(action="task", attempt=FIRST, site=0, code=SiteCode.READY)
    with pytest.raises(IdentityError):
        open_letter(seal_letter(letter, field.keys[1], "site"), field.roster.key(0), "site")


# A site that takes a rest.


def test_a_paused_site_ends_the_round_in_hand_and_takes_no_other(field):
    for site in range(SITES):
        field.task(FIRST, site)
    field.site(0).paused.touch()
    field.commit(field.session(FIRST)[0].result())
    field.refused(field.task(SECOND, 0), SiteCode.REFUSED_POLICY, "paused: fedward site resume")
    assert field.ledger(0).spent(RUN) == 1
    field.site(0).paused.unlink()
    field.round(2)


# The journal itself.


def test_a_journal_that_cannot_be_written_stops_the_site(field):
    field.files[0][2].close()
    assert field.task(FIRST, 0) is SiteCode.REFUSED_BUDGET
    assert not field.trainers[0].requests


def test_a_journal_without_its_last_lines_is_noticed_by_the_ledger(field):
    field.round(1)
    path = field.site(0).journal
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-7]))
    with pytest.raises(LedgerRolledBack):
        field.journal()
    path.write_bytes(whole)
    assert field.journal()


def test_a_letter_that_comes_again_is_journalled_and_gets_the_same_bytes(field):
    letter = field.letter("task", FIRST, 0, field.task_parts())
    one, two = (field.agents[0].answer(copy.deepcopy(letter)) for _ in range(2))
    assert one is two
    assert [entry["what"] for entry in field.journal()] == [
        "plan approved", "reserved", "answered", "answered again"
    ]  # fmt: skip


def test_the_plan_of_the_desk_is_within_every_policy():
    """Control: what the tests above refuse, they refuse for their reason alone."""
    assert PLAN.cohort == Cohort(minimum=3, colluders=0)
    assert PLAN.privacy == Privacy(epsilon=8.0, delta=1e-5)
    POLICY.check(PLAN)
