"""One site's side of one secure-aggregation session, as a pure state machine (specification §4).

::

    new ─R0 hello─▶ greeted ─R1 shares─▶ shared ─R2 masked─▶ masked
                                            ─R3 consistency─▶ voted ─R4 unmask─▶ done

    every state ──a check fails, or a message comes out of turn──▶ dead

Bytes in, bytes out: no socket, clock or file. What must survive a crash goes through
:class:`SessionMemory` before the message that depends on it leaves. A message that comes again gets
the same bytes again; any other message out of turn ends the session. A dead session has dropped its
secrets and never answers. The coordinator may be malicious, together with up to T sites: every
check names the attack that it stops.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedward import failpoints
from fedward.aggregation import shamir, wire
from fedward.aggregation.cohort import Cohort, PinnedKeys, form_cohort, hello_fields
from fedward.aggregation.complaints import Complaint
from fedward.aggregation.envelopes import BadEnvelope, SharePair, agree, commit, seal, unseal
from fedward.aggregation.masks import Words, apply_masks
from fedward.aggregation.parameters import Limits, SessionParameters
from fedward.aggregation.session_memory import SessionMemory
from fedward.aggregation.transcript import (
    Outcome,
    SiteFault,
    cohort_hash,
    pair_mask_key,
    party,
    seed_commitment,
    self_mask_key,
    sign,
    survivors_hash,
)
from fedward.canonical import digest
from fedward.errors import CohortTooSmall, ProtocolError
from fedward.identity import Identity, Roster


@dataclass(frozen=True, kw_only=True)
class _New:
    """Nothing happened yet."""


@dataclass(frozen=True, kw_only=True, repr=False)
class _Keys:
    """The session's fresh X25519 keys: one pair seals envelopes, the other agrees on masks."""

    envelope: X25519PrivateKey
    mask: X25519PrivateKey


@dataclass(frozen=True, kw_only=True, repr=False)
class _Greeted:
    keys: _Keys
    hello: wire.Hello


@dataclass(frozen=True, kw_only=True, repr=False)
class _Shared:
    cohort: Cohort
    keys: _Keys
    seed: bytes
    own_shares: SharePair


@dataclass(frozen=True, kw_only=True, repr=False)
class _Masked:
    cohort: Cohort
    u2: tuple[int, ...]
    u2_hash: bytes
    header: wire.Header
    shares: dict[int, SharePair]
    """By dealer, this site included: the share of its seed and the share of its mask key."""


@dataclass(frozen=True, kw_only=True, repr=False)
class _Voted:
    masked: _Masked
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class _Done:
    """Everything was said; no secret is left."""

    outcome: Outcome


# Without repr: what a state holds must not get into a traceback or a log.
_State = _New | _Greeted | _Shared | _Masked | _Voted | _Done
_From = TypeVar("_From", bound=_State)


class SiteSession:
    """One session at one site; the object serves one attempt and is then thrown away.

    Args:
        identity: The site's long-lived key.
        site: Its roster id.
        roster: The roster that the site has pinned.
        limits: The site's own policy.
        memory: Durable facts of all sessions.
        expected: The parameters as this site itself derives them from plan, task and roster.
        threads: Threads for masking, 1 or more.
        secrets: Source of secret bytes; only tests and simulations replace it.

    Guarantees:
        The coordinator and up to ``expected.colluders`` other sites learn about this site's input
        what the sum over at least ``expected.minimum`` sites tells, or nothing.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        site: int,
        roster: Roster,
        limits: Limits,
        memory: SessionMemory,
        expected: SessionParameters,
        threads: int = 1,
        secrets: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._identity, self._site, self._roster = identity, site, roster
        self._limits, self._memory, self._secrets = limits, memory, secrets
        self._expected, self._threads = expected, threads
        self._parameters, self._pinned = expected.to_bytes(), PinnedKeys(roster)
        self._state: _State | None = _New()
        self._answers: dict[bytes, bytes] = {}
        self._vector: Words | None = None

    @property
    def dead(self) -> bool:
        """Whether a check failed: the session never answers again."""
        return self._state is None

    @property
    def outcome(self) -> Outcome | None:
        """What the published sum must belong to; known once this site has signed it."""
        return self._state.outcome if isinstance(self._state, _Voted | _Done) else None

    @property
    def finished(self) -> Outcome | None:
        """The outcome once a quorum has certified it and this site released its shares."""
        return self._state.outcome if isinstance(self._state, _Done) else None

    def hello(self, parameters: bytes) -> bytes:
        """R0: check the parameters and make fresh keys.

        Raises:
            ProtocolError: A check failed; the session is dead.
        """
        return self._advance(_New, "R0", parameters, self._greet)

    def shares(self, hellos: bytes) -> bytes:
        """R1: check the cohort and share this site's secrets with its neighbours.

        Raises:
            ProtocolError: A check failed; the session is dead.
        """
        return self._advance(_Greeted, "R1", hellos, self._share)

    def masked(self, envelopes: bytes, words: Words) -> tuple[bytes, Words]:
        """R2: check the shares received, then mask the input.

        Args:
            envelopes: The cohort and the neighbours' envelopes.
            words: ``(d,)`` encoded words. They are masked in place, once every check has passed,
                and become read-only; a repeated call does not look at them.

        Returns:
            The signed header and the masked vector.

        Raises:
            ProtocolError: A check failed; the session is dead and ``words`` are as they were. A
                :class:`Complaint` names a dealer and carries the one message that may still leave.
        """
        header = self._advance(_Shared, "R2", envelopes, lambda s, m: self._mask(s, m, words))
        if self._vector is None:
            raise ProtocolError("the session has no masked input")
        return header, self._vector

    def consistency(self, survivors: bytes) -> bytes:
        """R3: check the survivor set and sign it.

        Raises:
            ProtocolError: A check failed; the session is dead.
        """
        return self._advance(_Masked, "R3", survivors, self._vote)

    def unmask(self, certificate: bytes) -> bytes:
        """R4: check the certificate, release one share of each dealer, drop every secret.

        Raises:
            ProtocolError: A check failed; the session is dead and no share was released.
        """
        return self._advance(_Voted, "R4", certificate, self._release)

    def _advance(
        self,
        stage: type[_From],
        name: str,
        message: bytes,
        work: Callable[[_From, bytes], tuple[_State, bytes]],
    ) -> bytes:
        """Answer a repeated message as before, or take one step, or die."""
        key = digest(name, message)
        if key in self._answers:
            return self._answers[key]
        # Dead until the step has succeeded: whatever is raised below, nothing was sent and the
        # secrets are gone.
        state, self._state = self._state, None
        answers, self._answers = self._answers, {}
        if not isinstance(state, stage):
            raise ProtocolError(f"the session cannot take another {name} message in this state")
        try:
            new_state, reply = work(state, message)
        except CohortTooSmall as error:
            raise ProtocolError(str(error)) from error
        failpoints.hit("session.advanced")
        self._state, self._answers = new_state, {**answers, key: reply}
        return reply

    def _greet(self, _state: _New, parameters: bytes) -> tuple[_State, bytes]:
        expected = self._expected
        # Every site derives P for itself. A coordinator that changes threshold, minimum, grid,
        # dimension or task for some sites or for all is refused before any key exists.
        if parameters != self._parameters:
            wrong = expected.difference(parameters)
            raise ProtocolError(f"the session's parameters are not what this site derives: {wrong}")
        # A stale or foreign roster would let the coordinator add sites that it runs itself.
        if expected.roster_hash != self._roster.hash():
            raise ProtocolError("the session names another roster than the pinned one")
        self._limits.check(expected, self._roster)
        # A replayed or concurrent instance would put one update into two sums.
        newest = self._memory.newest(expected.attempt.run)
        if newest is not None and expected.attempt.order <= newest:
            raise ProtocolError(f"attempt {expected.attempt.order} is not newer than {newest}")
        self._memory.begin(expected.attempt)
        keys = _Keys(envelope=self._fresh_key(), mask=self._fresh_key())
        cpk, spk = (k.public_key().public_bytes_raw() for k in (keys.envelope, keys.mask))
        hello = wire.Hello(self._site, cpk, spk, self._secrets(32), b"")
        bound = hello_fields(parameters, hello)
        hello = hello._replace(signature=sign(self._identity, "R0", *bound))
        return _Greeted(keys=keys, hello=hello), wire.encode_hello(hello)

    def _share(self, state: _Greeted, message: bytes) -> tuple[_State, bytes]:
        hellos = wire.decode_hellos(message)
        # A cohort that lacks this site, or holds other keys under its name, is an impostor's.
        if state.hello not in hellos:
            raise ProtocolError("the cohort does not hold this site's own hello")
        cohort = form_cohort(self._expected, self._pinned, hellos)
        me, sid, circle = self._site, cohort.session, cohort.graph.circle(self._site)
        seed = self._secrets(32)
        threshold, holders = cohort.need.threshold, len(circle)
        seed_shares, key_shares = (
            shamir.split(secret, threshold=threshold, holders=holders, secrets=self._secrets)
            for secret in (seed, state.keys.mask.private_bytes_raw())
        )
        shares = dict(zip(circle, zip(seed_shares, key_shares, strict=True), strict=True))
        commitment = seed_commitment(sid, seed)
        sealed = [
            seal(cohort, self._identity, state.keys.envelope, me, other, shares[other], commitment)
            for other in circle
            if other != me
        ]
        own = shares[me]
        reply = wire.Shares(me, commitment, *commit(sid, me, me, own), tuple(sealed))
        shared = _Shared(cohort=cohort, keys=state.keys, seed=seed, own_shares=own)
        return shared, wire.encode_shares(reply)

    def _mask(self, state: _Shared, message: bytes, words: Words) -> tuple[_State, bytes]:
        cohort, sid = state.cohort, state.cohort.session
        u2, envelopes = wire.decode_envelopes(message)
        self._check_present(u2, cohort.hellos, cohort, "U2")
        near = [other for other in cohort.graph.neighbours(self._site) if other in set(u2)]
        # A missing envelope would leave a neighbour whose secret cannot be given back; an extra
        # one has no mask that belongs to it.
        if [envelope.dealer for envelope in envelopes] != near:
            raise ProtocolError("the envelopes are not those of this site's neighbours in U2")
        try:
            shares = {
                e.dealer: unseal(cohort, self._pinned, state.keys.envelope, self._site, e)
                for e in envelopes
            }
        except BadEnvelope as error:
            raise Complaint(cohort, self._identity, self._site, error) from error
        shares[self._site] = state.own_shares
        if words.shape != (self._expected.words,) or words.dtype != self._expected.grid.dtype:
            raise ProtocolError(
                f"the input is {words.dtype} of shape {words.shape}, the session needs words: "
                f"{self._expected.words} of {self._expected.grid.dtype}"
            )
        u2_hash = cohort_hash(sid, u2)
        self._apply_masks(state, near, u2_hash, words)
        input_hash = hashlib.sha256(words.data).digest()
        failpoints.hit("session.masked")
        # From here on the input may be part of a sum: it is never masked a second time.
        self._memory.mark_spent(self._expected.reserved)
        bound = (sid, u2_hash, party(self._site), input_hash)
        header = wire.Header(self._site, input_hash, sign(self._identity, "R2", *bound))
        self._vector = words
        masked = _Masked(cohort=cohort, u2=u2, u2_hash=u2_hash, header=header, shares=shares)
        return masked, wire.encode_header(header)

    def _vote(self, state: _Masked, message: bytes) -> tuple[_State, bytes]:
        cohort, sid = state.cohort, state.cohort.session
        headers = wire.decode_survivors(message)
        ids = [header.site for header in headers]
        self._check_present(ids, state.u2, cohort, "U3")
        # Another input under this site's name would be summed in its place.
        if state.header not in headers:
            raise ProtocolError("the survivor set does not hold this site's own header")
        # Under this site's own u2: a coordinator that showed another cohort to a survivor has no
        # header of it that verifies here.
        for header in headers:
            bound = (sid, state.u2_hash, party(header.site), header.input_hash)
            self._pinned.verify(header.site, header.signature, "R2", *bound)
        u3_hash = survivors_hash(sid, state.u2_hash, ((h.site, h.input_hash) for h in headers))
        # Two survivor sets of one session would release both shares of their difference.
        if self._memory.signed(sid) not in (None, u3_hash):
            raise ProtocolError("this site signed another survivor set of this session")
        outcome = Outcome(session=sid, survivors=tuple(ids), survivors_hash=u3_hash)
        self._memory.remember_signed(outcome)
        vote = wire.Vote(self._site, sign(self._identity, "R3", sid, u3_hash))
        return _Voted(masked=state, outcome=outcome), wire.encode_vote(vote)

    def _release(self, state: _Voted, message: bytes) -> tuple[_State, bytes]:
        outcome, cohort = state.outcome, state.masked.cohort
        survivors = frozenset(outcome.survivors)
        votes = wire.decode_certificate(message)
        # Below the quorum, T colluders could sign two survivor sets towards two honest halves.
        if len(votes) < cohort.need.quorum:
            raise ProtocolError(
                f"the certificate has {len(votes)} signatures, the quorum is {cohort.need.quorum}"
            )
        for vote in votes:
            if vote.site not in survivors:
                raise SiteFault(vote.site, "it signed a survivor set that it is not part of")
            self._pinned.verify(
                vote.site, vote.signature, "R3", outcome.session, outcome.survivors_hash
            )
        # The set that this site signed decides which share of a dealer goes, never a list in the
        # request: both shares of one dealer would open its input.
        released = tuple(
            (dealer, seed_share if dealer in survivors else key_share)
            for dealer, (seed_share, key_share) in sorted(state.masked.shares.items())
        )
        self._memory.remember_released(outcome.session)
        return _Done(outcome=outcome), wire.encode_released(wire.Released(self._site, released))

    def _check_present(
        self, ids: Iterable[int], before: Iterable[int], cohort: Cohort, name: str
    ) -> None:
        """Checks of U2 and U3 alike."""
        sites = frozenset(ids)
        # A site that is told it is dead would help to open its own input.
        if self._site not in sites:
            raise ProtocolError(f"{name} does not hold this site")
        # A late joiner's shares went to nobody, and its keys are in no u2.
        if not sites <= set(before):
            raise ProtocolError(f"{name} holds sites that were not there before")
        cohort.check_enough(sites, name)
        cohort.check_held(sites, self._site, name)

    def _apply_masks(self, state: _Shared, near: list[int], u2_hash: bytes, words: Words) -> None:
        """Add this site's own mask and one mask a neighbour; the pair's two signs are opposite."""
        sid, me, hellos = state.cohort.session, self._site, state.cohort.hellos
        pair = {
            other: pair_mask_key(
                agree(state.keys.mask, other, hellos[other].mask_key), sid, me, other, u2_hash
            )
            for other in near
        }
        apply_masks(
            words,
            add=[self_mask_key(state.seed, sid, me), *(pair[o] for o in near if me < o)],
            subtract=[pair[o] for o in near if me > o],
            threads=self._threads,
        )
        words.setflags(write=False)

    def _fresh_key(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self._secrets(32))
