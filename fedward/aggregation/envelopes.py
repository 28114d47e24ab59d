"""Sealed shares on their way from a dealer to a holder (R1 and R2 of the specification)."""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedward.aggregation import wire
from fedward.aggregation.cohort import Cohort, PinnedKeys
from fedward.aggregation.shamir import SHARE_BYTES
from fedward.aggregation.transcript import (
    SiteFault,
    envelope_context,
    envelope_key,
    party,
    share_commitment,
    sign,
)
from fedward.identity import Identity

_NONCE = bytes(12)  # the direction is in the key, so each key encrypts once

SharePair = tuple[bytes, bytes]
"""A share of the dealer's self-mask seed and one of its mask key."""

NO_KEY = bytes(32)
"""In place of an envelope's key where the dealer's signature does not hold."""


class BadEnvelope(SiteFault):
    """A dealer's envelope does not hold.

    Args:
        dealer: Who sealed it.
        problem: What does not hold.
        key: The AES key of this envelope and of nothing else, for a complaint, if the dealer signed
            it; an unsigned one may be an honest dealer's, changed on the way to get at the key.
    """

    def __init__(self, dealer: int, problem: str, key: bytes = NO_KEY) -> None:
        super().__init__(dealer, problem)
        self.key = key


def agree(private: X25519PrivateKey, other: int, public: bytes) -> bytes:
    """X25519 (RFC 7748) with another site.

    Raises:
        SiteFault: The public key is of low order, so that everybody knows the secret.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise SiteFault(other, "its key is of low order") from error


def commit(session: bytes, dealer: int, holder: int, shares: SharePair) -> tuple[bytes, bytes]:
    """``hb`` and ``hs`` of one holder's shares."""
    return (
        share_commitment("hb", session, dealer, holder, shares[0]),
        share_commitment("hs", session, dealer, holder, shares[1]),
    )


def seal(
    cohort: Cohort,
    identity: Identity,
    private: X25519PrivateKey,
    dealer: int,
    holder: int,
    shares: SharePair,
    seed_commitment: bytes,
) -> wire.Sealed:
    """Encrypt, commit to and sign one holder's shares.

    Args:
        cohort: The session's cohort.
        identity: The dealer's long-lived key.
        private: The dealer's envelope key of this session.
        dealer: The dealer's id.
        holder: The holder's id.
        shares: What the holder gets.
        seed_commitment: ``cb``, the same in all of a dealer's envelopes.

    Raises:
        SiteFault: The holder's key is of low order.
    """
    session = cohort.session
    shared = agree(private, holder, cohort.hellos[holder].envelope_key)
    cipher = AESGCM(envelope_key(shared, session, dealer, holder))
    context = envelope_context(session, dealer, holder)
    sealed = cipher.encrypt(_NONCE, b"".join(shares), context)
    hb, hs = commit(session, dealer, holder, shares)
    envelope = wire.Envelope(dealer, seed_commitment, sealed, hb, hs, b"")
    signature = sign(identity, "R1", *signed_fields(cohort, holder, envelope))
    return wire.Sealed(holder, sealed, hb, hs, signature)


def unseal(
    cohort: Cohort,
    pinned: PinnedKeys,
    private: X25519PrivateKey,
    holder: int,
    envelope: wire.Envelope,
) -> SharePair:
    """Check, decrypt and check again one dealer's envelope.

    Args:
        cohort: The session's cohort.
        pinned: The pinned keys.
        private: The holder's envelope key of this session.
        holder: The holder's id.
        envelope: What the dealer sent.

    Raises:
        BadEnvelope: Signature, seal or commitments do not hold; the dealer is named.
        SiteFault: The dealer's key is of low order.
    """
    session, dealer = cohort.session, envelope.dealer
    # Signed with session, dealer, holder and point: no swapped, replayed or moved share.
    try:
        pinned.verify(dealer, envelope.signature, "R1", *signed_fields(cohort, holder, envelope))
    except SiteFault as error:
        raise BadEnvelope(dealer, "its R1 signature does not hold") from error
    shared = agree(private, dealer, cohort.hellos[dealer].envelope_key)
    key = envelope_key(shared, session, dealer, holder)
    try:
        shares = open_envelope(cohort, key, holder, envelope)
    except InvalidTag as error:
        raise BadEnvelope(dealer, "its envelope does not open", key) from error
    # A share that does not match its commitment could later be called the holder's lie.
    if shares is None:
        raise BadEnvelope(dealer, "its shares do not match its commitments", key)
    return shares


def open_envelope(
    cohort: Cohort, key: bytes, holder: int, envelope: wire.Envelope
) -> SharePair | None:
    """The shares in an envelope; None if they do not match the dealer's commitments.

    Raises:
        InvalidTag: The envelope does not open under this key.
    """
    session, dealer = cohort.session, envelope.dealer
    context = envelope_context(session, dealer, holder)
    plain = AESGCM(key).decrypt(_NONCE, envelope.envelope, context)
    shares = (plain[:SHARE_BYTES], plain[SHARE_BYTES:])
    commitments = (envelope.seed_share_commitment, envelope.key_share_commitment)
    return shares if commit(session, dealer, holder, shares) == commitments else None


def signed_fields(cohort: Cohort, holder: int, envelope: wire.Envelope) -> tuple[bytes, ...]:
    """What ``Sig_R1`` covers: sid, I(i), I(j), I(x), e, hb, hs, cb."""
    point = cohort.graph.point(envelope.dealer, holder)
    return (
        cohort.session,
        party(envelope.dealer),
        party(holder),
        party(point),
        envelope.envelope,
        envelope.seed_share_commitment,
        envelope.key_share_commitment,
        envelope.seed_commitment,
    )
