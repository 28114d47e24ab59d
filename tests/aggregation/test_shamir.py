"""Any threshold of shares gives the secret; fewer say nothing."""

import os
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward.aggregation import shamir
from fedward.errors import ProtocolError
from tests.aggregation.rig import secrets_of


@given(st.binary(min_size=32, max_size=32), st.data())
def test_any_threshold_of_shares(secret, data):
    holders = data.draw(st.integers(1, 12))
    threshold = data.draw(st.integers(1, holders))
    shares = shamir.split(secret, threshold=threshold, holders=holders, secrets=os.urandom)
    points = data.draw(
        st.lists(st.integers(1, holders), min_size=threshold, max_size=holders, unique=True)
    )
    assert shamir.join({x: shares[x - 1] for x in points}, threshold) == secret


def test_one_share_less_fits_every_secret():
    """With t - 1 shares each candidate secret lies on exactly one polynomial."""
    shares = shamir.split(bytes(32), threshold=3, holders=5, secrets=os.urandom)
    known = {1: shares[0], 4: shares[3]}
    for candidate in (bytes(32), bytes([255]) * 32):
        points = {0: int.from_bytes(candidate, "big")}
        points |= {x: int.from_bytes(y, "big") for x, y in known.items()}
        third = 0
        for x, y in points.items():
            weight = Fraction(1)
            for other in points:
                if other != x:
                    weight *= Fraction(2 - other, x - other)
            third += y * weight.numerator * pow(weight.denominator, -1, shamir.PRIME)
        found = shamir.join({**known, 2: (third % shamir.PRIME).to_bytes(33, "big")}, 3)
        assert found == candidate


def test_shares_are_fresh():
    args = {"threshold": 2, "holders": 3}
    one = shamir.split(bytes(32), secrets=os.urandom, **args)
    assert one != shamir.split(bytes(32), secrets=os.urandom, **args)
    fixed = [shamir.split(bytes(32), secrets=secrets_of("x"), **args) for _ in range(2)]
    assert fixed[0] == fixed[1], "control: the coefficients are what makes them differ"


def test_the_modulus_is_the_prime_of_the_specification():
    assert shamir.PRIME == 2**256 + 297
    assert all(pow(a, shamir.PRIME - 1, shamir.PRIME) == 1 for a in (2, 3, 5, 7, 11, 13))
    # Base 3: the Fermat number 2^256 + 1 passes for a prime in base 2.
    assert not any(pow(3, p - 1, p) == 1 for p in range(2**256 + 1, shamir.PRIME, 2))


def test_secrets_beyond_32_bytes_are_no_secrets():
    """A polynomial whose value at 0 is the prime minus one cannot be a dealer's."""
    high = (shamir.PRIME - 1).to_bytes(33, "big")
    with pytest.raises(ProtocolError, match="polynomial"):
        shamir.join({1: high, 2: high}, 2)


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), b"\xff" * 33])
def test_malformed_shares(share):
    with pytest.raises(ProtocolError):
        shamir.join({1: share, 2: bytes(33)}, 2)


def test_too_few_shares():
    with pytest.raises(ProtocolError, match="needs 2"):
        shamir.join({1: bytes(33)}, 2)


@pytest.mark.parametrize(("size", "threshold"), [(31, 2), (33, 2), (32, 0), (32, 4)])
def test_what_cannot_be_shared(size, threshold):
    with pytest.raises(ProtocolError):
        shamir.split(bytes(size), threshold=threshold, holders=3, secrets=os.urandom)
