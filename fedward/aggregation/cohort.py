"""The cohort of a session: what R1 fixes, derived alike by every site and by the tally."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedward.aggregation import wire
from fedward.aggregation.graph import Graph, Thresholds, thresholds
from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.transcript import SiteFault, party, session_id, verify
from fedward.canonical import digest
from fedward.errors import CohortTooSmall, ProtocolError
from fedward.identity import Roster


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """The sites of U1 with everything that follows from them; public.

    Args:
        session: ``sid``.
        hellos: By site, ordered by id.
        need: Quorum, degree and threshold.
        minimum: Fewest sites in U2 and U3: the larger of quorum and ``U_min``.
        graph: Who is whose neighbour.
    """

    session: bytes
    hellos: Mapping[int, wire.Hello]
    need: Thresholds
    minimum: int
    graph: Graph

    def check_enough(self, sites: frozenset[int], name: str) -> None:
        """Check the size of U2 or U3.

        A small set isolates a site's input among colluders, and below the quorum no certificate is
        unique.

        Raises:
            CohortTooSmall: Fewer than ``minimum``.
        """
        if len(sites) < self.minimum:
            raise CohortTooSmall(f"{name} has {len(sites)} sites, the session needs {self.minimum}")

    def check_held(self, sites: frozenset[int], site: int, name: str) -> None:
        """Check that enough holders of a site's shares are in U2 or U3.

        On the ring a gap could cut a group of sites off and give their sum alone (§5).

        Raises:
            ProtocolError: Fewer than the threshold.
        """
        around = sum(other in sites for other in self.graph.circle(site))
        if around < self.need.threshold:
            raise ProtocolError(
                f"{name} has {around} holders of site {site}'s shares, the session needs "
                f"{self.need.threshold}"
            )


class PinnedKeys:
    """The roster's keys by site.

    Args:
        roster: The pinned roster.
    """

    def __init__(self, roster: Roster) -> None:
        self._keys = {member.id: member.public_key for member in roster.members}

    def verify(self, site: int, signature: bytes, stage: str, *fields: bytes) -> None:
        """Check ``Sig_stage(fields..)`` of a member.

        Raises:
            SiteFault: No member, or the signature does not hold.
        """
        if site not in self._keys:
            raise SiteFault(site, "it is not in the pinned roster")
        verify(site, self._keys[site], signature, stage, *fields)


def hello_fields(parameters: bytes, hello: wire.Hello) -> tuple[bytes, ...]:
    """What a hello's signature covers: H(P), I, cpk, spk, r."""
    keys = (hello.envelope_key, hello.mask_key, hello.nonce)
    return (digest(parameters), party(hello.site), *keys)


def form_cohort(
    parameters: SessionParameters, pinned: PinnedKeys, hellos: Iterable[wire.Hello]
) -> Cohort:
    """Check the hellos of R1 and derive what follows from them.

    Args:
        parameters: The session's parameters.
        pinned: The pinned keys.
        hellos: Ordered by site.

    Raises:
        CohortTooSmall: Fewer sites than the minimum; the quorum is never more than all of them.
        ProtocolError: Another check failed.
    """
    members = {hello.site: hello for hello in hellos}
    if len(members) < parameters.minimum:
        raise CohortTooSmall(f"U1 has {len(members)} sites, the session needs {parameters.minimum}")
    # A second pass over other sites than the first would give the difference away: whoever is in
    # one sum alone. Fewer than all are fewer than the minimum here, and in U2 and U3 as well. And
    # a site of another group has a sum of its own.
    if parameters.allowed and not set(members) <= set(parameters.allowed):
        raise ProtocolError("U1 holds sites that are not in the cohort of the first pass or group")
    if len(members) > parameters.grid.sites:
        raise ProtocolError(f"{len(members)} sites, the session's grid is made for fewer")
    # One key under two names would let its owner cancel masks, or stand in for another site.
    keys = [key for h in members.values() for key in (h.envelope_key, h.mask_key)]
    if len(set(keys)) != len(keys):
        raise ProtocolError("a key stands twice among the cohort's keys")
    # Signed over the hash of these very parameters under pinned keys: no stranger, no swapped key,
    # no hello of another session, and nobody who was shown other parameters.
    raw = parameters.to_bytes()
    for hello in members.values():
        pinned.verify(hello.site, hello.signature, "R0", *hello_fields(raw, hello))
    session = session_id(raw, (hello.record() for hello in members.values()))
    need = thresholds(len(members), parameters.colluders, parameters.dropouts)
    return Cohort(
        session=session,
        hellos=members,
        need=need,
        minimum=max(need.quorum, parameters.minimum),
        graph=Graph(session, members, need.neighbours),
    )
