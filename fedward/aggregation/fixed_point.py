"""Real vectors as words of a ring: clip, stochastic rounding, and back (specification §6).

A coordinate becomes ``floor(x / gamma + u)`` in two's complement, where ``u`` is uniform in
``[0, 1)``: right in expectation, one grid step off at most. The grid is a public constant of the
plan, so a sum of all sites cannot overflow by construction.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedward.aggregation.masks import Words, check_vector, fastest_mode, keystream
from fedward.errors import InvalidValue, ProtocolError
from fedward.privacy.noise import SecureStream

_PIECE = 1 << 15  # coordinates at a time: all temporaries stay in the L2 cache
_ZEROS = memoryview(bytes(2 * _PIECE))
_FLOAT32_MARGIN = 1.0 - 2.0**-23


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The fixed-point grid of one coordinate.

    Args:
        clip: Coordinates are clipped to ±clip, 1e-30 to 1e30; an L2 bound of the vector is enough.
        sites: Most sites that one sum may have, 2 to 65536.
        word_bits: 16 or 32.

    Guarantees:
        ``sites`` encoded coordinates sum to less than 2^(word_bits - 1) in magnitude.
    """

    clip: float
    sites: int
    word_bits: int

    def __post_init__(self) -> None:
        """Check every limit."""
        if not 1e-30 <= self.clip <= 1e30:
            raise InvalidValue("clip", self.clip, "1e-30 to 1e30")
        if not 2 <= self.sites <= 65536:
            raise InvalidValue("sites", self.sites, "2 to 65536")
        if self.word_bits not in (16, 32):
            raise InvalidValue("word_bits", self.word_bits, "16 or 32")
        if self.bits < 4:
            allowed = f"at least {4 + self.word_bits - self.bits} with {self.sites} sites"
            raise InvalidValue("word_bits", self.word_bits, allowed)

    @property
    def bits(self) -> int:
        """``b``: bits of one site's coordinate, so that b + ⌈log2 N⌉ ≤ w."""
        return self.word_bits - (self.sites - 1).bit_length()

    @property
    def steps(self) -> int:
        """``m = 2^(b-1) - 1``: the largest magnitude of one site's coordinate, in grid steps."""
        return (1 << (self.bits - 1)) - 1

    @property
    def gamma(self) -> float:
        """One grid step, in the unit of the coordinate."""
        return self.clip / self.steps

    @property
    def dtype(self) -> "np.dtype[np.unsignedinteger[Any]]":
        """The type of a word."""
        return np.dtype(np.uint32) if self.word_bits == 32 else np.dtype(np.uint16)

    @property
    def signed(self) -> "np.dtype[np.signedinteger[Any]]":
        """The type of a word read in two's complement."""
        return np.dtype(np.int32) if self.word_bits == 32 else np.dtype(np.int16)


def encode(
    values: npt.NDArray[np.floating], grid: Grid, stream: SecureStream, out: Words | None = None
) -> Words:
    """Clip each coordinate to ±clip and round it stochastically to the grid.

    Args:
        values: ``(d,)``, float32 or float64.
        grid: The public grid.
        stream: Fresh cryptographic randomness; 32 bytes of it become the key of the rounding bits.
        out: ``(d,)`` words to write into; left out, a new vector.

    Returns:
        ``(d,)`` words: two's complement of at most ``grid.steps`` in magnitude.

    Raises:
        ProtocolError: NaN or infinity, which would clip to a value that looks like an update.
    """
    words: Words = np.empty(values.shape, dtype=grid.dtype) if out is None else out
    check_vector(words)
    signed = words.view(grid.signed)
    # The rounding bits have a key of their own, so that they come as fast as a mask does.
    rounding = keystream(stream.words(4).astype("<u8").tobytes(), 0, fastest_mode())
    buffer = bytearray(2 * _PIECE + 15)  # update_into wants room for a partial AES block
    bits = np.frombuffer(buffer, dtype="<u2", count=_PIECE)
    scaled, uniform = np.empty(_PIECE), np.empty(_PIECE)
    for start in range(0, len(values), _PIECE):
        piece = values[start : start + _PIECE]
        if not np.isfinite(piece).all():
            raise ProtocolError("an update holds NaN or infinity: nothing of it is sent")
        z, u = scaled[: len(piece)], uniform[: len(piece)]
        # In float64 and clipped before u is added: in float32 a clipped value plus u can round up
        # to 2^(b-1), and the sum is no longer known to fit. One type a step: numpy converts and
        # computes at once far more slowly than one after the other.
        np.copyto(z, piece)
        with np.errstate(over="ignore"):  # a product beyond float64 is clipped like any other
            z *= grid.steps / grid.clip
        np.clip(z, -grid.steps, grid.steps, out=z)
        rounding.update_into(_ZEROS[: 2 * len(piece)], buffer)
        np.copyto(u, bits[: len(piece)])
        u *= 2.0**-16
        z += u
        np.floor(z, out=z)
        np.copyto(signed[start : start + _PIECE], z, casting="unsafe")
    return words


def decode(total: Words, grid: Grid) -> npt.NDArray[np.float64]:
    """Read a sum of encoded vectors: words as signed integers, times gamma.

    Args:
        total: ``(d,)`` words, the sum modulo 2^w of at most ``grid.sites`` encoded vectors.
        grid: The grid they were encoded on.

    Returns:
        ``(d,)`` float64: the sum of the clipped vectors, to one grid step a vector.
    """
    check_vector(total)
    values, signed = np.empty(total.shape), total.view(grid.signed)
    for start in range(0, len(values), _PIECE):
        piece = values[start : start + _PIECE]
        np.copyto(piece, signed[start : start + _PIECE])
        piece *= grid.gamma
    return values


def clip_update(update: npt.NDArray[np.float32], clip: float) -> npt.NDArray[np.float32]:
    """Scale an update down to L2 norm ``clip`` if it is longer.

    Args:
        update: ``(d,)`` float32.
        clip: The plan's ``update_clip``, > 0.

    Returns:
        ``(d,)`` float32; the update itself if it is short enough.

    Raises:
        ProtocolError: NaN or infinity.

    Guarantees:
        The result's norm, computed without rounding, is at most ``clip`` (up to one part in 2^40
        from summing in float64): the scale leaves room for rounding to float32.
    """
    norm = math.sqrt(math.fsum(_squares(update)))
    if not math.isfinite(norm):
        raise ProtocolError("an update holds NaN or infinity: nothing of it is sent")
    if norm <= clip:
        return update
    scale = clip / norm * _FLOAT32_MARGIN
    scaled = np.empty_like(update)
    for start in range(0, len(update), _PIECE):
        piece = update[start : start + _PIECE]
        scaled[start : start + _PIECE] = piece.astype(np.float64) * scale
    return scaled


def _squares(update: npt.NDArray[np.float32]) -> list[float]:
    """Sums of squares of the pieces, in float64."""
    pieces = (update[i : i + _PIECE].astype(np.float64) for i in range(0, len(update), _PIECE))
    return [float(np.dot(piece, piece)) for piece in pieces]
