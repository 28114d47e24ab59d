"""What a malicious coordinator has at hand: delivery of any message, and arithmetic."""

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedward.aggregation.envelopes import agree
from fedward.aggregation.masks import apply_masks
from fedward.aggregation.transcript import pair_mask_key, self_mask_key
from fedward.errors import ProtocolError

VICTIM = 1
METHODS = {"R0": "hello", "R1": "shares", "R3": "consistency", "R4": "unmask"}


def refused(rig, stage, message, site=VICTIM, match=None):
    """The site aborts, says nothing, and stays dead even for the honest message."""
    session = rig.sessions[site]
    with pytest.raises(ProtocolError, match=match):
        deliver(rig, stage, message, site)
    assert session.dead
    for again in (message, rig.heard["R0"].get(site, rig.tally.request())):
        with pytest.raises(ProtocolError):
            deliver(rig, stage, again, site)
    assert site not in rig.said["R4"]
    return session


def deliver(rig, stage, message, site=VICTIM):
    session = rig.sessions[site]
    if stage == "R2":
        return session.masked(message, rig.inputs[site].copy())
    return getattr(session, METHODS[stage])(message)


def open_input(rig, site, vector, seed, mask_key, u2, u2_hash):
    """What anyone can do who has a site's masked input and both of its secrets."""
    cohort, opened = rig.tally._cohort, vector.copy()
    private = X25519PrivateKey.from_private_bytes(mask_key)
    add, subtract = [], [self_mask_key(seed, cohort.session, site)]
    for other in cohort.graph.neighbours(site):
        if other in u2:
            shared = agree(private, other, cohort.hellos[other].mask_key)
            key = pair_mask_key(shared, cohort.session, site, other, u2_hash)
            (subtract if site < other else add).append(key)
    apply_masks(opened, add=add, subtract=subtract)
    return opened
