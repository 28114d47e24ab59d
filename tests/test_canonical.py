"""Canonical JSON and the length-prefixed digest: known answers, and one encoding for one value."""

import hashlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward.canonical import canonical_json, digest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
FIELDS = st.lists(st.binary(max_size=4), max_size=4)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (None, b"null"),
        (True, b"true"),
        (-0.0, b"-0.0"),
        (0.1, b"0.1"),
        (1e300, b"1e+300"),
        (math.inf, b"Infinity"),
        ((1, 2), b"[1,2]"),
        ("Ä\n", b'"\xc3\x84\\n"'),
        ({"é": 1, "e": {"b": [], "a": {}}}, b'{"e":{"a":{},"b":[]},"\xc3\xa9":1}'),
    ],
)
def test_canonical_json_known_answers(value, encoded):
    assert canonical_json(value) == encoded


@given(JSON)
def test_canonical_json_reads_back_as_the_value(value):
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_the_order_of_keys_leaves_no_trace(value):
    assert canonical_json(value) == canonical_json({key: value[key] for key in reversed(value)})


@pytest.mark.parametrize(
    ("fields", "hashed"),
    [
        ((), b""),
        ((b"",), bytes(8)),
        (("ab", b"\xff"), bytes(7) + b"\x02ab" + bytes(7) + b"\x01\xff"),
        ((bytes(300),), bytes(6) + b"\x01\x2c" + bytes(300)),
    ],
)
def test_digest_hashes_every_field_behind_its_length(fields, hashed):
    assert digest(*fields) == hashlib.sha256(hashed).digest()


def test_digest_known_answer():
    expected = "9fe9532abb94476c09a0802fea6788b2f5327b8ffd1f0daf7bcbf9f76e7e36ac"
    assert digest("fedward", b"\x00\x01").hex() == expected


@given(FIELDS, FIELDS)
def test_digest_separates_every_two_lists_of_fields(one, other):
    assert (digest(*one) == digest(*other)) == (one == other)


@given(st.binary(min_size=1, max_size=6), st.data())
def test_digest_separates_what_concatenation_confuses(joined, data):
    cuts = st.integers(0, len(joined))
    one, other = data.draw(cuts), data.draw(cuts)
    split = [(joined[:cut], joined[cut:]) for cut in (one, other)]
    assert b"".join(split[0]) == b"".join(
        split[1]
    )  # the negative control: no prefix, no difference
    assert (digest(*split[0]) == digest(*split[1])) == (one == other)


def test_a_tag_is_ascii():
    with pytest.raises(UnicodeEncodeError):
        digest("Ä")
