"""Shamir's secret sharing (CACM 22, 1979) of 32-byte secrets over the prime 2^256 + 297."""

import functools
import math
from collections.abc import Callable, Mapping

from fedward.errors import ProtocolError

PRIME = 2**256 + 297
"""The smallest prime above every 32-byte secret."""

SECRET_BYTES = 32
SHARE_BYTES = 33


def split(
    secret: bytes, *, threshold: int, holders: int, secrets: Callable[[int], bytes]
) -> list[bytes]:
    """Share a secret among holders; the share at index ``i`` is the polynomial at ``x = i + 1``.

    Args:
        secret: 32 bytes, read as a big-endian integer.
        threshold: Shares that give the secret back, 1 to ``holders``.
        holders: Number of shares.
        secrets: Source of secret bytes, such as ``os.urandom``.

    Returns:
        ``holders`` shares of 33 bytes.

    Guarantees:
        Fewer than ``threshold`` shares are independent of the secret, up to a bias of 2^-127 in
        the coefficients (48 bytes reduced modulo the prime).
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= holders:
        raise ProtocolError(
            f"cannot share {len(secret)} bytes {threshold}-of-{holders}: expected {SECRET_BYTES} "
            "bytes and a threshold of 1 to the number of holders"
        )
    coefficients = [int.from_bytes(secrets(48), "big") % PRIME for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))
    return [_evaluate(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in range(1, holders + 1)]


def _evaluate(coefficients: list[int], x: int) -> int:
    """Horner's rule, highest coefficient first."""
    value = 0
    for coefficient in coefficients:
        value = (value * x + coefficient) % PRIME
    return value


def join(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Interpolate the secret from ``threshold`` shares, those with the smallest ``x``.

    Args:
        shares: ``x`` (from 1) to share.
        threshold: The threshold of :func:`split`.

    Raises:
        ProtocolError: Too few shares, a malformed share, or shares that do not lie on one
            polynomial with a 32-byte secret. Other inconsistent shares give a wrong secret: the
            caller checks it against a commitment.
    """
    if len(shares) < threshold:
        raise ProtocolError(f"a secret needs {threshold} shares, there are {len(shares)}")
    points = tuple(sorted(shares)[:threshold])
    values = [int.from_bytes(shares[x], "big") for x in points]
    if any(len(shares[x]) != SHARE_BYTES for x in points) or max(values) >= PRIME:
        raise ProtocolError(f"a share has {SHARE_BYTES} bytes and is below the prime")
    weights = _weights_at_zero(points)
    secret = sum(w * y for w, y in zip(weights, values, strict=True)) % PRIME
    if secret.bit_length() > 8 * SECRET_BYTES:
        raise ProtocolError("the shares do not lie on one polynomial")
    return secret.to_bytes(SECRET_BYTES, "big")


@functools.lru_cache(maxsize=1024)
def _weights_at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at 0: the product over j of x_j / (x_j - x_i).

    Cached because most dealers of a session are interpolated at the same points, and inverted all
    at once (Montgomery's trick) because one inversion costs as much as a hundred products.
    """
    whole = math.prod(points) % PRIME
    lower = [x * math.prod(other - x for other in points if other != x) % PRIME for x in points]
    prefixes = [1]
    for value in lower:
        prefixes.append(prefixes[-1] * value % PRIME)
    inverse = pow(prefixes[-1], -1, PRIME)
    weights: list[int] = []
    for value, prefix in zip(reversed(lower), reversed(prefixes[:-1]), strict=True):
        weights.append(whole * inverse * prefix % PRIME)
        inverse = inverse * value % PRIME
    return tuple(reversed(weights))
