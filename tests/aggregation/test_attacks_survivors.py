"""A malicious coordinator in R3 and R4: survivor sets, certificates, order (§8, §9).

Each attack ends in an abort or in the unmodified sum, never in more. Where the check that stops it
can be taken out, a twin test does so and shows that the attack then reads the victim's input.
"""

import copy

import numpy as np
import pytest

from fedward.aggregation import cohort as cohort_module
from fedward.aggregation import shamir, wire
from fedward.aggregation.graph import Thresholds
from fedward.aggregation.masks import Words
from fedward.aggregation.session_memory import VolatileMemory
from fedward.aggregation.site_session import SiteSession
from fedward.aggregation.transcript import (
    Outcome,
    SiteFault,
    share_commitment,
    sign,
)
from fedward.attempt import Attempt
from fedward.errors import ProtocolError
from tests.aggregation.attacker import VICTIM, deliver, open_input, refused, state
from tests.aggregation.rig import Rig, identity, make_rig


def another_set(rig: Rig) -> Outcome:
    """A survivor set of the session that is not the one to come."""
    session = rig.tally._cohort.session
    return Outcome(session=session, survivors=(1, 2, 3, 4, 5), survivors_hash=bytes(32))


def headers_of(rig: Rig) -> list[wire.Header]:
    rig.exchange("R2", rig.run_to("R2"))
    return [wire.decode_header(rig.said["R2"][site]) for site in rig.sites]


def test_the_victim_is_declared_dead_in_u3():
    rig = make_rig(5)
    refused(rig, "R3", wire.encode_survivors(headers_of(rig)[1:]), match="U3 does not hold")


def test_another_input_under_the_victim_s_name():
    rig = make_rig(5)
    headers = headers_of(rig)
    headers[0] = headers[0]._replace(input_hash=bytes(32))
    refused(rig, "R3", wire.encode_survivors(headers), match="own header")


def test_a_survivor_s_header_is_forged():
    rig = make_rig(5)
    headers = headers_of(rig)
    headers[3] = headers[3]._replace(input_hash=bytes(32))
    refused(rig, "R3", wire.encode_survivors(headers), match="site 4: its R2 signature")


def test_survivors_shrunk_below_the_quorum():
    rig = make_rig(7, colluders=2, minimum=4)
    refused(rig, "R3", wire.encode_survivors(headers_of(rig)[:4]), match="U3 has 4 sites")


def test_a_gap_on_the_ring(monkeypatch):
    """All but one neighbour of the victim are declared dead; the others would be enough."""
    need = Thresholds(quorum=6, neighbours=4, threshold=4)
    monkeypatch.setattr(cohort_module, "thresholds", lambda *_: need)
    rig = make_rig(11)
    headers = headers_of(rig)
    gap = set(rig.tally._cohort.graph.neighbours(VICTIM)[:3])
    shown = wire.encode_survivors(h for h in headers if h.site not in gap)
    refused(rig, "R3", shown, match="U3 has 2 holders of site 1's shares")


def test_a_survivor_set_shown_differently_to_one():
    """The victim alone is told that site 7 is dead: its vote and the others' do not meet."""
    rig = make_rig(7)
    headers = headers_of(rig)
    vote = deliver(rig, "R3", wire.encode_survivors(headers[:6]))
    messages = rig.tally.close_masked()
    with pytest.raises(SiteFault, match="site 1: its R3 signature"):
        rig.tally.add_consistency(VICTIM, vote)
    del messages[VICTIM]
    rig.exchange("R3", messages)
    certificates = rig.tally.close_consistency()
    refused(rig, "R4", certificates[VICTIM], match="site 2: its R3 signature")
    del certificates[VICTIM]
    rig.exchange("R4", certificates)
    assert np.array_equal(rig.tally.result().words, rig.plain_sum(rig.sites))


def test_a_second_survivor_set():
    """Two valid sets, one after the other, would open their difference."""
    rig = make_rig(7)
    headers = headers_of(rig)
    assert deliver(rig, "R3", wire.encode_survivors(headers))
    refused(rig, "R3", wire.encode_survivors(headers[:6]), match="another R3")


def test_a_second_survivor_set_after_a_restart():
    """The process comes back with its memory alone and is asked to sign another set."""
    rig = make_rig(7)
    headers = headers_of(rig)
    rig.memories[VICTIM].remember_signed(another_set(rig))
    refused(rig, "R3", wire.encode_survivors(headers), match="another survivor set")
    rig.sessions[VICTIM] = rig.session(VICTIM)
    refused(rig, "R0", rig.tally.request(), match="not newer")


def votes_for(rig: Rig, sites: tuple[int, ...], headers: list[wire.Header]) -> dict[int, wire.Vote]:
    """The votes of honest sites shown this survivor set, and their answers to a certificate."""
    message = wire.encode_survivors(headers)
    return {site: wire.decode_vote(deliver(rig, "R3", message, site)) for site in sites}


def split_in_two(rig: Rig) -> Words:
    """Honest sites 1-3 and 4-6 are shown different survivor sets; colluder 7 signs both.

    Returns the victim's input as the coordinator reads it.
    """
    headers = headers_of(rig)
    colluder = rig.sessions[7]
    shares = state(rig, 7).shares[VICTIM]
    points = {"b": {7: shares[0]}, "s": {7: shares[1]}}
    for honest in ((1, 2, 3), (4, 5, 6)):
        shown = [headers[s - 1] for s in (*honest, 7)]
        votes = votes_for(rig, honest, shown)
        twin = copy.copy(colluder)
        twin._memory, twin._answers = VolatileMemory(), {}
        votes[7] = wire.decode_vote(twin.consistency(wire.encode_survivors(shown)))
        certificate = wire.encode_certificate(votes[s] for s in sorted(votes))
        for site in honest:
            released = dict(wire.decode_released(deliver(rig, "R4", certificate, site)).shares)
            points["b" if VICTIM in honest else "s"][site] = released[VICTIM]
    cohort = rig.tally._cohort
    seed, key = (
        shamir.join({cohort.graph.point(VICTIM, site): x for site, x in found.items()}, 4)
        for found in (points["b"], points["s"])
    )
    u2, u2_hash = rig.tally._u2, rig.tally._u2_hash
    return open_input(rig, VICTIM, rig.vectors[VICTIM], seed, key, u2, u2_hash)


def test_a_survivor_set_shown_in_two_versions():
    """The coordinator and one of seven sites want both shares of the victim (A3, in two calls)."""
    rig = make_rig(7, colluders=1)
    with pytest.raises(ProtocolError, match="U3 has 4 sites, the session needs 5"):
        split_in_two(rig)
    assert not any(rig.memories[site].released for site in rig.sites)


def test_twin_with_a_majority_in_place_of_the_quorum(monkeypatch):
    """With q = 4 of 7, one colluder signs twice and both certificates hold."""
    weak = Thresholds(quorum=4, neighbours=6, threshold=4)
    monkeypatch.setattr(cohort_module, "thresholds", lambda *_: weak)
    rig = make_rig(7, colluders=1)
    assert np.array_equal(split_in_two(rig), rig.inputs[VICTIM])


def votes_of(rig: Rig) -> list[wire.Vote]:
    messages = rig.run_to("R3")
    rig.exchange("R3", messages)
    return [wire.decode_vote(rig.said["R3"][site]) for site in rig.sites]


def test_a_certificate_below_the_quorum():
    rig = make_rig(7, colluders=2, minimum=4)
    votes = votes_of(rig)
    refused(rig, "R4", wire.encode_certificate(votes[:4]), match="4 signatures, the quorum is 5")
    other = make_rig(7, colluders=2, minimum=4)
    assert deliver(other, "R4", wire.encode_certificate(votes_of(other)[:5]))


def test_one_signature_counts_once():
    rig = make_rig(7, colluders=2, minimum=4)
    votes = votes_of(rig)
    refused(rig, "R4", wire.encode_certificate([*votes[:4], votes[3]]), match="once")


def test_a_forged_signature():
    rig = make_rig(5)
    votes = votes_of(rig)
    votes[2] = votes[2]._replace(signature=bytes(64))
    refused(rig, "R4", wire.encode_certificate(votes), match="site 3: its R3 signature")


def test_a_signature_of_a_site_that_is_not_in_the_sum():
    rig = make_rig(5, gone={5: "R2"})
    rig.exchange("R3", rig.run_to("R3"))
    votes = [wire.decode_vote(rig.said["R3"][s]) for s in (1, 2, 3, 4)]
    outcome = rig.sessions[2].outcome
    assert outcome is not None
    outsider = wire.Vote(5, sign(identity(5), "R3", outcome.session, outcome.survivors_hash))
    refused(rig, "R4", wire.encode_certificate([*votes, outsider]), match="site 5: it signed")


def test_a_certificate_of_another_session():
    rig, other = make_rig(5), make_rig(5, attempt=Attempt(run="other", round=1))
    votes_of(rig)
    refused(rig, "R4", wire.encode_certificate(votes_of(other)), match="R3 signature")


def test_a_second_unmask():
    rig = make_rig(5)
    votes = votes_of(rig)
    first = deliver(rig, "R4", wire.encode_certificate(votes))
    assert deliver(rig, "R4", wire.encode_certificate(votes)) == first
    refused(rig, "R4", wire.encode_certificate(votes[:4]), match="another R4")


def test_never_both_shares_of_one_site():
    """A3: the answer has room for one share of each dealer, chosen by the set that was signed."""
    rig = make_rig(6, gone={6: "R2", 5: "R1"})
    rig.run()
    session = rig.tally._cohort.session
    for site, reply in rig.said["R4"].items():
        released = wire.decode_released(reply).shares
        assert [dealer for dealer, _ in released] == [1, 2, 3, 4, 6]
        for dealer, share in released:
            kind = "hs" if dealer == 6 else "hb"
            assert share_commitment(kind, session, dealer, site, share) == rig.tally._commitment(
                dealer, site
            )


@pytest.mark.parametrize("stage", ["R1", "R2", "R3", "R4"])
def test_messages_out_of_turn(stage):
    honest = make_rig(4)
    honest.run()
    rig = make_rig(4)
    refused(rig, stage, honest.heard[stage][VICTIM], match="cannot take another")
    skipped = make_rig(4)
    skipped.run_to("R1")
    if stage != "R1":
        refused(skipped, stage, honest.heard[stage][VICTIM], match="cannot take another")


# What the coordinator reads when sites can be made to forget, or when one share is enough.


def fork(rig: Rig, site: int, memory: VolatileMemory) -> SiteSession:
    """A second copy of a site's process, as from a snapshot of its machine."""
    twin = copy.copy(rig.sessions[site])
    twin._memory, twin._answers = memory, {}
    return twin


def two_sums(rig: Rig, *, forget: bool) -> Words:
    """Every site but the victim is asked again, from a snapshot, for a sum without the victim."""
    headers = headers_of(rig)
    forks = {
        site: fork(rig, site, VolatileMemory() if forget else rig.memories[site])
        for site in rig.sites[1:]
    }
    found: list[dict[int, bytes]] = []
    for sessions, shown in ((dict(rig.sessions), headers), (forks, headers[1:])):
        message = wire.encode_survivors(shown)
        votes = [sessions[h.site].consistency(message) for h in shown]
        certificate = wire.encode_certificate(map(wire.decode_vote, votes))
        points = {}
        for site in rig.sites[1:]:
            released = wire.decode_released(sessions[site].unmask(certificate))
            point = rig.tally._cohort.graph.point(VICTIM, site)
            points[point] = dict(released.shares)[VICTIM]
        found.append(points)
    seed, key = (shamir.join(points, 4) for points in found)
    u2, u2_hash = rig.tally._u2, rig.tally._u2_hash
    return open_input(rig, VICTIM, rig.vectors[VICTIM], seed, key, u2, u2_hash)


def test_sites_restored_from_a_snapshot_remember_what_they_signed():
    rig = make_rig(7)
    with pytest.raises(ProtocolError, match="signed another survivor set"):
        two_sums(rig, forget=False)


def test_twin_sites_that_forget_what_they_signed():
    rig = make_rig(7)
    assert np.array_equal(two_sums(rig, forget=True), rig.inputs[VICTIM])


def one_colluder_s_shares(rig: Rig, threshold: int) -> Words:
    """What site 7 alone makes of the shares that the victim dealt it."""
    rig.exchange("R2", rig.run_to("R2"))
    seed_share, key_share = state(rig, 7).shares[VICTIM]
    point = rig.tally._cohort.graph.point(VICTIM, 7)
    seed, key = (shamir.join({point: share}, threshold) for share in (seed_share, key_share))
    u2, u2_hash = rig.tally._u2, rig.tally._u2_hash
    return open_input(rig, VICTIM, rig.vectors[VICTIM], seed, key, u2, u2_hash)


def test_one_share_is_worth_nothing():
    """A4: the threshold is computed by the site, so that the coordinator cannot ask for 1."""
    rig = make_rig(7, colluders=1, dimension=50_000)
    try:
        opened = one_colluder_s_shares(rig, 1)
    except ProtocolError:  # a share is a random number: about half are no 32-byte secret
        return
    assert np.mean(opened == rig.inputs[VICTIM]) < 0.01


def test_twin_with_a_threshold_of_one(monkeypatch):
    weak = Thresholds(quorum=5, neighbours=6, threshold=1)
    monkeypatch.setattr(cohort_module, "thresholds", lambda *_: weak)
    rig = make_rig(7, colluders=1)
    assert np.array_equal(one_colluder_s_shares(rig, 1), rig.inputs[VICTIM])
