"""A malicious coordinator in R0 and R1: parameters and cohort (§8, §9).

Each attack ends in an abort or in the unmodified sum, never in more. Where the check that stops it
can be taken out, a twin test does so and shows that the attack then reads the victim's input.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedward.aggregation import cohort as cohort_module
from fedward.aggregation import wire
from fedward.aggregation.cohort import PinnedKeys
from fedward.aggregation.fixed_point import Grid
from fedward.aggregation.masks import Words
from fedward.aggregation.parameters import Limits, SessionParameters
from fedward.aggregation.session_memory import VolatileMemory
from fedward.aggregation.tally import Tally
from fedward.aggregation.transcript import (
    SiteFault,
    sign,
)
from fedward.attempt import Attempt
from fedward.errors import ProtocolError
from fedward.identity import Identity
from tests.aggregation.attacker import VICTIM, refused
from tests.aggregation.rig import Rig, identity, make_rig, make_roster

LOW_ORDER = bytes(32)

CHANGES: dict[str, dict[str, Any]] = {
    "minimum": {"minimum": 3},
    "colluders": {"colluders": 0},
    "task hash": {"task_hash": bytes([1]) * 32},
    "bits": {"grid": Grid(clip=1.0, sites=64, word_bits=32)},
    "gamma": {"grid": Grid(clip=1e-9, sites=5, word_bits=32)},
    "words": {"dimension": 11},
    "word size (modulus)": {"grid": Grid(clip=1.0, sites=5, word_bits=16)},
    "round": {"attempt": Attempt(run="run", round=2)},
    "run": {"attempt": Attempt(run="other", round=1)},
    "dropouts": {"dropouts": 3},
    "noise": {"noise": 1.0},
    "roster": {"roster_hash": bytes(32)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_are_never_taken_from_the_wire(change):
    """Threshold, modulus, grid or task downgraded for one site (A4 breaks Flower so)."""
    rig = make_rig(5, minimum=4, colluders=1)
    other = dataclasses.replace(rig.parameters, **CHANGES[change])
    refused(rig, "R0", other.to_bytes(), match="not what this site derives")
    assert rig.memories[VICTIM].newest("run") is None


@pytest.mark.parametrize("change", CHANGES)
def test_sites_with_different_parameters_never_meet(change):
    """The same attack on a site whose own derivation was fooled: hellos bind H(P)."""
    rig = make_rig(5, minimum=4, colluders=1)
    other = dataclasses.replace(rig.parameters, **CHANGES[change])
    if other.roster_hash == rig.parameters.roster_hash:
        rig.sessions[VICTIM] = rig.session(VICTIM, expected=other)
        fooled = wire.decode_hello(rig.sessions[VICTIM].hello(other.to_bytes()))
        honest = [wire.decode_hello(rig.sessions[s].hello(rig.tally.request())) for s in (2, 3, 4)]
        message = wire.encode_hellos([fooled, *honest])
        refused(rig, "R1", message, match="R0 signature")
        refused(rig, "R1", message, site=2, match="R0 signature")


def coalition(rig: Rig, parameters: SessionParameters, limits: Limits) -> Words:
    """The victim among sites that the coordinator runs; returns what it reads of the victim."""
    rig.sessions[VICTIM] = rig.session(VICTIM, expected=parameters, limits=limits)
    for site in rig.sites[1:]:
        rig.sessions[site] = rig.session(site, expected=parameters)
        rig.inputs[site][:] = 0
    rig.tally = Tally(parameters=parameters, roster=rig.roster)
    return rig.run().words


def test_a_minimum_that_lets_colluders_isolate_a_site():
    """Two colluders and a cohort of three: the sum minus their own inputs is the victim's."""
    weak = make_rig(3, colluders=0, minimum=3)
    with pytest.raises(ProtocolError, match="limits"):
        coalition(weak, weak.parameters, Limits(colluders=2))


def test_twin_without_the_site_s_own_limit():
    weak = make_rig(3, colluders=0, minimum=3)
    read = coalition(weak, weak.parameters, Limits())
    assert np.array_equal(read, weak.inputs[VICTIM])


def test_roster_rollback():
    """The coordinator brings back a roster with a site that was revoked."""
    rig = make_rig(4)
    newer = make_roster((1, 2, 3), epoch=2)
    rig.sessions[VICTIM] = rig.session(VICTIM, roster=newer)
    refused(rig, "R0", rig.tally.request(), match="roster")


@pytest.mark.parametrize("order", [(1, 1, 1), (2, 1, 1), (2, 2, 3)])
def test_replayed_and_concurrent_attempts(order):
    """One instance for each attempt: an older or equal one is refused, also after a restart."""
    memory = VolatileMemory()
    memory.begin(Attempt(run="run", round=2, session=2, attempt=3))
    number, session, attempt = order
    rig = make_rig(3, attempt=Attempt(run="run", round=number, session=session, attempt=attempt))
    rig.sessions[VICTIM] = rig.session(VICTIM, memory=memory)
    refused(rig, "R0", rig.tally.request(), match="not newer")


def test_twin_two_instances_of_one_attempt():
    """Without the memory both instances run, and one input stands in two sums."""
    first, second = make_rig(4, seed=1), make_rig(4, seed=1)
    second.gone = {4: "R2"}
    difference = first.run().words - second.run().words
    assert np.array_equal(difference, first.inputs[4])


def hellos_of(rig: Rig) -> dict[int, wire.Hello]:
    rig.run_to("R1")
    return {site: wire.decode_hello(reply) for site, reply in rig.said["R0"].items()}


def impostor(rig: Rig, site: int, signer: Identity) -> wire.Hello:
    """A hello in a site's name with keys that the coordinator knows."""
    cpk, spk = (X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(2))
    hello = wire.Hello(site, cpk, spk, bytes(32), b"")
    fields = cohort_module.hello_fields(rig.tally.request(), hello)
    return hello._replace(signature=sign(signer, "R0", *fields))


def test_substituted_keys():
    """A5: the coordinator puts itself in the middle."""
    rig = make_rig(4)
    hellos = hellos_of(rig)
    hellos[2] = impostor(rig, 2, Identity())
    refused(rig, "R1", wire.encode_hellos(hellos.values()), match="site 2: its R0 signature")


class Blind(PinnedKeys):
    """Takes every signature."""

    def verify(self, site: int, signature: bytes, stage: str, *fields: bytes) -> None: ...


def everyone_else_is_the_coordinator(rig: Rig) -> Words:
    """Sites 2.. are run by the coordinator under keys of its own; returns the sum it gets."""
    strangers = {site: Identity() for site in rig.sites[1:]}
    for site, key in strangers.items():
        rig.sessions[site] = rig.session(site, identity=key)
        rig.inputs[site][:] = 0
    parties: tuple[Any, ...] = (rig.tally, *(rig.sessions[site] for site in strangers))
    for party in parties:
        party._pinned = Blind(rig.roster)  # on its own side the coordinator checks what it likes
    return rig.run().words


def test_a_cohort_of_impostors():
    rig = make_rig(4)
    with pytest.raises(ProtocolError, match="R0 signature"):
        everyone_else_is_the_coordinator(rig)
    assert rig.sessions[VICTIM].dead


def test_twin_without_signatures(monkeypatch):
    monkeypatch.setattr(PinnedKeys, "verify", lambda *_: None)
    rig = make_rig(4)
    assert np.array_equal(everyone_else_is_the_coordinator(rig), rig.inputs[VICTIM])


def test_a_stranger_in_the_cohort():
    rig = make_rig(4, grid=Grid(clip=1.0, sites=8, word_bits=32))
    hellos = hellos_of(rig)
    hellos[9] = impostor(rig, 9, identity(9))
    refused(rig, "R1", wire.encode_hellos(hellos[s] for s in sorted(hellos)), match="site 9: it is")


def test_more_sites_than_the_grid_can_sum():
    """One site more could overflow the ring: the sum would no longer be the sum."""
    rig = make_rig(5, grid=Grid(clip=1.0, sites=4, word_bits=32))
    hellos = [wire.decode_hello(rig.answer("R0", s, rig.tally.request())) for s in rig.sites]
    refused(rig, "R1", wire.encode_hellos(hellos), match="made for fewer")
    with pytest.raises(ProtocolError, match="full"):
        make_rig(5, grid=Grid(clip=1.0, sites=4, word_bits=32)).run()


def test_a_hello_under_another_id():
    rig = make_rig(4)
    hellos = hellos_of(rig)
    del hellos[3]
    hellos[3] = hellos[2]._replace(site=3)
    del hellos[2]
    refused(rig, "R1", wire.encode_hellos(hellos[s] for s in sorted(hellos)), match="R0 signature")


def test_one_key_under_two_names():
    """A colluder signs another site's keys as its own: it would be masked against itself."""
    rig = make_rig(4)
    hellos = hellos_of(rig)
    copied = hellos[2]._replace(site=3)
    fields = cohort_module.hello_fields(rig.tally.request(), copied)
    hellos[3] = copied._replace(signature=sign(identity(3), "R0", *fields))
    refused(rig, "R1", wire.encode_hellos(hellos.values()), match="stands twice")
    other = make_rig(4)
    other.add("R0", 2, other.answer("R0", 2, other.tally.request()))
    said = wire.decode_hello(other.said["R0"][2])._replace(site=3)
    fields = cohort_module.hello_fields(other.tally.request(), said)
    said = said._replace(signature=sign(identity(3), "R0", *fields))
    with pytest.raises(SiteFault, match="already"):
        other.tally.add_hello(3, wire.encode_hello(said))


@pytest.mark.parametrize("key", ["envelope_key", "mask_key"])
def test_low_order_keys(key):
    """The shared secret with such a key is zero for everybody."""
    rig = make_rig(4)
    hellos = hellos_of(rig)
    change: dict[str, Any] = {key: LOW_ORDER}
    bad = hellos[2]._replace(**change)
    fields = cohort_module.hello_fields(rig.tally.request(), bad)
    hellos[2] = bad._replace(signature=sign(identity(2), "R0", *fields))
    message = wire.encode_hellos(hellos.values())
    if key == "envelope_key":
        refused(rig, "R1", message, match="low order")
    with pytest.raises(SiteFault, match="low order"):
        Tally(parameters=rig.parameters, roster=rig.roster).add_hello(
            2, wire.encode_hello(hellos[2])
        )


def test_the_victim_s_own_hello_is_another():
    rig = make_rig(4)
    hellos = hellos_of(rig)
    hellos[VICTIM] = impostor(rig, VICTIM, identity(VICTIM))
    refused(rig, "R1", wire.encode_hellos(hellos.values()), match="own hello")


def test_hellos_of_another_session():
    """Run A replayed in run B: a hello binds the parameters, and they name the run."""
    rig = make_rig(4)
    other = make_rig(4, attempt=Attempt(run="other", round=1))
    mine, theirs = hellos_of(rig), hellos_of(other)
    mixed = [mine[1], *(theirs[s] for s in (2, 3, 4))]
    refused(rig, "R1", wire.encode_hellos(mixed), match="R0 signature")


def test_a_cohort_below_the_minimum():
    rig = make_rig(5, minimum=4)
    hellos = hellos_of(rig)
    refused(rig, "R1", wire.encode_hellos(hellos[s] for s in (1, 2, 3)), match="needs 4")
