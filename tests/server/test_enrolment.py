"""A site is admitted once, by a secret that only the invited one has, over TLS that it pins."""

import base64
import dataclasses
import datetime
import json
import shutil
import ssl
import time
from pathlib import Path

import httpx
import pytest

from fedward.canonical import canonical_json
from fedward.client import enrol as site
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.enrolment import (
    ENROL_PATH,
    LEAVE_PATH,
    ROSTER_PATH,
    EnrolRequest,
    MemberRequest,
    Token,
)
from fedward.errors import ConfigurationError, IdentityError, Unreachable
from fedward.identity import Identity, Member, Roster, fingerprint, open_roster, seal_roster
from fedward.server.certificates import issue
from fedward.server.coordinator_folder import CoordinatorConfig, CoordinatorFolder
from fedward.server.enrolment import enrolment_app
from fedward.server.members import Enrolled, open_members
from tests.server.tls import free_port, serving

HOUR = 3600


class Fed:
    """A coordinator's folder with its enrolment server, and sites' folders beside it."""

    def __init__(self, root: Path, template: CoordinatorFolder | None = None) -> None:
        self.root, self.now = root, time.time()
        self.changes = 0
        if template is not None:
            shutil.copytree(template.root, root / "coordinator")
        else:
            config = CoordinatorConfig(host="127.0.0.1", port=free_port())
            folder = CoordinatorFolder.create(root / "coordinator", config)
            issue(folder, datetime.datetime.now(datetime.UTC))
        self.folder = CoordinatorFolder.load(root / "coordinator")
        self.app = enrolment_app(self.folder, on_change=self.changed, clock=lambda: self.now)

    def changed(self) -> None:
        self.changes += 1

    def token(self, name: str = "a", hours: int = 1) -> Token:
        with open_members(self.folder) as members:
            expires = int(self.now) + hours * HOUR
            secret = members.invite(name, expires=expires, now=int(self.now))
        return Token(
            site=name,
            address=self.folder.config().address,
            ca=self.folder.ca.read_text(),
            coordinator=self.folder.identity().public_key.hex(),
            secret=secret,
            expires=expires,
        )

    def site(self, name: str = "a") -> SiteFolder:
        return SiteFolder.create(self.root / name, SiteConfig(name=name))

    def members(self) -> list[Enrolled]:
        with open_members(self.folder) as members:
            return members.all()

    def roster(self) -> Roster:
        with open_members(self.folder) as members:
            return members.roster()

    def revoke(self, name: str) -> None:
        with open_members(self.folder) as members:
            members.revoke(name, int(self.now))


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """One server for all tests: the coordinator that every test starts from, and who answers."""
    first, now = Fed(tmp_path_factory.mktemp("line")), list[Fed]()

    async def app(scope, receive, send):
        await now[-1].app(scope, receive, send)

    with serving(app, first.folder):
        yield first, now


@pytest.fixture
def fed(line, tmp_path):
    first, now = line
    now.append(Fed(tmp_path, first.folder))
    return now[-1]


def test_a_site_enrols_and_pins_the_roster(fed):
    folder = fed.site()
    roster = site.enrol(folder, fed.token().encode())
    key = folder.identity().public_key
    assert roster == fed.roster() == site.pinned_roster(folder)
    assert roster == Roster(
        epoch=1,
        coordinator=fed.folder.identity().public_key,
        members=(Member(id=0, name="a", public_key=key),),
    )
    assert (folder.config().address, folder.ca.read_text()) == (
        fed.folder.config().address, fed.folder.ca.read_text()
    )  # fmt: skip
    (member,) = fed.members()
    assert member.fleet_key == folder.fleet_public_key.read_text().strip()
    assert fed.changes == 1


def test_the_same_request_again_gives_the_same_and_other_keys_get_nothing(fed):
    word = fed.token().encode()
    folder = fed.site()
    first = site.enrol(folder, word)
    assert site.enrol(folder, word) == first, "as after an answer that was lost"
    thief = SiteFolder.create(fed.root / "thief", SiteConfig(name="a"))
    with pytest.raises(IdentityError, match="refused"):
        site.enrol(thief, word)
    assert len(fed.members()) == 1


def test_a_token_that_is_over_is_refused(fed):
    word = fed.token(hours=1).encode()
    fed.now += HOUR
    with pytest.raises(IdentityError, match="refused"):
        site.enrol(fed.site(), word)
    fed.now -= 1
    site.enrol(fed.site(), word)


def test_a_token_is_for_one_site_and_a_newer_one_voids_it(fed):
    old = fed.token("a")
    with pytest.raises(ConfigurationError, match="for site 'a', and this is 'b'"):
        site.enrol(fed.site("b"), old.encode())
    forged = dataclasses.replace(old, site="b")
    with pytest.raises(IdentityError, match="refused"):
        site.enrol(fed.site("b"), forged.encode())
    new = fed.token("a")
    with pytest.raises(IdentityError, match="refused"):
        site.enrol(fed.site("a"), old.encode())
    site.enrol(fed.site("a"), new.encode())


def test_only_the_hash_of_a_secret_is_stored(fed):
    token = fed.token()
    site.enrol(fed.site(), token.encode())
    stored = b"".join(p.read_bytes() for p in fed.folder.root.rglob("*") if p.is_file())
    assert b"invitation" in stored, "control: the database was searched"
    assert token.secret.encode() not in stored
    assert bytes.fromhex(token.secret) not in stored


def test_a_server_of_another_ca_is_not_spoken_to(fed):
    other = Fed(fed.root / "other")
    token = dataclasses.replace(fed.token(), ca=other.folder.ca.read_text())
    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
        site.enrol(fed.site(), token.encode())
    assert fed.members() == []


def test_an_answer_of_another_coordinator_is_refused(fed):
    token = dataclasses.replace(fed.token(), coordinator=Identity().public_key.hex())
    folder = fed.site()
    with pytest.raises(IdentityError, match="does not verify"):
        site.enrol(folder, token.encode())
    assert not folder.roster.exists()
    assert folder.config().coordinator is None


def test_nobody_there_says_what_to_look_at(fed, tmp_path):
    token = dataclasses.replace(fed.token(), address=f"https://127.0.0.1:{free_port()}")
    with pytest.raises(Unreachable, match="firewall"):
        site.enrol(fed.site(), token.encode())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda word: word[:-5],
        lambda word: word[:40] + ("A" if word[40] != "A" else "B") + word[41:],
        lambda word: word.removeprefix("fedward-"),
        lambda word: "",
        lambda word: "fedward-%%%",
    ],
)
def test_a_damaged_token_is_noticed_before_anything_is_sent(fed, spoil):
    with pytest.raises(ConfigurationError, match="not an enrolment token"):
        site.enrol(fed.site(), spoil(fed.token().encode()))


def test_a_token_survives_line_breaks(fed):
    word = fed.token().encode()
    assert Token.decode(f" {word[:50]}\n{word[50:]}\n") == Token.decode(word)


def post(fed: Fed, path: str, body: bytes) -> httpx.Response:
    verify = ssl.create_default_context(cafile=fed.folder.ca)
    return httpx.post(fed.folder.config().address + path, content=body, verify=verify)


def request(folder: SiteFolder, token: Token) -> bytes:
    identity = folder.identity()
    unsigned = EnrolRequest(
        site=token.site,
        public_key=identity.public_key.hex(),
        fleet_key=folder.fleet_public_key.read_text().strip(),
        secret=token.secret,
    )
    return unsigned.signed(identity, folder.fleet_key.read_bytes())


@pytest.mark.parametrize("key", ["public_key", "fleet_key", "site", "secret"])
def test_both_keys_sign_the_whole_request(fed, key):
    """Else somebody could enrol a key that is not his, for example another site's."""
    token, folder, other = fed.token(), fed.site(), fed.site("b")
    fields = json.loads(request(folder, token))
    theirs = json.loads(request(other, fed.token("b")))
    for mixed in (
        {**fields, key: theirs[key]},
        {**fields, "signature": theirs["signature"]},
        {**fields, "fleet_signature": theirs["fleet_signature"]},
    ):
        assert post(fed, ENROL_PATH, canonical_json(mixed)).status_code == 403
    assert fed.members() == []
    assert post(fed, ENROL_PATH, canonical_json(fields)).status_code == 200, "control"


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"\xff", b'{"site":1}', b"[" * 9000])
def test_what_is_no_request_gets_a_status_and_no_word(fed, body):
    for path in (ENROL_PATH, ROSTER_PATH, LEAVE_PATH):
        answer = post(fed, path, body)
        assert (answer.status_code, answer.content) == (403, b"")


def test_size_path_and_method_are_limited(fed):
    assert post(fed, ENROL_PATH, bytes(16 * 1024 + 1)).status_code == 413
    assert post(fed, "/v1/enrolment/other", b"").status_code == 404
    verify = ssl.create_default_context(cafile=fed.folder.ca)
    assert httpx.get(fed.folder.config().address + ENROL_PATH, verify=verify).status_code == 404


def test_the_roster_is_for_members_at_this_time(fed):
    folder = fed.site()
    site.enrol(folder, fed.token().encode())
    now = int(fed.now)
    key = folder.identity()

    def asked(
        who: Identity = key, when: int = now, path: str = ROSTER_PATH, whom: Identity | None = None
    ) -> bytes:
        coordinator = (whom or fed.folder.identity()).public_key
        return MemberRequest.signed(who, when, path=path, coordinator=coordinator)

    assert post(fed, ROSTER_PATH, asked()).status_code == 200
    late = asked(when=now - 301)
    moved = canonical_json({**json.loads(late), "time": now})
    elsewhere = asked(whom=Identity())
    for body in (late, asked(Identity()), moved, elsewhere, asked(path=LEAVE_PATH)):
        assert post(fed, ROSTER_PATH, body).status_code == 403
    assert post(fed, LEAVE_PATH, asked()).status_code == 403, "a request for the roster lets out"
    assert len(fed.roster().members) == 1


def test_a_newer_roster_waits_for_approval_unless_the_policy_takes_it(fed):
    a, b = fed.site("a"), fed.site("b")
    site.enrol(a, fed.token("a").encode())
    site.enrol(b, fed.token("b").encode())
    sealed = site.fetch_roster(a)
    assert site.offer_roster(a, sealed, automatic=False) == "waiting"
    assert [m.name for m in site.pinned_roster(a).members] == ["a"]
    waiting = site.waiting_roster(a)
    assert waiting is not None
    assert [m.name for m in waiting.members] == ["a", "b"]
    assert site.approve_roster(a) == site.pinned_roster(a) == fed.roster()
    with pytest.raises(ConfigurationError, match="no newer roster"):
        site.approve_roster(a)
    site.enrol(fed.site("c"), fed.token("c").encode())
    assert site.offer_roster(a, site.fetch_roster(a), automatic=True) == "adopted"
    assert site.offer_roster(a, site.fetch_roster(a), automatic=True) == "same"
    assert site.pinned_roster(a) == fed.roster()


def test_a_step_back_two_rosters_of_one_epoch_and_another_key_are_refused(fed):
    a, identity = fed.site("a"), fed.folder.identity()
    site.enrol(a, fed.token("a").encode())
    old = a.roster.read_bytes()
    site.enrol(fed.site("b"), fed.token("b").encode())
    site.offer_roster(a, site.fetch_roster(a), automatic=True)
    pinned = site.pinned_roster(a)
    own, other = pinned.members
    stranger = Member(id=1, name="b", public_key=Identity().public_key)
    renamed = dataclasses.replace(other, name="x")
    for offered, reason in (
        (open_roster(old, identity.public_key), "step back"),
        (dataclasses.replace(pinned, members=(own,)), "two rosters of epoch 2"),
        (dataclasses.replace(pinned, epoch=3, members=(own, stranger)), "another name or key"),
        (dataclasses.replace(pinned, epoch=3, members=(own, renamed)), "another name or key"),
        (dataclasses.replace(pinned, epoch=3, members=(other,)), "revoked"),
    ):
        with pytest.raises(IdentityError, match=reason):
            site.offer_roster(a, seal_roster(offered, identity), automatic=True)
    with pytest.raises(IdentityError, match="does not verify"):
        site.offer_roster(a, seal_roster(pinned, Identity()), automatic=True)
    assert site.pinned_roster(a) == pinned


def test_a_waiting_roster_counts_against_a_step_back(fed):
    a = fed.site("a")
    site.enrol(a, fed.token("a").encode())
    site.enrol(fed.site("b"), fed.token("b").encode())
    second = site.fetch_roster(a)
    site.enrol(fed.site("c"), fed.token("c").encode())
    site.offer_roster(a, site.fetch_roster(a), automatic=False)
    with pytest.raises(IdentityError, match="step back"):
        site.offer_roster(a, second, automatic=False)


def test_a_revoked_site_is_out_and_its_id_and_keys_never_come_back(fed):
    a, b = fed.site("a"), fed.site("b")
    site.enrol(a, fed.token("a").encode())
    site.enrol(b, fed.token("b").encode())
    fed.revoke("a")
    assert [(m.id, m.name) for m in fed.roster().members] == [(1, "b")]
    assert fed.roster().epoch == 3
    with pytest.raises(IdentityError, match="revoked"):
        site.offer_roster(a, site.fetch_roster(a), automatic=True)
    with pytest.raises(ConfigurationError, match="not a member; members: b"):
        fed.revoke("a")
    again = SiteFolder.create(fed.root / "again", SiteConfig(name="a"))
    with pytest.raises(IdentityError, match="refused"):
        site.enrol(a, fed.token("a").encode())
    site.enrol(again, fed.token("a").encode())
    assert [(m.id, m.name) for m in fed.roster().members] == [(1, "b"), (2, "a")]


def test_a_site_that_leaves_is_out_and_forgets_the_membership_but_not_what_was_spent(fed):
    a, b = fed.site("a"), fed.site("b")
    site.enrol(a, fed.token("a").encode())
    site.enrol(b, fed.token("b").encode())
    (a.approvals / "x.signed").write_bytes(b"")
    kept = [a.key, a.fleet_key, a.ledger, a.journal, a.memory, a.policy]
    for path in kept[2:]:
        path.write_bytes(b"kept")
    with a.alone(), pytest.raises(ConfigurationError, match="another process runs this site"):
        site.leave(a)
    site.leave(a)
    assert [(m.id, m.name) for m in fed.roster().members] == [(1, "b")]
    assert fed.changes == 3
    assert all(path.exists() for path in kept)
    gone = [a.ca, a.roster, a.pending_roster, a.node]
    assert not any(path.exists() for path in gone)
    assert not list(a.approvals.iterdir())
    assert a.config() == SiteConfig(name="a")
    with pytest.raises(ConfigurationError, match="nothing to leave"):
        site.leave(a)


def test_a_site_that_left_comes_back_as_what_it_was_and_one_that_was_revoked_does_not(fed):
    a, b = fed.site("a"), fed.site("b")
    first = fed.token("a").encode()
    site.enrol(a, first)
    site.enrol(b, fed.token("b").encode())
    site.leave(a)
    with pytest.raises(IdentityError, match="refused"):
        site.enrol(a, first)
    roster = site.enrol(a, fed.token("a").encode())
    assert [(m.id, m.name) for m in roster.members] == [(0, "a"), (1, "b")]
    assert roster.epoch == 4
    site.offer_roster(b, site.fetch_roster(b), automatic=True)
    assert site.pinned_roster(b) == roster
    assert [(m.revoked, m.left) for m in fed.members()] == [(False, False)] * 2
    fed.revoke("a")
    with pytest.raises(IdentityError, match="refused"):
        site.enrol(a, fed.token("a").encode())
    assert [(m.revoked, m.left) for m in fed.members()] == [(True, False), (False, False)]


def test_another_key_does_not_take_the_place_of_a_site_that_left(fed):
    a = fed.site("a")
    site.enrol(a, fed.token("a").encode())
    site.leave(a)
    other = SiteFolder.create(fed.root / "other", SiteConfig(name="a"))
    site.enrol(other, fed.token("a").encode())
    assert [(m.id, m.name) for m in fed.roster().members] == [(1, "a")]


def test_a_coordinator_that_cannot_be_told_is_left_only_on_request(fed):
    a = fed.site("a")
    site.enrol(a, fed.token("a").encode())
    a.write_config(dataclasses.replace(a.config(), address=f"https://127.0.0.1:{free_port()}"))
    with pytest.raises(Unreachable):
        site.leave(a)
    assert a.roster.exists()
    site.leave(a, tell=False)
    assert a.config() == SiteConfig(name="a")
    assert len(fed.roster().members) == 1


def test_leaving_is_ended_after_a_crash(fed, monkeypatch):
    a = fed.site("a")
    site.enrol(a, fed.token("a").encode())

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SiteFolder, "write_config", crash)
        with pytest.raises(KeyboardInterrupt):
            site.leave(a)
    assert a.config().coordinator is not None, "control: it was not done"
    site.leave(a)
    assert a.config() == SiteConfig(name="a")
    assert fed.roster().epoch == 2


def test_a_member_is_not_invited_and_an_invitation_must_hold_for_some_time(fed):
    site.enrol(fed.site(), fed.token().encode())
    with pytest.raises(ConfigurationError, match="is a member already"):
        fed.token()
    with pytest.raises(ConfigurationError, match="more hours"):
        fed.token("b", hours=0)


def test_a_folder_belongs_to_one_coordinator(fed):
    folder = fed.site()
    site.enrol(folder, fed.token().encode())
    other = Fed(fed.root / "other")
    with pytest.raises(ConfigurationError, match="another coordinator"):
        site.enrol(folder, other.token().encode())


def test_a_site_that_is_not_enrolled_has_no_roster(fed):
    with pytest.raises(ConfigurationError, match="site enrol TOKEN"):
        site.pinned_roster(fed.site())


def test_the_fingerprint_is_short_and_of_the_key():
    one, two = fingerprint(bytes(32)), fingerprint(bytes(31) + b"\1")
    assert one != two
    assert len(one) == 39


def test_the_token_tells_its_fields_to_whoever_holds_it(fed):
    """It is a secret, and says so: there is nothing to decrypt."""
    token = fed.token()
    data = base64.urlsafe_b64decode(token.encode().removeprefix("fedward-") + "==")
    assert json.loads(data[4:])["secret"] == token.secret
