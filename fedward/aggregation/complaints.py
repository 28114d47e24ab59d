"""What a site says of a dealer whose envelope it cannot use, and who is at fault (§3, R2).

A dealer can seal garbage under its valid signature. The holder's session ends there, and it sends
a complaint in place of its input: signed, with the AES key of this one envelope. The key opens
nothing else, and what it opens was dealt by a liar, because an honest dealer's signed envelope
opens.

The coordinator tries the key on the envelope that the dealer signed. An honest envelope opens under
no other key (2^-128 a try), but nobody else can tell a wrong key from a right one that opens
nothing. Then one of the two lies, and both are left out of the next attempt: each honest site that
is lost so costs a corrupt one its place (dispute control: Beerliová-Trubíniová and Hirt 2006). More
than T complaints cannot all be lies.
"""

from collections import Counter
from collections.abc import Collection

from cryptography.exceptions import InvalidTag

from fedward.aggregation import wire
from fedward.aggregation.cohort import Cohort, PinnedKeys
from fedward.aggregation.envelopes import NO_KEY, BadEnvelope, open_envelope, signed_fields
from fedward.aggregation.transcript import SiteFault, party, sign
from fedward.identity import Identity

Verdict = tuple[int, frozenset[int]]
"""The dealer complained of, and who may be at fault: one site if it is proven, else both."""


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
) -> Verdict:
    """Decide on a complaint.

    Args:
        cohort: The session's cohort.
        pinned: The pinned keys.
        complaint: What the holder sent.
        envelope: What the dealer sent for this holder.

    Raises:
        SiteFault: The complaint's own signature does not hold.
    """
    holder, dealer, key, signature = complaint
    pinned.verify(holder, signature, "C", *_signed_fields(cohort, holder, dealer, key))
    try:
        pinned.verify(dealer, envelope.signature, "R1", *signed_fields(cohort, holder, envelope))
    except SiteFault:
        return dealer, frozenset({dealer})
    if key == NO_KEY:  # it says that the signature does not hold
        return dealer, frozenset({holder})
    try:
        shares = open_envelope(cohort, key, holder, envelope)
    except InvalidTag:
        return dealer, frozenset({dealer, holder})
    return dealer, frozenset({dealer if shares is None else holder})


def at_fault(verdicts: Collection[Verdict], colluders: int) -> frozenset[int]:
    """The sites to leave out of the next attempt.

    Args:
        verdicts: One for each complaint of the session.
        colluders: ``T``.
    """
    accusers = Counter(dealer for dealer, suspects in verdicts if dealer in suspects)
    found = set[int]()
    for dealer, suspects in verdicts:
        certain = dealer in suspects and accusers[dealer] > colluders  # not all of them lie
        found |= {dealer} if certain else suspects
    return frozenset(found)


def _signed_fields(cohort: Cohort, holder: int, dealer: int, key: bytes) -> tuple[bytes, ...]:
    """What ``Sig_C`` covers: sid, I(holder), I(dealer), key."""
    return (cohort.session, party(holder), party(dealer), key)
