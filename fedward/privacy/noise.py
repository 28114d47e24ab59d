"""One cryptographic stream for everything random that the guarantee depends on.

Noise, Poisson draws and stochastic rounding read AES-256 in counter mode. Torch's CPU generator
keeps 32 bits of its seed and CUDA's Philox is no cryptographic generator: whoever can guess the
state can subtract the noise.
"""

import hmac
import math
import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fedward.canonical import digest

_KEY_BYTES = 32
_CHUNK = 1 << 13  # words drawn at a time: 64 KiB, so that temporaries stay in the cache


class SecureStream:
    """An endless stream of words, uniforms, normals and integers from one 32-byte key.

    Args:
        key: 32 secret bytes. Left out, they come from the operating system, as they must wherever
            real records are used; only tests and simulations fix a key.

    Guarantees:
        Outputs are indistinguishable from uniform to whoever lacks the key, as far as AES-256 is a
        pseudorandom permutation (NIST SP 800-38A, section 6.5; at most 2^40 words a key).
    """

    def __init__(self, key: bytes | None = None) -> None:
        key = os.urandom(_KEY_BYTES) if key is None else key
        if len(key) != _KEY_BYTES:
            raise ValueError(f"a stream's key has {_KEY_BYTES} bytes, not {len(key)}")
        self._key = key
        # Every key serves one stream only, so the counter may start at zero.
        self._encryptor = Cipher(AES256(self._derive("words")), CTR(bytes(16))).encryptor()

    def _derive(self, *labels: bytes | str) -> bytes:
        return hmac.digest(self._key, digest("fedward stream", *labels), "sha256")

    def child(self, *labels: bytes | str) -> "SecureStream":
        """An independent stream named by the labels, whatever was drawn from this one before.

        Args:
            labels: Text (as UTF-8) or bytes; the same labels give the same stream.
        """
        encoded = (label.encode() if isinstance(label, str) else label for label in labels)
        return SecureStream(self._derive("child", *encoded))

    def words(self, n: int) -> npt.NDArray[np.uint64]:
        """The next ``n`` uniform 64-bit words, shape ``(n,)``."""
        words = np.zeros(n, dtype="<u8")  # little-endian everywhere: the same bytes, the same words
        for start in range(0, n, _CHUNK):
            piece = words[start : start + _CHUNK]
            piece[:] = np.frombuffer(self._encryptor.update(piece.tobytes()), dtype="<u8")
        return words.astype(np.uint64, copy=False)

    def uniform(self, n: int) -> npt.NDArray[np.float64]:
        """The next ``n`` uniforms in ``(0, 1]``: multiples of 2^-53, shape ``(n,)``."""
        return ((self.words(n) >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53

    def normal(self, n: int) -> npt.NDArray[np.float64]:
        """The next ``n`` standard normals by Box and Muller (1958), shape ``(n,)``."""
        normals = np.empty(n)
        for start in range(0, n, _CHUNK):
            piece = normals[start : start + _CHUNK]
            half = (len(piece) + 1) // 2
            uniform = self.uniform(2 * half)
            radius = np.sqrt(-2.0 * np.log(uniform[:half]))
            # By the tangent t of half the angle 2 pi u, cos = (1 - t^2) / (1 + t^2) and
            # sin = 2 t / (1 + t^2): numpy's own cosine and sine take ten times as long.
            tangent = np.tan(math.pi * uniform[half:])
            over = radius / (1.0 + tangent * tangent)
            piece[:half] = 2.0 * over - radius
            piece[half:] = (2.0 * tangent * over)[: len(piece) - half]
        return normals

    def integers(self, n: int, bound: int) -> npt.NDArray[np.int64]:
        """The next ``n`` integers, exactly uniform in ``0 .. bound - 1``, shape ``(n,)``.

        Args:
            n: How many.
            bound: 1 to 2^63.
        """
        if not 1 <= bound <= 2**63:
            raise ValueError(f"bound = {bound}: expected 1 to 2^63")
        # Words above the last whole multiple of the bound would favour small remainders.
        highest = np.uint64(2**64 // bound * bound - 1)
        kept = np.empty(0, dtype=np.uint64)
        while len(kept) < n:
            words = self.words(n - len(kept))
            kept = np.concatenate([kept, words[words <= highest]])
        return (kept % np.uint64(bound)).astype(np.int64)

    def choose(self, n: int, size: int) -> npt.NDArray[np.int64]:
        """``size`` different integers of ``0 .. n - 1`` in random order (Fisher and Yates).

        Args:
            n: How many there are to choose from.
            size: How many are chosen, 0 to n.
        """
        if not 0 <= size <= n:
            raise ValueError(f"size = {size}: expected 0 to {n}")
        pool = np.arange(n)
        for place in range(size):
            other = place + int(self.integers(1, n - place)[0])
            pool[[place, other]] = pool[[other, place]]
        return pool[:size]
