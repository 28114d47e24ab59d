"""The byte strings that ``secagg/1`` hashes, derives and signs (specification §2).

Whatever two sites must agree on goes through one of these functions, so that an encoding exists
once. ``H`` of the specification is :func:`fedward.canonical.digest`.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedward.canonical import digest
from fedward.errors import IdentityError, ProtocolError
from fedward.identity import Identity, verify_raw

PROTOCOL = "secagg/1"


class SiteFault(ProtocolError):
    """A check failed and the fault is one site's: the session may be tried again without it.

    Args:
        site: Who sent what does not hold.
        problem: What does not hold.
    """

    def __init__(self, site: int, problem: str) -> None:
        super().__init__(f"site {site}: {problem}")
        self.site, self.problem = site, problem


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Which sum a session ended in. Sites compare the coordinator's with their own.

    Args:
        session: ``sid``, 32 bytes.
        survivors: ``U3``, the sites in the sum, ascending.
        survivors_hash: ``u3``, 32 bytes.
    """

    session: bytes
    survivors: tuple[int, ...]
    survivors_hash: bytes


def party(site: int) -> bytes:
    """``I(i)``: a site id as 4 bytes, big-endian."""
    return site.to_bytes(4, "big")


def kdf(secret: bytes, salt: bytes, *fields: bytes | str) -> bytes:
    """HKDF-SHA256 (RFC 5869) of a secret to 32 bytes, bound to the salt and every field.

    >>> kdf(bytes(32), digest("sid", bytes(32)), "self", party(7)).hex()
    'b186e6d578c6a4a01458311a7cb6e8310b3de804eee028c5945ae898da4bfcee'
    """
    return HKDF(hashes.SHA256(), 32, salt, digest(*fields)).derive(secret)


def signed_bytes(stage: str, *fields: bytes) -> bytes:
    """What ``Sig_stage(fields..)`` signs; no signature of one stage verifies in another."""
    return f"{PROTOCOL}/{stage}".encode() + digest(*fields)


def sign(identity: Identity, stage: str, *fields: bytes) -> bytes:
    """``Sig_stage(fields..)``: 64 bytes of Ed25519."""
    return identity.sign_raw(signed_bytes(stage, *fields))


def verify(site: int, public_key: bytes, signature: bytes, stage: str, *fields: bytes) -> None:
    """Check ``Sig_stage(fields..)`` of a site.

    Raises:
        SiteFault: The signature does not hold under the key pinned for this site.
    """
    try:
        verify_raw(public_key, signature, signed_bytes(stage, *fields))
    except IdentityError as error:
        raise SiteFault(site, f"its {stage} signature does not hold") from error


def task_hash(adapter: bytes, plan_hash: bytes, rule: str) -> bytes:
    """What the summed updates start from and how the sum will be used.

    Every site computes it from what it really received. A coordinator that hands sites different
    adapters to read one of them out of the sum (Pasquini et al. 2022, arXiv 2111.07380) gives them
    different hashes, and they never share a session.

    Args:
        adapter: The adapter's whole state, as sent.
        plan_hash: :meth:`fedward.plan.Plan.hash`.
        rule: The aggregation rule: the plan's scheme.
    """
    return digest("task", adapter, plan_hash, rule)


def second_task_hash(task: bytes, outcome: Outcome, total: bytes, basis: bytes) -> bytes:
    """What the second pass of a round is about: which first pass, its sum, and the basis asked for.

    Sites that were shown different sums or bases give different hashes, and never share a session.

    Args:
        task: The first pass's task hash.
        outcome: What the first pass ended in, as this site signed it.
        total: The words of its sum.
        basis: Float32, little-endian.
    """
    bound = (task, outcome.session, outcome.survivors_hash)
    return digest("second pass", *bound, hashlib.sha256(total).digest(), basis)


def session_id(parameters: bytes, hellos: Iterable[bytes]) -> bytes:
    """``sid``: binds parameters and cohort.

    Args:
        parameters: The exact bytes of P.
        hellos: The encoded hellos, ordered by site id.
    """
    return digest("sid", digest(parameters), *hellos)


def cohort_hash(session: bytes, sites: Iterable[int]) -> bytes:
    """``u2``: the sites whose shares are out, ordered by id."""
    return digest("U2", session, *map(party, sites))


def survivors_hash(session: bytes, cohort: bytes, inputs: Iterable[tuple[int, bytes]]) -> bytes:
    """``u3``: the sites in the sum and the SHA-256 of each masked input, ordered by id."""
    return digest("U3", session, cohort, *(party(site) + hy for site, hy in inputs))


def share_commitment(kind: str, session: bytes, dealer: int, holder: int, share: bytes) -> bytes:
    """``hb`` or ``hs``: binds a dealer to the share it gave, so that a lying holder is named.

    Args:
        kind: ``hb`` for a share of the self-mask seed, ``hs`` for one of the mask key.
        session: ``sid``.
        dealer: Whose secret is shared.
        holder: Who holds the share.
        share: 33 bytes.
    """
    return digest(kind, session, party(dealer), party(holder), share)


def seed_commitment(session: bytes, seed: bytes) -> bytes:
    """``cb``: binds a dealer to its self-mask seed, so that a lying dealer is named."""
    return digest("bcommit", session, seed)


def envelope_key(shared: bytes, session: bytes, dealer: int, holder: int) -> bytes:
    """The AES key of one envelope; the direction is in it, so each key encrypts once."""
    return kdf(shared, session, "env", party(dealer), party(holder))


def envelope_context(session: bytes, dealer: int, holder: int) -> bytes:
    """The associated data of one envelope."""
    return digest(session, party(dealer), party(holder))


def self_mask_key(seed: bytes, session: bytes, site: int) -> bytes:
    """The key of a site's own mask."""
    return kdf(seed, session, "self", party(site))


def pair_mask_key(shared: bytes, session: bytes, one: int, other: int, cohort: bytes) -> bytes:
    """The key of the mask that two sites share, alike at both.

    ``u2`` is in it: sites that were shown different cohorts derive masks that do not cancel.
    """
    low, high = sorted((one, other))
    return kdf(shared, session, "pair", party(low), party(high), cohort)
