"""The coordinator's side of one secure-aggregation session, as a pure state machine (§4).

Each exchange is filled by ``add_*`` (one message of one site, in any order) and closed by
``close_*``, which returns the next message for each site still there. Sites may vanish at any
point: whoever has not answered when an exchange is closed is left out, and a session that has too
few sites left raises :class:`CohortTooSmall`; the exchange stays open, for one more to come.

``add_*`` raises :class:`SiteFault` for a message that does not hold: the caller drops that site. A
message that comes again is ignored.
"""

import hashlib

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedward.aggregation import shamir, wire
from fedward.aggregation.cohort import Cohort, PinnedKeys, form_cohort, hello_fields
from fedward.aggregation.complaints import judge
from fedward.aggregation.envelopes import agree, signed_fields
from fedward.aggregation.graph import COMPLETE_UP_TO
from fedward.aggregation.masks import Words, apply_masks, check_vector
from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.published import SumResult
from fedward.aggregation.transcript import (
    Outcome,
    SiteFault,
    cohort_hash,
    pair_mask_key,
    party,
    seed_commitment,
    self_mask_key,
    share_commitment,
    survivors_hash,
)
from fedward.canonical import digest
from fedward.errors import CohortTooSmall, ProtocolError
from fedward.identity import Roster

__all__ = ["SumResult", "Tally"]


class Tally:
    """Sums the masked inputs of one session.

    Args:
        parameters: The session's parameters.
        roster: The roster that the sites have pinned.
        threads: Threads for removing masks, 1 or more.
    """

    def __init__(self, *, parameters: SessionParameters, roster: Roster, threads: int = 1) -> None:
        self.parameters = parameters
        self._pinned, self._threads = PinnedKeys(roster), threads
        self._stage = "R0"
        self._seen: dict[tuple[str, int], bytes] = {}
        self._hellos: dict[int, wire.Hello] = {}
        self._keys: set[bytes] = set()
        self._formed: Cohort | None = None
        self._shares: dict[int, wire.Shares] = {}
        self._sealed: dict[int, dict[int, wire.Envelope]] = {}
        self._u2: tuple[int, ...] = ()
        self._u2_hash = b""
        self._headers: dict[int, wire.Header] = {}
        self._suspects: dict[int, frozenset[int]] = {}
        self._total: Words = np.zeros(0, dtype=parameters.grid.dtype)
        self._outcome: Outcome | None = None
        self._votes: dict[int, wire.Vote] = {}
        self._certificate = b""
        self._released: dict[int, dict[int, bytes]] = {}

    def request(self) -> bytes:
        """R0: what every site is sent: the parameters."""
        return self.parameters.to_bytes()

    def add_hello(self, site: int, message: bytes) -> None:
        """R0: take a site's keys into the cohort.

        Raises:
            SiteFault: Wrong signature or roster, a low-order key, or a key that is there already.
            ProtocolError: Malformed or late, or the cohort is full.
        """
        hello = wire.decode_hello(message)
        if not self._is_new("R0", site, hello.site, message):
            return
        if len(self._hellos) == self.parameters.grid.sites:
            raise ProtocolError(f"the cohort is full with {len(self._hellos)} sites")
        self._pinned.verify(site, hello.signature, "R0", *hello_fields(self.request(), hello))
        # Sites abort on either of these; here it costs the one who sent it, not the session.
        keys = {hello.envelope_key, hello.mask_key}
        if len(keys) < 2 or not keys.isdisjoint(self._keys):
            raise SiteFault(site, "one of its keys is in the cohort already")
        for key in keys:
            agree(X25519PrivateKey.generate(), site, key)
        self._keys |= keys
        self._hellos[site] = hello
        self._note("R0", site, message)

    def close_hellos(self) -> dict[int, bytes]:
        """R1: form the cohort; returns every site's message.

        Raises:
            CohortTooSmall: Fewer sites than the minimum.
        """
        self._check_open("R0")
        hellos = [self._hellos[site] for site in sorted(self._hellos)]
        self._formed = form_cohort(self.parameters, self._pinned, hellos)
        self._stage = "R1"
        return dict.fromkeys(self._formed.hellos, wire.encode_hellos(hellos))

    def add_shares(self, site: int, message: bytes) -> None:
        """R1: keep a dealer's envelopes for their holders.

        Raises:
            SiteFault: Not a site of the cohort, not one envelope for each neighbour, or (up to 128
                sites) one whose signature does not hold.
            ProtocolError: Malformed or late.
        """
        shares = wire.decode_shares(message)
        if not self._is_new("R1", site, shares.site, message):
            return
        if site not in self._cohort.hellos:
            raise SiteFault(site, "it is not in the cohort")
        if [s.holder for s in shares.sealed] != list(self._cohort.graph.neighbours(site)):
            raise SiteFault(site, "its envelopes are not for its neighbours")
        envelopes = {
            holder: wire.Envelope(site, shares.seed_commitment, *sealed)
            for holder, *sealed in shares.sealed
        }
        if len(self._cohort.hellos) <= COMPLETE_UP_TO:
            # Every holder would end its session over a bad one; on a ring only the neighbours.
            for holder, envelope in envelopes.items():
                fields = signed_fields(self._cohort, holder, envelope)
                self._pinned.verify(site, envelope.signature, "R1", *fields)
        self._shares[site], self._sealed[site] = shares, envelopes
        self._note("R1", site, message)

    def close_shares(self) -> dict[int, bytes]:
        """R2: freeze U2; returns the message of every site in it.

        Raises:
            CohortTooSmall: Too few sites are left.
            ProtocolError: Too few holders of some site's shares are left.
        """
        self._check_open("R1")
        cohort, sites = self._cohort, frozenset(self._shares)
        self._check_left(sites, "U2")
        self._u2 = tuple(sorted(sites))
        self._u2_hash = cohort_hash(cohort.session, self._u2)
        self._total = np.zeros(self.parameters.words, dtype=self.parameters.grid.dtype)
        boxes: dict[int, list[wire.Envelope]] = {site: [] for site in self._u2}
        for dealer in self._u2:
            for holder, envelope in self._sealed[dealer].items():
                if holder in sites:
                    boxes[holder].append(envelope)
        self._stage = "R2"
        return {site: wire.encode_envelopes(self._u2, box) for site, box in boxes.items()}

    def add_masked(self, site: int, message: bytes, vector: Words) -> None:
        """R2: add a masked input to the sum.

        Args:
            site: Who sent it.
            message: The signed header.
            vector: ``(d,)`` words; not kept.

        Raises:
            SiteFault: Not in U2, wrong signature, or a vector that is not the signed one.
            ProtocolError: Malformed or late.
        """
        header = wire.decode_header(message)
        if not self._is_new("R2", site, header.site, message):
            return
        if site not in self._u2:
            raise SiteFault(site, "it is not in U2")
        bound = (self._cohort.session, self._u2_hash, party(site), header.input_hash)
        self._pinned.verify(site, header.signature, "R2", *bound)
        check_vector(vector)
        if vector.dtype != self._total.dtype or vector.shape != self._total.shape:
            raise SiteFault(site, f"its input is not {len(self._total)} {self._total.dtype} words")
        if hashlib.sha256(vector.data).digest() != header.input_hash:
            raise SiteFault(site, "its input is not the one it signed")
        np.add(self._total, vector, out=self._total)
        self._headers[site] = header
        self._note("R2", site, message)

    def add_complaint(self, site: int, message: bytes) -> frozenset[int]:
        """R2: hear a site that cannot use an envelope; returns the suspects, one of them at fault.

        Raises:
            SiteFault: It was dealt no such envelope, or wrong signature.
            ProtocolError: Malformed or late.
        """
        complaint = wire.decode_complaint(message)
        self._is_new("R2", site, complaint.site, message)
        envelope = self._sealed.get(complaint.dealer, {}).get(site)
        if envelope is None or site not in self._u2:
            raise SiteFault(site, "it complains of a site that dealt it no shares")
        self._suspects[site] = judge(self._cohort, self._pinned, complaint, envelope)
        self._note("R2", site, message)
        return self._suspects[site]

    @property
    def suspects(self) -> dict[int, frozenset[int]]:
        """For each site that complained: the suspects, of whom at least one is at fault."""
        return dict(self._suspects)

    def close_masked(self) -> dict[int, bytes]:
        """R3: freeze U3; returns the message of every site in it.

        Raises:
            CohortTooSmall: Too few sites are left.
            ProtocolError: Too few holders of some site's shares are left.
        """
        self._check_open("R2")
        cohort, sites = self._cohort, frozenset(self._headers)
        self._check_left(sites, "U3")
        for dealer in self._needed():
            cohort.check_held(sites, dealer, "U3")
        headers = [self._headers[site] for site in sorted(sites)]
        inputs = ((header.site, header.input_hash) for header in headers)
        u3_hash = survivors_hash(cohort.session, self._u2_hash, inputs)
        self._outcome = Outcome(
            session=cohort.session, survivors=tuple(sorted(sites)), survivors_hash=u3_hash
        )
        self._stage = "R3"
        return dict.fromkeys(self._outcome.survivors, wire.encode_survivors(headers))

    def add_consistency(self, site: int, message: bytes) -> None:
        """R3: take a survivor's signature.

        Raises:
            SiteFault: Not in U3, or the signature is not over this survivor set.
            ProtocolError: Malformed or late.
        """
        vote, outcome = wire.decode_vote(message), self._frozen
        if not self._is_new("R3", site, vote.site, message):
            return
        if site not in outcome.survivors:
            raise SiteFault(site, "it is not in U3")
        bound = (outcome.session, outcome.survivors_hash)
        self._pinned.verify(site, vote.signature, "R3", *bound)
        self._votes[site] = vote
        self._note("R3", site, message)

    def close_consistency(self) -> dict[int, bytes]:
        """R4: put the certificate together; returns the message of every survivor.

        Raises:
            CohortTooSmall: Fewer signatures than the quorum.
        """
        self._check_open("R3")
        votes, quorum = len(self._votes), self._cohort.need.quorum
        if votes < quorum:
            raise CohortTooSmall(f"{votes} sites signed the survivor set, {quorum} are needed")
        self._certificate = wire.encode_certificate(self._votes[s] for s in sorted(self._votes))
        self._stage = "R4"
        return dict.fromkeys(self._frozen.survivors, self._certificate)

    def add_unmask(self, site: int, message: bytes) -> None:
        """R4: take a survivor's shares.

        Raises:
            SiteFault: Not in U3, not one share of each dealer, or a share that is not the one its
                dealer committed to.
            ProtocolError: Malformed or late.
        """
        released = wire.decode_released(message)
        if not self._is_new("R4", site, released.site, message):
            return
        if site not in self._frozen.survivors:
            raise SiteFault(site, "it is not in U3")
        present = frozenset(self._u2)
        dealers = [other for other in self._cohort.graph.circle(site) if other in present]
        if [dealer for dealer, _ in released.shares] != dealers:
            raise SiteFault(site, "its shares are not one of each of its dealers")
        for dealer, share in released.shares:
            kind = "hb" if dealer in self._headers else "hs"
            found = share_commitment(kind, self._cohort.session, dealer, site, share)
            if found != self._commitment(dealer, site):
                raise SiteFault(site, f"it changed its share of site {dealer}")
        for dealer, share in released.shares:
            point = self._cohort.graph.point(dealer, site)
            self._released.setdefault(dealer, {})[point] = share
        self._note("R4", site, message)

    @property
    def complete(self) -> bool:
        """Whether enough shares are there for :meth:`result`."""
        return self._stage == "R4" and all(
            len(self._released.get(dealer, {})) >= self._cohort.need.threshold
            for dealer in self._needed()
        )

    def result(self) -> SumResult:
        """Give back every mask and return the sum.

        Raises:
            CohortTooSmall: Too few shares of some site; more may still be added.
            SiteFault: A dealer shared something else than its secret; it is named, and the session
                is over.
        """
        self._check_open("R4")
        if not self.complete:
            raise CohortTooSmall("too few sites released their shares: the sum stays masked")
        self._stage = "done"
        add, subtract = self._mask_keys()
        apply_masks(self._total, add=add, subtract=subtract, threads=self._threads)
        self._total.setflags(write=False)
        return SumResult(
            parameters=self.parameters,
            words=self._total,
            outcome=self._frozen,
            certificate=self._certificate,
        )

    def _mask_keys(self) -> tuple[list[bytes], list[bytes]]:
        """Keys of the masks that must be added and subtracted to leave the plain sum."""
        add: list[bytes] = []
        subtract: list[bytes] = []
        session, graph = self._cohort.session, self._cohort.graph
        for dealer in self._needed():
            secret = self._join(dealer)
            if dealer in self._headers:
                subtract.append(self_mask_key(secret, session, dealer))
                continue
            # A dropped site's pair masks stand in its neighbours' inputs with the neighbours' sign.
            private = X25519PrivateKey.from_private_bytes(secret)
            for other in graph.neighbours(dealer):
                if other in self._headers:
                    shared = agree(private, other, self._cohort.hellos[other].mask_key)
                    key = pair_mask_key(shared, session, dealer, other, self._u2_hash)
                    (subtract if other < dealer else add).append(key)
        return add, subtract

    def _join(self, dealer: int) -> bytes:
        """A survivor's seed or a dropped site's mask key, checked against what the dealer fixed."""
        cohort = self._cohort
        try:
            secret = shamir.join(self._released[dealer], cohort.need.threshold)
        except ProtocolError as error:
            raise SiteFault(dealer, "its shares do not lie on one polynomial") from error
        if dealer in self._headers:
            holds = seed_commitment(cohort.session, secret) == self._shares[dealer].seed_commitment
        else:
            public = X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
            holds = public == cohort.hellos[dealer].mask_key
        if not holds:
            raise SiteFault(dealer, "it shared something else than its secret")
        return secret

    def _commitment(self, dealer: int, holder: int) -> bytes:
        """What a dealer committed to for the share that U3 lets a holder release."""
        own = dealer == holder
        entry = self._shares[dealer] if own else self._sealed[dealer][holder]
        alive = dealer in self._headers
        return entry.seed_share_commitment if alive else entry.key_share_commitment

    def _needed(self) -> list[int]:
        """The dealers whose secret the sum needs: survivors, and who left masks in their inputs."""
        return [
            dealer
            for dealer in self._u2
            if any(holder in self._headers for holder in self._cohort.graph.circle(dealer))
        ]

    @property
    def _cohort(self) -> Cohort:
        if self._formed is None:
            raise ProtocolError("the session has no cohort yet: close_hellos comes first")
        return self._formed

    @property
    def _frozen(self) -> Outcome:
        if self._outcome is None:
            raise ProtocolError("the session has no survivors yet: close_masked comes first")
        return self._outcome

    def _check_left(self, sites: frozenset[int], name: str) -> None:
        """What every site of U2 or U3 will check for itself."""
        self._cohort.check_enough(sites, name)
        for site in sites:
            self._cohort.check_held(sites, site, name)

    def _check_open(self, stage: str) -> None:
        if self._stage != stage:
            raise ProtocolError(f"{stage} is not open: the session is in {self._stage}")

    def _is_new(self, stage: str, site: int, named: int, message: bytes) -> bool:
        """Refuse a late message, one in another's name or a second one; ignore a repetition."""
        self._check_open(stage)
        if named != site:
            raise SiteFault(site, f"it speaks in the name of site {named}")
        before = self._seen.get((stage, site))
        if before is not None and before != digest(message):
            raise SiteFault(site, f"it sent two different messages in {stage}")
        return before is None

    def _note(self, stage: str, site: int, message: bytes) -> None:
        self._seen[stage, site] = digest(message)
