"""A dealer that seals garbage under its valid signature: named, left out, and nobody framed."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag

from fedward.aggregation import envelopes, site_session, tally, wire
from fedward.aggregation.cohort import Cohort, PinnedKeys
from fedward.aggregation.complaints import Complaint, judge
from fedward.aggregation.envelopes import NO_KEY, agree, open_envelope, signed_fields
from fedward.aggregation.transcript import SiteFault, envelope_key, party, sign
from fedward.errors import CohortTooSmall, ProtocolError
from fedward.server.store import Phase
from fedward.server.suspects import proven
from tests.aggregation.attacker import VICTIM, deliver, refused, state
from tests.aggregation.rig import Rig, identity, make_rig
from tests.client.desk import PLAN
from tests.server.test_rounds import LIAR
from tests.server.test_rounds import Rig as Engine

DEALER = 2
Lie = Callable[[wire.Sealed], wire.Sealed]

LIES: dict[str, Lie] = {
    "does not open": lambda sealed: sealed._replace(envelope=bytes(82)),
    "other shares": lambda sealed: sealed._replace(key_share_commitment=bytes(32)),
}


def lying(monkeypatch: pytest.MonkeyPatch, dealer: int, holders: tuple[int, ...], lie: Lie) -> None:
    """Let one dealer sign, for some holders, what a lie makes of its envelope."""
    honest = envelopes.seal

    def seal(cohort: Cohort, signer: Any, private: Any, me: int, other: int, *rest: Any) -> Any:
        sealed = honest(cohort, signer, private, me, other, *rest)
        if me != dealer or other not in holders:
            return sealed
        bad = lie(sealed)
        envelope = wire.Envelope(me, rest[1], *bad[1:])
        return bad._replace(signature=sign(signer, "R1", *signed_fields(cohort, other, envelope)))

    monkeypatch.setattr(site_session, "seal", seal)


def complaints_of(rig: Rig) -> dict[int, bytes]:
    """Run R2; the honest inputs go to the tally, the complaints come back."""
    found = {}
    for site, message in rig.run_to("R2").items():
        try:
            rig.add("R2", site, rig.answer("R2", site, message))
        except Complaint as complaint:
            found[site] = complaint.message
    return found


@pytest.mark.parametrize(
    ("lie", "holders", "proof"),
    [
        ("other shares", (1,), {DEALER}),
        ("does not open", (1,), set()),
        ("does not open", (1, 3), {DEALER}),
    ],
)
def test_a_dealer_of_garbage_is_named(monkeypatch, lie, holders, proof):
    """Proven by the shares themselves, or by more complaints than there are colluders."""
    lying(monkeypatch, DEALER, holders, LIES[lie])
    rig = make_rig(7, colluders=1, minimum=4)
    complaints = complaints_of(rig)
    assert sorted(complaints) == sorted(holders)
    for site, complaint in complaints.items():
        assert rig.sessions[site].dead
        assert not rig.memories[site].spent, "its update may go into the next attempt"
        found = rig.tally.add_complaint(site, complaint)
        assert found == ({DEALER} if lie == "other shares" else {DEALER, site})
        assert rig.tally.add_complaint(site, complaint) == found, "a repetition changes nothing"
    assert proven(rig.tally.suspects.values(), colluders=1) == proof
    assert not rig.said["R3"]


def test_a_site_that_complained_stays_silent(monkeypatch):
    lying(monkeypatch, DEALER, (VICTIM,), LIES["does not open"])
    rig = make_rig(5)
    refused(rig, "R2", rig.run_to("R2")[VICTIM], match="site 2: its envelope does not open")


def test_on_the_ring_a_bad_signature_is_found_when_somebody_complains(monkeypatch):
    """Above 128 sites the tally checks no signature of an envelope before a holder does."""
    monkeypatch.setattr(tally, "COMPLETE_UP_TO", 0)
    rig = make_rig(5, colluders=1)
    messages = rig.run_to("R1")
    for site, message in messages.items():
        shares = wire.decode_shares(rig.answer("R1", site, message))
        if site == DEALER:
            first = shares.sealed[0]._replace(signature=bytes(64))
            shares = shares._replace(sealed=(first, *shares.sealed[1:]))
        rig.add("R1", site, wire.encode_shares(shares))
    message = rig.tally.close_shares()[VICTIM]
    with pytest.raises(Complaint, match="R1 signature") as caught:
        deliver(rig, "R2", message)
    assert wire.decode_complaint(caught.value.message).key == NO_KEY
    assert rig.tally.add_complaint(VICTIM, caught.value.message) == {DEALER}
    assert rig.tally.suspects == {VICTIM: {DEALER}}


def framing(rig: Rig, key: bytes, *, holder: int = 3, dealer: int = DEALER) -> bytes:
    """A complaint that a corrupt holder signs, whatever it got."""
    fields = (rig.tally._cohort.session, party(holder), party(dealer), key)
    complaint = wire.Complaint(holder, dealer, key, sign(identity(holder), "C", *fields))
    return wire.encode_complaint(complaint)


def true_key(rig: Rig, holder: int, dealer: int) -> bytes:
    """The key of an honest dealer's envelope, as its holder derives it."""
    cohort = rig.tally._cohort
    shared = agree(state(rig, holder).keys.envelope, dealer, cohort.hellos[dealer].envelope_key)
    return envelope_key(shared, cohort.session, dealer, holder)


def test_nobody_is_framed_alone():
    """A liar is named itself, or suspected with the dealer it slanders."""
    rig = make_rig(7, colluders=2, minimum=4)
    rig.run_to("R2")
    assert rig.tally.add_complaint(3, framing(rig, true_key(rig, 3, DEALER))) == {3}
    assert rig.tally.add_complaint(4, framing(rig, NO_KEY, holder=4)) == {4}
    assert rig.tally.add_complaint(5, framing(rig, os.urandom(32), holder=5)) == {DEALER, 5}
    assert rig.tally.suspects == {3: {3}, 4: {4}, 5: {DEALER, 5}}
    assert proven(rig.tally.suspects.values(), colluders=2) == {3, 4}


@pytest.mark.parametrize("change", ["signer", "session", "stranger", "itself", "another's name"])
def test_complaints_that_do_not_hold(change):
    rig = make_rig(5)
    rig.run_to("R2")
    message, site = framing(rig, bytes([1]) * 32), 3
    if change == "signer":
        message = message[:-64] + sign(identity(4), "C", *[b""] * 4)
    elif change == "session":
        other = make_rig(5)
        other.run_to("R2")
        message = framing(other, bytes([1]) * 32)
    elif change == "another's name":
        site = 4
    else:
        message = framing(rig, bytes([1]) * 32, dealer=9 if change == "stranger" else 3)
    with pytest.raises(SiteFault) as caught:
        rig.tally.add_complaint(site, message)
    assert caught.value.site == site
    assert rig.tally.suspects == {}


def test_a_site_that_left_before_complains_of_nobody():
    rig = make_rig(5, gone={3: "R1"})
    rig.run_to("R2")
    with pytest.raises(SiteFault, match="site 3: it complains"):
        rig.tally.add_complaint(3, framing(rig, bytes([1]) * 32))


def test_a_complaint_comes_in_place_of_an_input_and_in_its_time():
    rig = make_rig(5)
    messages = rig.run_to("R2")
    complaint = framing(rig, bytes([1]) * 32)
    rig.add("R2", 3, rig.answer("R2", 3, messages[3]))
    with pytest.raises(SiteFault, match="two different"):
        rig.tally.add_complaint(3, complaint)
    rig.tally.add_complaint(4, framing(rig, NO_KEY, holder=4))
    with pytest.raises(SiteFault, match="site 4: it sent two different"):
        rig.add("R2", 4, rig.answer("R2", 4, messages[4]))
    early = make_rig(5)
    with pytest.raises(ProtocolError, match="not open"):
        early.tally.add_complaint(3, complaint)


def keys_won(rig: Rig) -> list[bytes]:
    """A coordinator changes honest envelopes to be told their keys; returns what opens for it."""
    u2, envelopes = wire.decode_envelopes(rig.run_to("R2")[VICTIM])
    spoiled = [e._replace(envelope=bytes(82)) for e in envelopes]
    with pytest.raises(Complaint) as caught:
        deliver(rig, "R2", wire.encode_envelopes(u2, spoiled))
    key = wire.decode_complaint(caught.value.message).key
    try:
        shares = open_envelope(rig.tally._cohort, key, VICTIM, envelopes[0])
    except InvalidTag:
        return []
    return list(shares or ())


def test_a_changed_envelope_gives_no_key_away():
    assert keys_won(make_rig(5)) == []


def test_twin_without_the_dealer_s_signature(monkeypatch):
    """Unsigned garbage would be answered with the key of the honest envelope: a share is read."""
    verify = PinnedKeys.verify

    def lax(self: PinnedKeys, site: int, signature: bytes, stage: str, *fields: bytes) -> None:
        if stage != "R1":
            verify(self, site, signature, stage, *fields)

    monkeypatch.setattr(PinnedKeys, "verify", lax)
    rig = make_rig(5)
    assert len(keys_won(rig)) == 2


def test_twin_with_as_many_complaints_as_colluders_believed():
    """Allowing for fewer than there are, they could put an honest dealer out alone."""
    rig = make_rig(7, colluders=2, minimum=4)
    rig.run_to("R2")
    for liar in (4, 5):
        rig.tally.add_complaint(liar, framing(rig, os.urandom(32), holder=liar))
    assert proven(rig.tally.suspects.values(), colluders=2) == frozenset()
    assert proven(rig.tally.suspects.values(), colluders=1) == {DEALER}, "the slanderers would stay"


def test_a_complaint_is_bound_to_the_envelope_that_the_dealer_signed():
    rig = make_rig(5)
    rig.run_to("R2")
    complaint = wire.decode_complaint(framing(rig, true_key(rig, 3, DEALER)))
    cohort, pinned = rig.tally._cohort, rig.tally._pinned
    honest = rig.tally._sealed[DEALER][3]
    assert judge(cohort, pinned, complaint, honest) == {3}
    changed = honest._replace(envelope=bytes(82))
    assert judge(cohort, pinned, complaint, changed) == {DEALER}, "its signature is gone"


# Over real agents and the round engine: site 1 deals garbage to sites 0 and 2 in every attempt.


def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str) -> Engine:
    lying(monkeypatch, LIAR, (0, 2), LIES[lie])
    rounds = dataclasses.replace(PLAN.rounds, count=1)
    return Engine(tmp_path, plan=dataclasses.replace(PLAN, rounds=rounds))


@pytest.mark.parametrize("lie", LIES)
def test_the_next_attempt_goes_without_the_dealer(tmp_path, monkeypatch, lie):
    rig = engine(tmp_path, monkeypatch, lie)
    rig.run()
    assert rig.cohorts == [[0, 2, 3]]
    [(_, facts)] = rig.facts(Phase.ABORTED)
    expected = {"other shares": [[LIAR]], "does not open": [[0, LIAR], [LIAR, 2]]}
    assert facts["suspects"] == expected[lie]
    assert "silent" not in facts
    reasons = {f["reason"] for _, f in rig.facts(Phase.LEFT_OUT) if f["at"] == "masked"}
    assert all(reason.startswith("protocol-aborted: at fault is") for reason in reasons)
    assert any("site 1" in reason for reason in reasons)
    rig.close()


def test_twin_without_complaints_one_dealer_ends_the_run(tmp_path, monkeypatch):
    """Each attempt costs the sites that got no garbage an update, until no spare round is left."""
    rig = engine(tmp_path, monkeypatch, "does not open")
    monkeypatch.setattr(tally.Tally, "suspects", {})
    with pytest.raises(CohortTooSmall, match="round 1: 2 of 4 sites are ready"):
        rig.run()
    assert rig.cohorts == []
    rig.close()


def test_a_dealer_that_spoils_one_site_s_part_does_not_stay(tmp_path, monkeypatch):
    """Round 1 holds without the victim; else the dealer could keep it out of every round."""
    lying(monkeypatch, LIAR, (0,), LIES["other shares"])
    rounds = dataclasses.replace(PLAN.rounds, count=2)
    rig = Engine(tmp_path, plan=dataclasses.replace(PLAN, rounds=rounds))
    rig.run()
    assert rig.cohorts == [[1, 2, 3], [0, 2, 3]]
    rig.close()
