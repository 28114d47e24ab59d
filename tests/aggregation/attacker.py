"""What a malicious coordinator has at hand: delivery of any message, and arithmetic."""

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedward.aggregation.envelopes import agree
from fedward.aggregation.masks import Words, apply_masks
from fedward.aggregation.transcript import pair_mask_key, self_mask_key
from fedward.errors import ProtocolError
from tests.aggregation.rig import Rig

VICTIM = 1
METHODS = {"R0": "hello", "R1": "shares", "R3": "consistency", "R4": "unmask"}


def refused(
    rig: Rig, stage: str, message: bytes, site: int = VICTIM, match: str | None = None
) -> None:
    """The site aborts, says nothing, and stays dead even for the honest message."""
    session = rig.sessions[site]
    with pytest.raises(ProtocolError, match=match):
        deliver(rig, stage, message, site)
    assert session.dead
    for again in (message, rig.heard["R0"].get(site, rig.tally.request())):
        with pytest.raises(ProtocolError):
            deliver(rig, stage, again, site)
    assert site not in rig.said["R4"]


def state(rig: Rig, site: int) -> Any:
    """What a session holds, for whoever owns the site."""
    return rig.sessions[site]._state


def deliver(rig: Rig, stage: str, message: bytes, site: int = VICTIM) -> Any:
    session = rig.sessions[site]
    if stage == "R2":
        return session.masked(message, rig.inputs[site].copy())
    return getattr(session, METHODS[stage])(message)


def open_input(
    rig: Rig,
    site: int,
    vector: Words,
    seed: bytes,
    mask_key: bytes,
    u2: tuple[int, ...],
    u2_hash: bytes,
) -> Words:
    """What anyone can do who has a site's masked input and both of its secrets."""
    cohort, opened = rig.tally._cohort, vector.copy()
    private = X25519PrivateKey.from_private_bytes(mask_key)
    add: list[bytes] = []
    subtract = [self_mask_key(seed, cohort.session, site)]
    for other in cohort.graph.neighbours(site):
        if other in u2:
            shared = agree(private, other, cohort.hellos[other].mask_key)
            key = pair_mask_key(shared, cohort.session, site, other, u2_hash)
            (subtract if site < other else add).append(key)
    apply_masks(opened, add=add, subtract=subtract)
    return opened
