"""What a site says of a dealer whose envelope it cannot use, and who is at fault (§3, R2).

A dealer can seal garbage under its valid signature. The holder's session ends there, and it sends
a complaint in place of its input: signed, with the AES key of this one envelope. The key opens
nothing else, and what it opens was dealt by a liar, because an honest dealer's signed envelope
opens.

The coordinator tries the key on the envelope that the dealer signed. An honest envelope opens under
no other key (2^-128 a try), but nobody else can tell a wrong key from a right one that opens
nothing. Then one of the two lies and both are suspects. What follows from suspicions over a whole
run is the coordinator's business (``fedward/server/suspects.py``).
"""

from cryptography.exceptions import InvalidTag

from fedward.aggregation import wire
from fedward.aggregation.cohort import Cohort, PinnedKeys
from fedward.aggregation.envelopes import NO_KEY, BadEnvelope, open_envelope, signed_fields
from fedward.aggregation.transcript import SiteFault, party, sign
from fedward.identity import Identity


class Complaint(SiteFault):
    """A dealer's envelope does not hold; ``message`` says so to the coordinator.

    Args:
        cohort: The session's cohort.
        identity: The holder's long-lived key.
        holder: The holder's id.
        fault: What does not hold, of which dealer.
    """

    def __init__(self, cohort: Cohort, identity: Identity, holder: int, fault: BadEnvelope) -> None:
        super().__init__(fault.site, fault.problem)
        fields = _signed_fields(cohort, holder, fault.site, fault.key)
        complaint = wire.Complaint(holder, fault.site, fault.key, sign(identity, "C", *fields))
        self.message = wire.encode_complaint(complaint)


def judge(
    cohort: Cohort, pinned: PinnedKeys, complaint: wire.Complaint, envelope: wire.Envelope
) -> frozenset[int]:
    """Decide on a complaint.

    Args:
        cohort: The session's cohort.
        pinned: The pinned keys.
        complaint: What the holder sent.
        envelope: What the dealer sent for this holder.

    Returns:
        The suspects, at least one of whom is corrupt: one site if it is proven, else both.

    Raises:
        SiteFault: The complaint's own signature does not hold.
    """
    holder, dealer, key, signature = complaint
    pinned.verify(holder, signature, "C", *_signed_fields(cohort, holder, dealer, key))
    try:
        pinned.verify(dealer, envelope.signature, "R1", *signed_fields(cohort, holder, envelope))
    except SiteFault:
        return frozenset({dealer})
    if key == NO_KEY:  # it says that the signature does not hold
        return frozenset({holder})
    try:
        shares = open_envelope(cohort, key, holder, envelope)
    except InvalidTag:
        return frozenset({dealer, holder})
    return frozenset({dealer if shares is None else holder})


def _signed_fields(cohort: Cohort, holder: int, dealer: int, key: bytes) -> tuple[bytes, ...]:
    """What ``Sig_C`` covers: sid, I(holder), I(dealer), key."""
    return (cohort.session, party(holder), party(dealer), key)
