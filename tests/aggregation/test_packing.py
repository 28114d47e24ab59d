"""From updates to the next adapter: packed, summed, unpacked, applied."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedward.aggregation.fixed_point import Grid
from fedward.aggregation.packing import pack, unpack
from fedward.aggregation.parameters import Slot
from fedward.aggregation.rotation import rotated_grid
from fedward.aggregation.transcript import task_hash
from fedward.errors import ProtocolError
from fedward.privacy.noise import SecureStream
from tests.aggregation.rig import Rig, make_rig

SLOTS = (Slot(name="loss", clip=4.0), Slot(name="units", clip=1e5))


def packed_rig(**changes: Any) -> tuple[Rig, dict[int, npt.NDArray[np.float32]]]:
    """A session over real updates with slots; returns it with the updates."""
    rig = make_rig(4, dimension=1000, slots=SLOTS, **changes)
    generator = np.random.default_rng(3)
    updates: dict[int, npt.NDArray[np.float32]] = {}
    for site in rig.sites:
        update = generator.normal(size=1000).astype(np.float32) * 0.01
        updates[site] = update
        metrics = np.array([0.1 * site, 100.0 * site])
        rig.inputs[site] = pack(update, metrics, rig.parameters, SecureStream(bytes([site]) * 32))
    return rig, updates


def test_the_sum_is_the_plain_sum_to_the_grid():
    rig, updates = packed_rig(gone={4: "R2"})
    result = rig.run()
    expected = sum(updates[site].astype(np.float64) for site in (1, 2, 3))
    gamma = rig.parameters.grid.gamma
    np.testing.assert_allclose(result.mean * 3, expected, rtol=0, atol=3 * gamma)
    assert result.slots["loss"] == pytest.approx(0.6, abs=1e-6)
    assert result.slots["units"] == pytest.approx(600.0, abs=1e-3)


def test_sixteen_bit_words():
    rig, updates = packed_rig(grid=Grid(clip=0.05, sites=4, word_bits=16))
    result = rig.run()
    expected = sum(update.astype(np.float64) for update in updates.values())
    np.testing.assert_allclose(result.mean * 4, expected, atol=4 * rig.parameters.grid.gamma)


def test_sixteen_bit_words_rotated():
    grid = rotated_grid(1.0, 1000, sites=4)
    rig, updates = packed_rig(grid=grid, rotated=True)
    result = rig.run()
    expected = sum(update.astype(np.float64) for update in updates.values())
    allowed = 4 * grid.gamma * np.sqrt(1000)
    assert np.linalg.norm(result.mean * 4 - expected) < allowed < 0.1 * np.linalg.norm(expected)
    assert result.slots["loss"] == pytest.approx(1.0, abs=0.01)


def test_the_transcript_binds_the_sum():
    rig, _ = packed_rig()
    result = rig.run()
    other = dataclasses.replace(result, words=result.words + np.uint32(1))
    assert other.transcript != result.transcript
    assert dataclasses.replace(result).transcript == result.transcript
    assert not result.words.flags.writeable


@pytest.mark.parametrize(("size", "slots"), [(999, 2), (1000, 1), (1000, 0)])
def test_other_shapes(size, slots):
    rig = make_rig(4, dimension=1000, slots=SLOTS)
    with pytest.raises(ProtocolError, match="shapes"):
        pack(np.zeros(size, dtype=np.float32), np.zeros(slots), rig.parameters, SecureStream())
    with pytest.raises(ProtocolError, match="words"):
        unpack(np.zeros(size, dtype=np.uint32), rig.parameters)


def test_slots_that_are_not_numbers():
    rig = make_rig(4, dimension=10, slots=SLOTS)
    with pytest.raises(ProtocolError, match="NaN"):
        pack(np.zeros(10, dtype=np.float32), np.array([np.nan, 0]), rig.parameters, SecureStream())


def test_slots_are_clipped_to_their_own_bound():
    rig = make_rig(3, dimension=0, slots=SLOTS)
    for site in rig.sites:
        values = np.array([1e9, -1e9])
        nothing = np.zeros(0, dtype=np.float32)
        rig.inputs[site] = pack(nothing, values, rig.parameters, SecureStream())
    assert rig.run().slots == {"loss": 12.0, "units": -3e5}


def test_the_task_hash_binds_adapter_plan_and_rule():
    hashes = {
        task_hash(adapter, plan, rule)
        for adapter in (b"a", b"b")
        for plan in (bytes(32), bytes([1]) * 32)
        for rule in ("fedavg", "ffa")
    }
    assert len(hashes) == 8
