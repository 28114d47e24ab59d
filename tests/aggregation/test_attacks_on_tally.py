"""Malicious sites against the tally: named, and the session goes on where it can."""

import hashlib
from typing import Any

import numpy as np
import pytest

from fedward.aggregation import cohort as cohort_module
from fedward.aggregation import shamir, wire
from fedward.aggregation import tally as tally_module
from fedward.aggregation.fixed_point import Grid
from fedward.aggregation.graph import Thresholds
from fedward.aggregation.masks import Words
from fedward.aggregation.transcript import (
    SiteFault,
    sign,
)
from fedward.errors import ProtocolError
from tests.aggregation.rig import Rig, identity, make_rig


def test_a_site_that_changes_its_share_is_named():
    rig = make_rig(5)
    messages = rig.run_to("R4")
    released = wire.decode_released(rig.answer("R4", 2, messages[2]))
    dealer, _ = released.shares[0]
    lie = released._replace(shares=((dealer, bytes(33)), *released.shares[1:]))
    with pytest.raises(SiteFault, match=r"site 2: it changed its share of site 1") as caught:
        rig.tally.add_unmask(2, wire.encode_released(lie))
    assert caught.value.site == 2
    for site in (1, 3, 4, 5):
        rig.add("R4", site, rig.answer("R4", site, messages[site]))
    assert np.array_equal(rig.tally.result().words, rig.plain_sum(rig.sites))


@pytest.mark.parametrize("which", ["seed", "mask key"])
def test_a_dealer_whose_shares_lie_on_no_polynomial_is_named(which, monkeypatch):
    rig = make_rig(4, gone={2: "R2"} if which == "mask key" else {})
    split = shamir.split
    calls: list[bytes] = []

    def lying(secret: bytes, **options: Any) -> list[bytes]:
        shares = split(secret, **options)
        calls.append(secret)
        wrong = 1 if which == "seed" else 2  # each dealer shares its seed first, then its key
        if len(calls) == wrong + 2:  # site 2 is the second dealer
            shares[2] = bytes(33)
        return shares

    monkeypatch.setattr(shamir, "split", lying)
    with pytest.raises(SiteFault) as caught:
        rig.run()
    assert caught.value.site == 2


def test_a_truncated_or_changed_upload():
    rig = make_rig(4)
    messages = rig.run_to("R2")
    header = rig.answer("R2", 2, messages[2])
    vector = rig.vectors[2]
    changed = vector.copy()
    changed[0] += 1
    bads: list[Any] = [vector[:-1], changed, vector.astype(np.uint16), vector.astype(np.int64)]
    for bad in bads:
        with pytest.raises(ProtocolError):
            rig.tally.add_masked(2, header, bad)
    rig.add("R2", 2, header)
    for site in (1, 3, 4):
        rig.add("R2", site, rig.answer("R2", site, messages[site]))
    rig.exchange("R3", rig.tally.close_masked())
    rig.exchange("R4", rig.tally.close_consistency())
    assert np.array_equal(rig.tally.result().words, rig.plain_sum(rig.sites))


def test_a_second_upload():
    rig = make_rig(4)
    rig.exchange("R2", rig.run_to("R2"))
    u2_hash, session = rig.tally._u2_hash, rig.tally._cohort.session
    other = np.ones(10, dtype=np.uint32)
    hashed = hashlib.sha256(other.data).digest()
    bound = (session, u2_hash, (2).to_bytes(4, "big"), hashed)
    header = wire.Header(2, hashed, sign(identity(2), "R2", *bound))
    with pytest.raises(SiteFault, match="two different"):
        rig.tally.add_masked(2, wire.encode_header(header), other)


def test_a_site_that_speaks_for_another():
    rig = make_rig(4)
    reply = rig.answer("R0", 2, rig.tally.request())
    with pytest.raises(SiteFault, match="in the name of site 2"):
        rig.tally.add_hello(3, reply)


def test_shares_from_outside_the_cohort():
    rig = make_rig(5, gone={5: "R0"})
    other = make_rig(5)
    rig.run_to("R1")
    other.run_to("R2")
    with pytest.raises(SiteFault, match="site 5: it is not in the cohort"):
        rig.tally.add_shares(5, other.said["R1"][5])


def test_envelopes_for_others_than_the_neighbours():
    rig = make_rig(5)
    messages = rig.run_to("R1")
    shares = wire.decode_shares(rig.answer("R1", 2, messages[2]))
    for wrong in (shares.sealed[1:], (*shares.sealed, shares.sealed[0]._replace(holder=9))):
        with pytest.raises(SiteFault, match="site 2: its envelopes"):
            rig.tally.add_shares(2, wire.encode_shares(shares._replace(sealed=wrong)))


def signed_header(rig: Rig, site: int, vector: Words) -> bytes:
    """A header that a site with its own key can sign for any vector."""
    hashed = hashlib.sha256(vector.data).digest()
    fields = (rig.tally._cohort.session, rig.tally._u2_hash, site.to_bytes(4, "big"), hashed)
    return wire.encode_header(wire.Header(site, hashed, sign(identity(site), "R2", *fields)))


def test_an_input_of_a_site_that_left_before():
    rig = make_rig(5, gone={5: "R1"})
    rig.run_to("R2")
    vector = np.zeros(10, dtype=np.uint32)
    with pytest.raises(SiteFault, match="site 5: it is not in U2"):
        rig.tally.add_masked(5, signed_header(rig, 5, vector), vector)


def test_a_signed_input_of_another_shape():
    rig = make_rig(5)
    rig.run_to("R2")
    for vector in (np.zeros(1, dtype=np.uint32), np.zeros(10, dtype=np.uint16)):
        with pytest.raises(SiteFault, match="site 2: its input is not 10"):
            rig.tally.add_masked(2, signed_header(rig, 2, vector), vector)


def test_votes_and_shares_of_a_site_that_is_not_in_the_sum():
    rig = make_rig(5, gone={5: "R2"})
    messages = rig.run_to("R3")
    outcome = rig.tally._frozen
    vote = wire.Vote(5, sign(identity(5), "R3", outcome.session, outcome.survivors_hash))
    with pytest.raises(SiteFault, match="site 5: it is not in U3"):
        rig.tally.add_consistency(5, wire.encode_vote(vote))
    rig.exchange("R3", messages)
    messages = rig.tally.close_consistency()
    released = wire.decode_released(rig.answer("R4", 2, messages[2]))
    with pytest.raises(SiteFault, match="site 5: it is not in U3"):
        rig.tally.add_unmask(5, wire.encode_released(released._replace(site=5)))
    fewer = released._replace(shares=released.shares[1:])
    with pytest.raises(SiteFault, match="site 2: its shares are not one of each"):
        rig.tally.add_unmask(2, wire.encode_released(fewer))


def test_exchanges_are_closed_in_order_and_once():
    rig = make_rig(4)
    tally = rig.tally
    closes = (tally.close_hellos, tally.close_shares, tally.close_masked, tally.close_consistency)
    closings = (*closes, tally.result)
    messages = dict.fromkeys(rig.sites, tally.request())
    for place, stage in enumerate(("R0", "R1", "R2", "R3", "R4")):
        for other, close in enumerate(closings):
            if other != place:
                with pytest.raises(ProtocolError, match="not open"):
                    close()
        rig.exchange(stage, messages)
        if stage != "R4":
            messages = closes[place]()
    assert np.array_equal(tally.result().words, rig.plain_sum(rig.sites))


def test_answers_that_come_before_their_exchange():
    done, early = make_rig(4), make_rig(4)
    done.run()
    for stage in ("R1", "R2", "R3", "R4"):
        early.vectors = done.vectors
        with pytest.raises(ProtocolError):
            early.add(stage, 2, done.said[stage][2])


def test_a_strided_input():
    rig = make_rig(5)
    messages = rig.run_to("R2")
    header = rig.answer("R2", 2, messages[2])
    with pytest.raises(ProtocolError, match="contiguous"):
        rig.tally.add_masked(2, header, np.repeat(rig.vectors[2], 2)[::2])


def test_a_dropped_site_whose_secret_nobody_can_give_back(monkeypatch):
    """On the ring every survivor may have holders enough while one that dropped has not.

    Found out before any share is released: the sum could not be unmasked.
    """
    need = Thresholds(quorum=7, neighbours=6, threshold=4)
    monkeypatch.setattr(cohort_module, "thresholds", lambda *_: need)
    rig = make_rig(13)
    messages = rig.run_to("R2")
    order = rig.tally._cohort.graph._order
    dead = {order[place] for place in (5 - 3, 5, 5 + 1, 5 + 3)}
    rig.exchange("R2", {s: m for s, m in messages.items() if s not in dead})
    with pytest.raises(ProtocolError, match=f"3 holders of site {order[5]}'s shares"):
        rig.tally.close_masked()


def test_one_key_for_both_purposes():
    rig = make_rig(4)
    hello = wire.decode_hello(rig.answer("R0", 2, rig.tally.request()))
    same = hello._replace(mask_key=hello.envelope_key)
    fields = cohort_module.hello_fields(rig.tally.request(), same)
    same = same._replace(signature=sign(identity(2), "R0", *fields))
    with pytest.raises(SiteFault, match="site 2: one of its keys"):
        rig.tally.add_hello(2, wire.encode_hello(same))


def resigned(rig: Rig, stage: str) -> bytes:
    """Another message of site 2 than the one it sent, as valid as it can make it."""
    if stage == "R0":
        hello = wire.decode_hello(rig.said["R0"][2])._replace(nonce=bytes(32))
        fields = cohort_module.hello_fields(rig.tally.request(), hello)
        return wire.encode_hello(hello._replace(signature=sign(identity(2), "R0", *fields)))
    if stage == "R1":
        shares = wire.decode_shares(rig.said["R1"][2])
        return wire.encode_shares(shares._replace(key_share_commitment=bytes(32)))
    if stage == "R3":
        return wire.encode_vote(wire.Vote(2, bytes(64)))
    released = wire.decode_released(rig.said["R4"][2])
    return wire.encode_released(released._replace(shares=((1, bytes(33)), *released.shares[1:])))


@pytest.mark.parametrize("stage", ["R0", "R1", "R3", "R4"])
def test_a_second_message_in_any_exchange(stage):
    rig = make_rig(4)
    rig.exchange(stage, rig.run_to(stage))
    with pytest.raises(SiteFault, match=f"site 2: it sent two different messages in {stage}"):
        rig.add(stage, 2, resigned(rig, stage))


@pytest.mark.parametrize("limit", [4, 3])
def test_signatures_of_envelopes_are_checked_up_to_the_limit(monkeypatch, limit):
    """At as many sites as the limit a bad one is named before any holder sees it; above, later."""
    monkeypatch.setattr(tally_module, "COMPLETE_UP_TO", limit)
    rig = make_rig(4)
    messages = rig.run_to("R1")
    shares = wire.decode_shares(rig.answer("R1", 2, messages[2]))
    bad = (shares.sealed[0]._replace(signature=bytes(64)), *shares.sealed[1:])
    message = wire.encode_shares(shares._replace(sealed=bad))
    if limit == 4:
        with pytest.raises(SiteFault, match="site 2: its R1 signature"):
            rig.tally.add_shares(2, message)
    else:
        rig.tally.add_shares(2, message)


def test_too_few_holders_of_a_survivor_s_shares_end_the_session_before_anybody_masks(monkeypatch):
    need = Thresholds(quorum=7, neighbours=6, threshold=4)
    monkeypatch.setattr(cohort_module, "thresholds", lambda *_: need)
    rig = make_rig(13)
    messages = rig.run_to("R1")
    order = rig.tally._cohort.graph._order
    dead = {order[place] for place in (1, 2, 3)}  # half the neighbours of the first
    rig.exchange("R1", {s: m for s, m in messages.items() if s not in dead})
    assert rig.tally.close_shares(), "control: four of seven holders are enough"
    again = make_rig(13)
    messages = again.run_to("R1")
    order = again.tally._cohort.graph._order
    dead = {order[place] for place in (1, 2, 3, -1)}
    again.exchange("R1", {s: m for s, m in messages.items() if s not in dead})
    with pytest.raises(ProtocolError, match="U2 has 3 holders"):
        again.tally.close_shares()


def test_a_forged_hello_costs_the_forger_alone():
    rig = make_rig(4)
    hello = wire.decode_hello(rig.answer("R0", 2, rig.tally.request()))
    with pytest.raises(SiteFault, match="site 2: its R0 signature"):
        rig.tally.add_hello(2, wire.encode_hello(hello._replace(signature=bytes(64))))
    rig.exchange("R0", dict.fromkeys((1, 3, 4), rig.tally.request()))
    assert sorted(rig.tally.close_hellos()) == [1, 3, 4]


def signed_hello(rig: Rig, hello: wire.Hello) -> bytes:
    """A hello with the true signature of the site in whose name it speaks."""
    fields = cohort_module.hello_fields(rig.tally.request(), hello)
    return wire.encode_hello(hello._replace(signature=sign(identity(hello.site), "R0", *fields)))


@pytest.mark.parametrize("purpose", ["envelope_key", "mask_key"])
def test_a_key_that_another_site_has_or_that_everybody_can_use(purpose):
    rig = make_rig(4)
    honest = wire.decode_hello(rig.answer("R0", 2, rig.tally.request()))
    for copied in (honest.envelope_key, honest.mask_key):
        other = make_rig(4)
        other.add("R0", 2, signed_hello(other, honest))
        hello = wire.decode_hello(other.answer("R0", 3, other.tally.request()))
        change: dict[str, Any] = {purpose: copied}
        with pytest.raises(SiteFault, match="site 3: one of its keys is in the cohort"):
            other.tally.add_hello(3, signed_hello(other, hello._replace(**change)))
    change = {purpose: bytes(32)}
    low = honest._replace(**change)
    with pytest.raises(SiteFault, match="site 2: its key is of low order"):
        rig.tally.add_hello(2, signed_hello(rig, low))


def test_a_site_too_many_for_the_grid():
    rig = make_rig(5, grid=Grid(clip=1.0, sites=4, word_bits=32))
    replies = {site: rig.answer("R0", site, rig.tally.request()) for site in rig.sites}
    for site in (1, 2, 3, 4):
        rig.add("R0", site, replies[site])
    with pytest.raises(ProtocolError, match="full with 4 sites"):
        rig.add("R0", 5, replies[5])
    assert sorted(rig.tally.close_hellos()) == [1, 2, 3, 4]


def test_forged_headers_and_votes():
    rig = make_rig(4)
    messages = rig.run_to("R2")
    header = wire.decode_header(rig.answer("R2", 2, messages[2]))
    with pytest.raises(SiteFault, match="site 2: its R2 signature"):
        rig.add("R2", 2, wire.encode_header(header._replace(signature=bytes(64))))
    for site in rig.sites:
        rig.add("R2", site, rig.answer("R2", site, messages[site]))
    rig.tally.close_masked()
    with pytest.raises(SiteFault, match="site 2: its R3 signature"):
        rig.add("R3", 2, wire.encode_vote(wire.Vote(2, bytes(64))))


def test_answers_that_come_after_their_exchange():
    rig = make_rig(5, gone={5: "R4"})
    closes = (
        rig.tally.close_hellos,
        rig.tally.close_shares,
        rig.tally.close_masked,
        rig.tally.close_consistency,
    )
    messages = dict.fromkeys(rig.sites, rig.tally.request())
    for stage, close in zip(("R0", "R1", "R2", "R3"), closes, strict=True):
        rig.exchange(stage, messages)
        messages = close()
        with pytest.raises(ProtocolError, match=f"{stage} is not open"):
            rig.add(stage, 2, rig.said[stage][2])
    rig.exchange("R4", messages)
    late = rig.answer("R4", 5, messages[5])
    before, _, after = rig.tally.complete, rig.tally.result(), rig.tally.complete
    assert (before, after) == (True, False)
    with pytest.raises(ProtocolError, match="R4 is not open"):
        rig.add("R4", 5, late)


def test_the_sum_is_not_complete_before_its_shares_are_asked_for():
    rig = make_rig(4)
    messages = dict.fromkeys(rig.sites, rig.tally.request())
    assert not rig.tally.complete
    rig.exchange("R0", messages)
    rig.exchange("R1", rig.tally.close_hellos())
    assert not rig.tally.complete


def test_two_sites_that_drop_out_together():
    """The mask between them stands in nobody's input and must not be taken out of the sum."""
    rig = make_rig(7, gone={2: "R2", 5: "R2"})
    assert np.array_equal(rig.run().words, rig.plain_sum((1, 3, 4, 6, 7)))


def test_a_shared_number_that_is_no_secret_of_32_bytes(monkeypatch):
    rig = make_rig(4)
    split, count = shamir.split, iter(range(8))

    def lying(secret: bytes, *, holders: int, **options: Any) -> list[bytes]:
        if next(count) == 2:  # site 2 is the second dealer; it shares its seed first
            return [(2**256 + 7).to_bytes(33, "big")] * holders
        return split(secret, holders=holders, **options)

    monkeypatch.setattr(shamir, "split", lying)
    with pytest.raises(SiteFault, match="site 2: its shares do not lie on one polynomial"):
        rig.run()


def test_the_published_sum_cannot_be_changed():
    rig = make_rig(4)
    words = rig.run().words
    with pytest.raises(ValueError, match="read-only"):
        words[0] = 0
