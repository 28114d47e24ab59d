"""A malicious coordinator or dealer in R2: envelopes, U2 and inputs (§8, §9).

Each attack ends in an abort or in the unmodified sum, never in more. Where the check that stops it
can be taken out, a twin test does so and shows that the attack then reads the victim's input.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedward.aggregation import wire
from fedward.aggregation.cohort import Cohort
from fedward.aggregation.masks import apply_masks
from fedward.aggregation.transcript import (
    SiteFault,
    self_mask_key,
    sign,
)
from fedward.errors import ProtocolError
from tests.aggregation.attacker import VICTIM, deliver, refused, state
from tests.aggregation.rig import Rig, identity, make_rig


def envelopes_of(rig: Rig, site: int = VICTIM) -> tuple[tuple[int, ...], tuple[wire.Envelope, ...]]:
    return wire.decode_envelopes(rig.run_to("R2")[site])


def test_every_flipped_bit_of_an_envelope():
    for position in (0, 40, 81):
        rig = make_rig(4)
        u2, (first, *rest) = envelopes_of(rig)
        broken = bytearray(first.envelope)
        broken[position] ^= 1
        first = first._replace(envelope=bytes(broken))
        refused(rig, "R2", wire.encode_envelopes(u2, [first, *rest]), match="R1 signature")


@pytest.mark.parametrize("field", ["seed_commitment", "seed_share_commitment", "signature"])
def test_changed_commitments(field):
    rig = make_rig(4)
    u2, (first, *rest) = envelopes_of(rig)
    zeros: dict[str, Any] = {field: bytes(len(getattr(first, field)))}
    first = first._replace(**zeros)
    refused(rig, "R2", wire.encode_envelopes(u2, [first, *rest]), match="site 2: its R1")


def test_swapped_envelopes():
    """What site 2 sealed for site 3 goes to the victim."""
    rig = make_rig(4)
    messages = rig.run_to("R2")
    u2, mine = wire.decode_envelopes(messages[VICTIM])
    _, theirs = wire.decode_envelopes(messages[3])
    swapped = [e if e.dealer != 2 else theirs[1] for e in mine]
    assert swapped[0].dealer == 2
    refused(rig, "R2", wire.encode_envelopes(u2, swapped), match="site 2: its R1")


def test_missing_envelope():
    rig = make_rig(4)
    u2, envelopes = envelopes_of(rig)
    refused(rig, "R2", wire.encode_envelopes(u2, envelopes[1:]), match="neighbours in U2")


def dealer_sends(rig: Rig, tamper: Callable[[wire.Envelope], tuple[wire.Envelope, int]]) -> bytes:
    """Site 2 is malicious: it signs whatever ``tamper`` makes of its envelope for the victim."""
    u2, envelopes = envelopes_of(rig)
    changed = []
    for e in envelopes:
        if e.dealer == 2:
            bad, point = tamper(e)
            fields = envelope_fields(rig, bad, point)
            bad = bad._replace(signature=sign(identity(2), "R1", *fields))
            changed.append(bad)
        else:
            changed.append(e)
    return wire.encode_envelopes(u2, changed)


def envelope_fields(rig: Rig, envelope: wire.Envelope, point: int) -> tuple[bytes, ...]:
    cohort = rig.tally._cohort
    number = [n.to_bytes(4, "big") for n in (2, VICTIM, point)]
    return (
        cohort.session,
        *number,
        envelope.envelope,
        envelope.seed_share_commitment,
        envelope.key_share_commitment,
        envelope.seed_commitment,
    )


def test_a_dealer_that_claims_another_point():
    rig = make_rig(4)
    message = dealer_sends(rig, lambda e: (e, 2))
    refused(rig, "R2", message, match="site 2: its R1 signature")
    control = make_rig(4)
    message = dealer_sends(control, lambda e: (e, 1))  # 1 is the right one: rank of site 1
    assert deliver(control, "R2", message)


def test_a_dealer_whose_envelope_does_not_open():
    rig = make_rig(4)
    message = dealer_sends(rig, lambda e: (e._replace(envelope=bytes(82)), 1))
    refused(rig, "R2", message, match="site 2: its envelope does not open")


def test_a_dealer_whose_shares_do_not_match_its_commitments():
    rig = make_rig(4)
    message = dealer_sends(rig, lambda e: (e._replace(key_share_commitment=bytes(32)), 1))
    refused(rig, "R2", message, match="site 2: its shares")


def test_the_victim_is_declared_dead_in_u2():
    rig = make_rig(5)
    u2, envelopes = envelopes_of(rig)
    message = wire.encode_envelopes([s for s in u2 if s != VICTIM], envelopes)
    refused(rig, "R2", message, match="U2 does not hold this site")


def test_u2_with_someone_new():
    rig = make_rig(5)
    u2, envelopes = envelopes_of(rig)
    refused(rig, "R2", wire.encode_envelopes([*u2, 99], envelopes), match="not there before")


def alone(rig: Rig, others: tuple[int, ...]) -> bytes:
    """A cohort of the victim and a few others, with matching envelopes."""
    _, envelopes = envelopes_of(rig)
    kept = (VICTIM, *others)
    return wire.encode_envelopes(kept, [e for e in envelopes if e.dealer in kept])


def test_a_cohort_shrunk_to_the_victim():
    refused(rig := make_rig(5), "R2", alone(rig, ()), match="U2 has 1 sites")


def test_twin_without_the_size_of_u2(monkeypatch):
    """Alone in U2, the victim is covered by nothing but its own mask."""
    rig = make_rig(5)
    message = alone(rig, ())
    monkeypatch.setattr(Cohort, "check_enough", lambda *_: None)
    monkeypatch.setattr(Cohort, "check_held", lambda *_: None)
    seed = state(rig, VICTIM).seed  # what a majority's shares would give
    _, vector = deliver(rig, "R2", message)
    apply_masks(
        vector := vector.copy(), subtract=[self_mask_key(seed, rig.tally._cohort.session, VICTIM)]
    )
    assert np.array_equal(vector, rig.inputs[VICTIM])


def test_u2_shown_differently():
    """The victim was shown a smaller U2: its header is noise to everybody else."""
    rig = make_rig(5)
    messages = rig.run_to("R2")
    u2, envelopes = wire.decode_envelopes(messages[VICTIM])
    smaller = wire.encode_envelopes(u2[:4], [e for e in envelopes if e.dealer in u2[:4]])
    header, vector = deliver(rig, "R2", smaller)
    for site in (2, 3, 4, 5):
        rig.add("R2", site, rig.answer("R2", site, messages[site]))
    with pytest.raises(SiteFault, match="site 1: its R2 signature"):
        rig.tally.add_masked(VICTIM, header, vector)
    shown = [wire.decode_header(rig.said["R2"][s]) for s in (2, 3, 4)]
    mixed = wire.encode_survivors([wire.decode_header(header), *shown])
    refused(rig, "R3", mixed, site=2, match="site 1: its R2 signature")
    refused(rig, "R3", mixed, match="site 2: its R2 signature")


@pytest.mark.parametrize(
    "words",
    [
        np.zeros(9, dtype=np.uint32),
        np.zeros(11, dtype=np.uint32),
        np.zeros(10, dtype=np.uint16),
        np.zeros(10, dtype=np.int32),
        np.zeros(10, dtype=np.float32),
        np.zeros((10, 1), dtype=np.uint32),
        np.zeros(20, dtype=np.uint32)[::2],
        np.zeros(10, dtype=">u4"),
    ],
    ids=["short", "long", "narrow", "signed", "float", "matrix", "strided", "big-endian"],
)
def test_an_input_of_another_shape_or_type(words):
    rig = make_rig(4)
    message = rig.run_to("R2")[VICTIM]
    with pytest.raises(ProtocolError):
        rig.sessions[VICTIM].masked(message, words)
    assert rig.sessions[VICTIM].dead
    assert not rig.memories[VICTIM].spent
    assert not words.any(), "a refused input is not masked"
