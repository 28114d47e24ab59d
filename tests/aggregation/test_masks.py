"""Mask streams: exact, the same in both modes, and gone when taken away again."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward.aggregation import masks
from fedward.aggregation.masks import BLOCK_WORDS, apply_masks
from fedward.errors import ProtocolError
from tests.aggregation import reference

KEYS = [bytes([n]) * 32 for n in range(6)]


@settings(max_examples=40)
@given(
    st.sampled_from([0, 1, 3, 4, 5, 15, 16, 17, 1000]),
    st.sampled_from([2, 4]),
    st.sampled_from(["gcm", "ctr"]),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_against_the_reference(size, word_bytes, mode, adds, subtracts):
    vector = np.arange(size, dtype=f"<u{word_bytes}")
    add, subtract = KEYS[:adds], KEYS[3 : 3 + subtracts]
    expected = vector.astype(object)
    for sign, keys in ((1, add), (-1, subtract)):
        for key in keys:
            expected = expected + sign * np.array(
                reference.stream(key, size, word_bytes), dtype=object
            )
    apply_masks(vector, add=add, subtract=subtract, mode=mode)
    assert vector.tolist() == [value % 2 ** (8 * word_bytes) for value in expected]


@pytest.mark.parametrize("size", [BLOCK_WORDS - 1, BLOCK_WORDS, BLOCK_WORDS + 1])
def test_modes_threads_and_chunks_agree_at_a_block_s_end(size):
    found = set()
    ways: tuple[tuple[masks.Mode, int], ...] = (("gcm", 1), ("ctr", 1), ("gcm", 3))
    for mode, threads in ways:
        vector = np.zeros(size, dtype=np.uint32)
        apply_masks(vector, add=KEYS[:1], subtract=KEYS[1:2], mode=mode, threads=threads)
        found.add(vector.tobytes())
    assert len(found) == 1


def test_what_is_added_can_be_taken_away():
    vector = np.full(100_000, 7, dtype=np.uint16)
    apply_masks(vector, add=KEYS[:2], subtract=KEYS[2:4])
    assert not np.all(vector == 7)
    apply_masks(vector, add=KEYS[2:4], subtract=KEYS[:2])
    assert np.all(vector == 7)


def test_the_chosen_mode_is_one_of_the_two():
    assert masks.fastest_mode() in ("gcm", "ctr")


def test_a_key_is_used_once():
    for add, subtract in ((KEYS[:1] * 2, []), (KEYS[:1], KEYS[:1])):
        with pytest.raises(ProtocolError, match="twice"):
            apply_masks(np.zeros(4, dtype=np.uint32), add=add, subtract=subtract)


def test_a_masked_vector_is_not_masked_again():
    vector = np.zeros(4, dtype=np.uint32)
    vector.setflags(write=False)
    with pytest.raises(ProtocolError, match="read-only"):
        apply_masks(vector, add=[os.urandom(32)])


@pytest.mark.parametrize("dtype", ["<i4", "<u8", "<f4", ">u4", ">u2"])
def test_other_types(dtype):
    with pytest.raises(ProtocolError, match="uint32 or uint16"):
        apply_masks(np.zeros(4, dtype=dtype), add=KEYS[:1])
