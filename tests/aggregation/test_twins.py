"""Every check has a twin: the same attack fails with the check and succeeds without it.

A twin is the real function less one condition, compiled again from its source. Attacks whose twin
needs more than that stand beside their tests in ``test_attacks_*.py``, ``test_session.py`` and
``test_complaints.py``; ``docs/secagg.md``, §12, lists all of them.
"""

import dataclasses
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from fedward.aggregation import cohort, envelopes, fixed_point, shamir, site_session, wire
from fedward.aggregation.cohort import Cohort, PinnedKeys
from fedward.aggregation.fixed_point import Grid, encode
from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.site_session import SiteSession
from fedward.aggregation.tally import Tally
from fedward.aggregation.transcript import SiteFault, pair_mask_key, sign
from fedward.attempt import Attempt
from fedward.errors import CohortTooSmall, ProtocolError
from fedward.privacy.noise import SecureStream
from tests import conftest
from tests.aggregation.attacker import VICTIM, deliver, state
from tests.aggregation.rig import Rig, identity, make_rig, make_roster
from tests.aggregation.test_attacks_cohort import LOW_ORDER, hellos_of, impostor
from tests.aggregation.test_attacks_inputs import alone, dealer_sends, envelopes_of
from tests.aggregation.test_attacks_survivors import another_set, headers_of, votes_of

Attack = Callable[[], bool]


def without(
    patch: pytest.MonkeyPatch, owner: Any, name: str, check: str, instead: str = "False"
) -> None:
    """Compile a function or method again with one expression of its source replaced."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(check) == 1, f"{name} has not one {check!r}: the twin tests nothing"
    scope = dict(vars(sys.modules[function.__module__]))
    found: dict[str, Any] = {}
    exec(source.replace(check, instead), scope, found)  # noqa: S102  # our own source, less a check
    patch.setattr(owner, name, found[name])


def answers(rig: Rig, stage: str, message: bytes, site: int = VICTIM) -> bool:
    """Whether the site goes on after this message."""
    try:
        deliver(rig, stage, message, site)
    except ProtocolError:
        return False
    return True


# R0 and R1: parameters and cohort.


def old_roster() -> bool:
    """A site that has pinned a newer roster enters a session of the one before."""
    rig = make_rig(4)
    rig.sessions[VICTIM] = rig.session(VICTIM, roster=make_roster((1, 2, 3), epoch=2))
    return answers(rig, "R0", rig.tally.request())


def other_parameters() -> bool:
    """The victim signs parameters that it does not derive itself."""
    rig = make_rig(5, minimum=4, colluders=1)
    other = dataclasses.replace(rig.parameters, minimum=3)
    return answers(rig, "R0", other.to_bytes())


def replayed_attempt() -> bool:
    rig = make_rig(4)
    rig.memories[VICTIM].begin(Attempt(run="run", round=1))
    return answers(rig, "R0", rig.tally.request())


def no_limits() -> bool:
    rig = make_rig(4)
    limits = dataclasses.replace(rig.limits, minimum=4)
    rig.sessions[VICTIM] = rig.session(VICTIM, limits=limits)
    return answers(rig, "R0", rig.tally.request())


def shown(change: Callable[[Rig, dict[int, wire.Hello]], object], **options: Any) -> bool:
    rig = make_rig(4, **options)
    hellos = hellos_of(rig)
    change(rig, hellos)
    return answers(rig, "R1", wire.encode_hellos(hellos[site] for site in sorted(hellos)))


def impostor_for_the_victim() -> bool:
    return shown(lambda r, h: h.update({VICTIM: impostor(r, VICTIM, identity(VICTIM))}))


def substituted_keys() -> bool:
    return shown(lambda r, h: h.update({2: impostor(r, 2, identity("nobody"))}))


def hello_of_another_site() -> bool:
    def change(_: Rig, hellos: dict[int, wire.Hello]) -> None:
        hellos[3] = hellos.pop(2)._replace(site=3)

    return shown(change)


def hellos_of_another_run() -> bool:
    other = hellos_of(make_rig(4, attempt=Attempt(run="other", round=1)))
    return shown(lambda _, h: h.update({s: other[s] for s in (2, 3, 4)}))


def stranger() -> bool:
    wide = Grid(clip=1.0, sites=8, word_bits=32)
    return shown(lambda r, h: h.update({9: impostor(r, 9, identity(9))}), grid=wide)


def copied_keys() -> bool:
    def change(rig: Rig, hellos: dict[int, wire.Hello]) -> None:
        copied = hellos[2]._replace(site=3)
        fields = cohort.hello_fields(rig.tally.request(), copied)
        hellos[3] = copied._replace(signature=sign(identity(3), "R0", *fields))

    return shown(change)


def small_cohort() -> bool:
    return shown(lambda _, h: h.pop(4), minimum=4)


def crowd() -> bool:
    rig = make_rig(5, grid=Grid(clip=1.0, sites=4, word_bits=32))
    hellos = [wire.decode_hello(rig.answer("R0", s, rig.tally.request())) for s in rig.sites]
    return answers(rig, "R1", wire.encode_hellos(hellos))


# R2: envelopes, U2 and inputs.


def dead_in_u2() -> bool:
    rig = make_rig(5)
    u2, found = envelopes_of(rig)
    return answers(rig, "R2", wire.encode_envelopes([s for s in u2 if s != VICTIM], found))


def late_joiner() -> bool:
    rig = make_rig(5)
    u2, found = envelopes_of(rig)
    return answers(rig, "R2", wire.encode_envelopes([*u2, 99], found))


def shrunk_u2() -> bool:
    rig = make_rig(5, minimum=4)
    return answers(rig, "R2", alone(rig, (2, 3)))


def missing_envelope() -> bool:
    rig = make_rig(4)
    u2, found = envelopes_of(rig)
    return answers(rig, "R2", wire.encode_envelopes(u2, found[1:]))


def other_point() -> bool:
    rig = make_rig(4)
    return answers(rig, "R2", dealer_sends(rig, lambda e: (e, 2)))


def other_seed_commitment() -> bool:
    rig = make_rig(4)
    u2, (first, *rest) = envelopes_of(rig)
    changed = first._replace(seed_commitment=bytes(32))
    return answers(rig, "R2", wire.encode_envelopes(u2, [changed, *rest]))


def framed_holder() -> bool:
    """A dealer commits to another share than it seals: later the honest holder is the liar."""
    rig = make_rig(4)
    messages = rig.run_to("R2")
    rig.run_to = lambda _: messages  # type: ignore[assignment, method-assign]  # it has run so far
    lie = dealer_sends(rig, lambda e: (e._replace(seed_share_commitment=bytes(32)), 1))
    entry = rig.tally._sealed[2][VICTIM]
    rig.tally._sealed[2][VICTIM] = entry._replace(seed_share_commitment=bytes(32))
    try:
        rig.exchange("R2", {**messages, VICTIM: lie})
        rig.exchange("R3", rig.tally.close_masked())
        rig.exchange("R4", rig.tally.close_consistency())
    except SiteFault as fault:
        return fault.site == VICTIM
    return False


def short_input() -> bool:
    rig = make_rig(4)
    message = rig.run_to("R2")[VICTIM]
    try:
        rig.sessions[VICTIM].masked(message, np.zeros(9, dtype=np.uint32))
    except ProtocolError:
        return False
    return True


# R3 and R4: survivors and certificate.


def survivors(change: Callable[[list[wire.Header]], Iterable[wire.Header]]) -> bool:
    rig = make_rig(5, minimum=4)
    return answers(rig, "R3", wire.encode_survivors(change(headers_of(rig))))


def dead_in_u3() -> bool:
    return survivors(lambda headers: headers[1:])


def other_input() -> bool:
    return survivors(lambda h: [h[0]._replace(input_hash=bytes(32)), *h[1:]])


def forged_header() -> bool:
    return survivors(lambda h: [*h[:4], h[4]._replace(input_hash=bytes(32))])


def shrunk_u3() -> bool:
    return survivors(lambda headers: headers[:3])


def second_survivor_set() -> bool:
    rig = make_rig(7)
    headers = headers_of(rig)
    rig.memories[VICTIM].remember_signed(another_set(rig))
    return answers(rig, "R3", wire.encode_survivors(headers))


def certificate(change: Callable[[list[wire.Vote]], Iterable[wire.Vote]]) -> bool:
    """Whether the victim releases its shares."""
    rig = make_rig(7, colluders=2, minimum=4)
    return answers(rig, "R4", wire.encode_certificate(change(votes_of(rig))))


def few_votes() -> bool:
    return certificate(lambda votes: votes[:4])


def vote_twice() -> bool:
    return certificate(lambda votes: [*votes[:4], votes[3]])


def forged_vote() -> bool:
    return certificate(lambda v: [*v[:6], v[6]._replace(signature=bytes(64))])


def outsider_s_vote() -> bool:
    rig = make_rig(5, gone={5: "R2"})
    rig.exchange("R3", rig.run_to("R3"))
    votes = [wire.decode_vote(rig.said["R3"][site]) for site in (1, 2, 3, 4)]
    outcome = rig.tally._frozen
    outside = wire.Vote(5, sign(identity(5), "R3", outcome.session, outcome.survivors_hash))
    return answers(rig, "R4", wire.encode_certificate([*votes, outside]))


# Malicious sites: whether the sum comes out wrong, or an honest site is blamed for it.


def wrong_end(rig: Rig, messages: dict[int, bytes], stage: str, liar: int) -> bool:
    try:
        for name, close in (
            ("R2", rig.tally.close_masked),
            ("R3", rig.tally.close_consistency),
            ("R4", dict),
        ):
            if name >= stage:
                there = {s: m for s, m in messages.items() if s != liar or name > stage}
                rig.exchange(name, there)
                messages = close()
        result = rig.tally.result().words
    except SiteFault as fault:
        return fault.site != liar
    except CohortTooSmall:
        return False
    return not np.array_equal(result, rig.plain_sum(rig.tally._frozen.survivors))


def false_share() -> bool:
    rig = make_rig(4)
    messages = rig.run_to("R4")
    released = wire.decode_released(rig.answer("R4", 2, messages[2]))
    lie = released._replace(shares=((1, bytes(33)), *released.shares[1:]))
    try:
        rig.tally.add_unmask(2, wire.encode_released(lie))
    except SiteFault:
        return False
    return wrong_end(rig, messages, "R4", 2)


def changed_upload() -> bool:
    rig = make_rig(4)
    messages = rig.run_to("R2")
    header = rig.answer("R2", 2, messages[2])
    try:
        rig.tally.add_masked(2, header, rig.vectors[2] + np.uint32(1))
    except SiteFault:
        return False
    return wrong_end(rig, messages, "R2", 2)


def second_upload() -> bool:
    rig = make_rig(4)
    messages = rig.run_to("R2")
    header = rig.answer("R2", 2, messages[2])
    rig.add("R2", 2, header)
    other = np.ones(10, dtype=np.uint32)
    hashed = hashlib.sha256(other.data).digest()
    bound = (rig.tally._cohort.session, rig.tally._u2_hash, (2).to_bytes(4, "big"), hashed)
    again = wire.encode_header(wire.Header(2, hashed, sign(identity(2), "R2", *bound)))
    try:
        rig.tally.add_masked(2, again, other)
    except SiteFault:
        return False
    return True


def speaks_for_another() -> bool:
    rig = make_rig(4)
    reply = rig.answer("R0", 2, rig.tally.request())
    try:
        rig.tally.add_hello(3, reply)
    except SiteFault:
        return False
    return True


def not_a_number() -> bool:
    grid = Grid(clip=1.0, sites=4, word_bits=32)
    try:
        with np.errstate(invalid="ignore"):
            encode(np.array([np.nan, np.inf]), grid, SecureStream())
    except ProtocolError:
        return False
    return True


SIGNED = (PinnedKeys, "verify", "verify(site, self._keys[site], signature, stage, *fields)", "None")

TWINS: dict[str, tuple[Attack, Any, str, str, str]] = {
    "other parameters": (
        other_parameters,
        SiteSession,
        "_greet",
        "parameters != self._parameters",
        "False",
    ),
    "old roster": (
        old_roster,
        SiteSession,
        "_greet",
        "expected.roster_hash != self._roster.hash()",
        "False",
    ),
    "the site's limits": (
        no_limits,
        SiteSession,
        "_greet",
        "self._limits.check(expected, self._roster)",
        "None",
    ),
    "replayed attempt": (
        replayed_attempt,
        SiteSession,
        "_greet",
        "newest is not None and expected.attempt.order <= newest",
        "False",
    ),
    "impostor for the victim": (
        impostor_for_the_victim,
        SiteSession,
        "_share",
        "state.hello not in hellos",
        "False",
    ),
    "substituted keys": (substituted_keys, *SIGNED),
    "hello of another site": (hello_of_another_site, *SIGNED),
    "hellos of another run": (hellos_of_another_run, *SIGNED),
    "stranger": (
        stranger,
        PinnedKeys,
        "verify",
        'raise SiteFault(site, "it is not in the pinned roster")',
        "return",
    ),
    "copied keys": (copied_keys, cohort, "form_cohort", "len(set(keys)) != len(keys)", "False"),
    "small cohort": (
        small_cohort,
        cohort,
        "form_cohort",
        "len(members) < parameters.minimum",
        "False",
    ),
    "crowd": (crowd, cohort, "form_cohort", "len(members) > parameters.grid.sites", "False"),
    "dead in U2": (dead_in_u2, SiteSession, "_check_present", "self._site not in sites", "False"),
    "late joiner": (
        late_joiner,
        SiteSession,
        "_check_present",
        "not sites <= set(before)",
        "False",
    ),
    "shrunk U2": (shrunk_u2, Cohort, "check_enough", "len(sites) < self.minimum", "False"),
    "missing envelope": (
        missing_envelope,
        SiteSession,
        "_mask",
        "[envelope.dealer for envelope in envelopes] != near",
        "False",
    ),
    "other point": (other_point, *SIGNED),
    "other seed commitment": (other_seed_commitment, *SIGNED),
    "framed holder": (
        framed_holder,
        envelopes,
        "open_envelope",
        "commit(session, dealer, holder, shares) == commitments",
        "True",
    ),
    "short input": (
        short_input,
        SiteSession,
        "_mask",
        "words.shape != (self._expected.words,) or words.dtype != self._expected.grid.dtype",
        "False",
    ),
    "dead in U3": (dead_in_u3, SiteSession, "_check_present", "self._site not in sites", "False"),
    "other input": (other_input, SiteSession, "_vote", "state.header not in headers", "False"),
    "forged header": (forged_header, *SIGNED),
    "shrunk U3": (shrunk_u3, Cohort, "check_enough", "len(sites) < self.minimum", "False"),
    "second survivor set": (
        second_survivor_set,
        SiteSession,
        "_vote",
        "self._memory.signed(sid) not in (None, u3_hash)",
        "False",
    ),
    "few votes": (few_votes, SiteSession, "_release", "len(votes) < cohort.need.quorum", "False"),
    "vote twice": (
        vote_twice,
        wire,
        "_rows",
        "any(one[0] >= two[0] for one, two in itertools.pairwise(rows))",
        "False",
    ),
    "forged vote": (forged_vote, *SIGNED),
    "outsider's vote": (
        outsider_s_vote,
        SiteSession,
        "_release",
        "vote.site not in survivors",
        "False",
    ),
    "false share": (
        false_share,
        Tally,
        "add_unmask",
        "found != self._commitment(dealer, site)",
        "False",
    ),
    "changed upload": (
        changed_upload,
        Tally,
        "add_masked",
        "hashlib.sha256(vector.data).digest() != header.input_hash",
        "False",
    ),
    "second upload": (
        second_upload,
        Tally,
        "_is_new",
        "before is not None and before != digest(message)",
        "False",
    ),
    "speaks for another": (speaks_for_another, Tally, "_is_new", "named != site", "False"),
    "not a number": (not_a_number, fixed_point, "encode", "not np.isfinite(piece).all()", "False"),
}


SECOND_WALL: dict[str, tuple[Any, str, str, str]] = {
    "dead in U3": (SiteSession, "_vote", "state.header not in headers", "False"),
    "other input": SIGNED,
    "speaks for another": SIGNED,
}
"""Another check that would stop the same attack."""


@pytest.mark.parametrize("case", TWINS)
def test_the_attack_fails(case):
    assert not TWINS[case][0]()


@pytest.mark.parametrize("case", TWINS)
def test_twin(case, monkeypatch):
    """Without the check the site goes on, releases its shares, or the sum comes out wrong."""
    attack, *change = TWINS[case]
    without(monkeypatch, *change)
    if case in SECOND_WALL:
        assert not attack(), "stopped all the same"
        without(monkeypatch, *SECOND_WALL[case])
    if attack is not_a_number:  # imported by name
        monkeypatch.setattr(sys.modules[__name__], "encode", fixed_point.encode)
    if attack in (copied_keys, small_cohort, crowd):
        monkeypatch.setattr(site_session, "form_cohort", cohort.form_cohort)
    assert attack()


# Twins of more than one place.


def task_of_its_own() -> bool:
    """The victim alone was handed another model, and its update is in the sum all the same."""
    rig = make_rig(4)
    other = dataclasses.replace(rig.parameters, task_hash=bytes([1]) * 32)
    rig.sessions[VICTIM] = rig.session(VICTIM, expected=other)
    try:
        rig.answer("R0", VICTIM, other.to_bytes())
        messages = dict.fromkeys(rig.sites[1:], rig.tally.request())
        rig.exchange("R0", messages)
        rig.add("R0", VICTIM, rig.said["R0"][VICTIM])
        for stage, close in (
            ("R1", rig.tally.close_hellos),
            ("R2", rig.tally.close_shares),
            ("R3", rig.tally.close_masked),
            ("R4", rig.tally.close_consistency),
        ):
            rig.exchange(stage, close())
    except ProtocolError:
        return False
    return VICTIM in rig.tally.result().cohort


def test_a_site_with_a_model_of_its_own_is_in_no_sum():
    assert not task_of_its_own()


def test_twin_parameters_without_the_task(monkeypatch):
    fields = SessionParameters.fields

    def forgetful(self: SessionParameters) -> dict[str, Any]:
        return {**fields(self), "task_hash": ""}

    monkeypatch.setattr(SessionParameters, "fields", forgetful)
    assert task_of_its_own()


def two_cohorts() -> bool:
    """Only the victim was shown that site 5 dealt shares: whether a sum comes out, a wrong one."""
    rig = make_rig(5, gone={5: "R2"})
    messages = rig.run_to("R2")
    for site in (2, 3, 4):
        u2, found = wire.decode_envelopes(messages[site])
        kept = [envelope for envelope in found if envelope.dealer != 5]
        messages[site] = wire.encode_envelopes(u2[:4], kept)
    try:
        rig.exchange("R2", messages)
        return wrong_end(rig, rig.tally.close_masked(), "R3", 0)
    except SiteFault:
        return False


def test_two_cohorts_never_meet():
    assert not two_cohorts()


def test_twin_headers_and_masks_without_u2(monkeypatch):
    for module in ("site_session", "tally"):
        monkeypatch.setattr(f"fedward.aggregation.{module}.cohort_hash", lambda *_: bytes(32))
    assert two_cohorts()


def test_twin_a_key_of_low_order_makes_a_mask_that_everybody_knows(monkeypatch):
    """``cryptography`` refuses such a key; without that the coordinator knows the mask."""
    honest = envelopes.agree

    def lax(private: Any, other: int, public: bytes) -> bytes:
        return bytes(32) if public == LOW_ORDER else honest(private, other, public)

    for module in ("site_session", "envelopes", "tally"):
        monkeypatch.setattr(f"fedward.aggregation.{module}.agree", lax)
    rig = make_rig(4)
    corrupt = rig.sessions[2]
    hello = wire.decode_hello(rig.answer("R0", 2, rig.tally.request()))
    hello = hello._replace(mask_key=LOW_ORDER)
    fields = cohort.hello_fields(rig.tally.request(), hello)
    hello = hello._replace(signature=sign(identity(2), "R0", *fields))
    corrupt._state = dataclasses.replace(state(rig, 2), hello=hello)
    rig.add("R0", 2, wire.encode_hello(hello))
    rig.exchange("R0", dict.fromkeys((1, 3, 4), rig.tally.request()))
    rig.exchange("R1", rig.tally.close_hellos())
    rig.answer("R2", VICTIM, rig.tally.close_shares()[VICTIM])
    known = pair_mask_key(bytes(32), rig.tally._cohort.session, VICTIM, 2, rig.tally._u2_hash)
    assert (known, "+") in conftest.USED


def lie_about_the_seed(monkeypatch: pytest.MonkeyPatch) -> Rig:
    """Site 2 deals site 3 a share that lies on no polynomial with the others, and commits to it."""
    split, calls = shamir.split, list[bytes]()

    def lying(secret: bytes, **options: Any) -> list[bytes]:
        shares = split(secret, **options)
        calls.append(secret)
        if len(calls) == 3:  # each dealer shares its seed, then its key; site 2 is the second
            shares[2] = bytes(33)
        return shares

    monkeypatch.setattr(shamir, "split", lying)
    return make_rig(4)


def test_shares_on_no_polynomial_name_the_dealer(monkeypatch):
    with pytest.raises(SiteFault, match="site 2: it shared something else"):
        lie_about_the_seed(monkeypatch).run()


def test_twin_without_the_seed_s_commitment(monkeypatch):
    """The sum comes out, and it is wrong."""
    without(monkeypatch, Tally, "_join", "not holds")
    rig = lie_about_the_seed(monkeypatch)
    assert not np.array_equal(rig.run().words, rig.plain_sum(rig.sites))
