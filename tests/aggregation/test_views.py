"""What the coordinator sees, alone and with colluders, says nothing about one site's input."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedward.aggregation.envelopes import agree
from fedward.aggregation.masks import Words, apply_masks
from fedward.aggregation.transcript import pair_mask_key, self_mask_key
from tests.aggregation.attacker import VICTIM, state
from tests.aggregation.rig import Rig, make_rig
from tests.aggregation.test_session import looks_uniform


def without_the_masks_of(rig: Rig, colluders: tuple[int, ...], held: dict[int, Any]) -> Words:
    """The victim's masked input after its colluding neighbours have taken their masks away."""
    rest = rig.vectors[VICTIM].copy()
    cohort, u2_hash = rig.tally._cohort, rig.tally._u2_hash
    for site in colluders:
        private = held[site].keys.mask
        shared = agree(private, VICTIM, cohort.hellos[VICTIM].mask_key)
        key = pair_mask_key(shared, cohort.session, VICTIM, site, u2_hash)
        apply_masks(
            rest, subtract=[key] if site > VICTIM else [], add=[] if site > VICTIM else [key]
        )
    return rest


@pytest.mark.parametrize("colluders", [(2,), (2, 3), (3, 4, 5)])
def test_colluders_take_their_masks_away(colluders):
    """One honest pair, or the self mask alone, still covers the victim before R4."""
    rig = make_rig(5, colluders=len(colluders), minimum=5, dimension=100_000)
    rig.inputs[VICTIM][:] = 9
    messages = rig.run_to("R2")
    held = {site: state(rig, site) for site in rig.sites}
    rig.exchange("R2", messages)
    rest = without_the_masks_of(rig, colluders, held)
    assert looks_uniform(rest.tobytes())


def test_after_the_session_one_honest_pair_is_enough():
    """Colluders 2 and 3 of 4 know the victim's self mask too: its mask with site 4 remains."""
    rig = make_rig(4, colluders=2, minimum=4, dimension=100_000)
    rig.inputs[VICTIM][:] = 9
    messages = rig.run_to("R2")
    held = {site: state(rig, site) for site in rig.sites}
    rig.exchange("R2", messages)
    session = rig.tally._cohort.session
    rest = without_the_masks_of(rig, (2, 3), held)
    apply_masks(rest, subtract=[self_mask_key(held[VICTIM].seed, session, VICTIM)])
    assert looks_uniform(rest.tobytes())
    apply_masks(rest, add=[self_mask_key(held[VICTIM].seed, session, VICTIM)])
    opened = without_the_masks_of(rig, (2, 3, 4), held)
    apply_masks(opened, subtract=[self_mask_key(held[VICTIM].seed, session, VICTIM)])
    assert np.all(opened == 9), "negative control: T + 1 colluders"


def views(inputs: tuple[int, int], count: int, masked: bool) -> npt.NDArray[np.float64]:
    """The bits that the coordinator gets from sites 1 and 2 holding these inputs, by session."""
    rows = []
    for _ in range(count):
        rig = make_rig(3, dimension=16)
        for site, value in zip((1, 2), inputs, strict=True):
            rig.inputs[site][:] = value
        if masked:
            rig.exchange("R2", rig.run_to("R2"))
        seen = rig.vectors if masked else rig.inputs
        bits = [np.unpackbits(seen[site].view(np.uint8)) for site in (1, 2)]
        rows.append(np.concatenate(bits))
    return np.array(rows, dtype=np.float64)


def accuracy(masked: bool) -> float:
    """How often a nearest-mean classifier tells (x1, x2) from (x2, x1) on sessions it never saw."""
    one, two = views((5, 1 << 20), 40, masked), views((1 << 20, 5), 40, masked)
    direction = one[:20].mean(axis=0) - two[:20].mean(axis=0)
    middle = (one[:20].mean(axis=0) + two[:20].mean(axis=0)) / 2
    right = [(x - middle) @ direction > 0 for x in one[20:]]
    right += [(x - middle) @ direction <= 0 for x in two[20:]]
    return float(np.mean(right))


def test_a_classifier_cannot_tell_who_sent_what():
    assert accuracy(masked=True) < 0.5 + 5 * 0.5 / np.sqrt(40)
    assert accuracy(masked=False) == 1.0, "negative control: the plain inputs"
