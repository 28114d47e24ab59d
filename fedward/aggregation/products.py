"""LoRA's layers in a flat vector, and the best factors of what a layer's product should become.

A layer's product is B·A with B (m x r) and A (r x n). What a mean makes of it comes as two thin
matrices, (m x k) and (k x n), whose product it is; the best rank r of that is the next adapter. An
SVD has not the same last bits everywhere, so the coordinator publishes the factors and sites check
them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedward.aggregation.schemes import Layout, Vector, next_vector
from fedward.canonical import digest
from fedward.errors import ProtocolError
from fedward.privacy.noise import SecureStream

Numbers = npt.NDArray[np.float64]

TOLERANCE = 1e-5
"""How far a published product may be from the best one, relative to it; SVD libraries differ in
their last bits, and factors are float32."""

_OVERSAMPLING = 4


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One LoRA layer: where its A (r x n) and B (m x r) lie in the vector."""

    name: str
    a: slice
    b: slice
    m: int
    n: int
    r: int

    @property
    def width(self) -> int:
        """``s``: columns of Ω, and the rank that a rebuilt covariance can have."""
        return min(self.r + _OVERSAMPLING, self.m, self.n)

    def factors(self, vector: Vector | Numbers) -> tuple[Numbers, Numbers]:
        """B and A in float64."""
        b, a = vector[self.b].astype(np.float64), vector[self.a].astype(np.float64)
        return b.reshape(self.m, self.r), a.reshape(self.r, self.n)

    def omega(self, key: bytes) -> Numbers:
        """Ω (n x s), orthonormal columns, public."""
        return orthonormal(digest("sketch of columns", key, self.name), self.n, self.width)


Product = tuple[Pair, Numbers, Numbers]
"""A layer and two thin matrices, (m x k) and (k x n), whose product its own should become."""


def orthonormal(seed: bytes, rows: int, columns: int) -> Numbers:
    """Random orthonormal columns that the seed alone decides."""
    drawn = SecureStream(seed).normal(rows * columns).reshape(rows, columns)
    return np.linalg.qr(drawn)[0]


def shrunk(first: float, second: float, clip: float) -> float:
    """The largest f <= 1 for which ``f^2 * first + f^4 * second`` is at most ``clip^2``.

    An update of squared length ``first`` with sketches of products, of squared length ``second``,
    is scaled by it before it is sketched: products shrink with the square of a factor.
    """
    if first + second <= clip**2:
        return 1.0
    return math.sqrt(2 * clip**2 / (first + math.sqrt(first**2 + 4 * second * clip**2)))


def best_factors(
    start: Vector, mean: Numbers, layout: Layout, products: Iterable[Product]
) -> Vector:
    """The next trained parameters: the best rank r of each product, and the mean of all else.

    A comes out with orthonormal rows in the order of importance, the product's size in B: so a
    direction that the mean does not have yet can still be learned.

    Args:
        start: ``(d,)`` float32.
        mean: Its first d numbers are the mean update.
        layout: Of ``start``.
        products: One for each layer.
    """
    after = np.zeros_like(start)
    for pair, left, right in products:
        (q, upper), (p, lower) = np.linalg.qr(left), np.linalg.qr(right.T)
        u, sizes, v = np.linalg.svd(upper @ lower.T, full_matrices=False)
        kept = min(pair.r, len(sizes))
        b, a = np.zeros((pair.m, pair.r)), np.zeros((pair.r, pair.n))
        b[:, :kept] = (q @ u[:, :kept]) * sizes[:kept]
        a[:kept] = v[:kept] @ p.T
        after[pair.b], after[pair.a] = b.ravel(), a.ravel()
    rest = split(layout)[1]
    after[rest] = next_vector(start[rest], mean[rest])
    return after


def check_factors(
    start: Vector, mean: Numbers, layout: Layout, products: Iterable[Product], after: Vector
) -> None:
    """Check that published parameters are what :func:`best_factors` makes of the same.

    Raises:
        ProtocolError: A product is off the best of its rank by more than :data:`TOLERANCE` of the
            mean's, or the rows of its A are not orthonormal by as much; or another parameter
            differs in any bit.
    """
    rest = split(layout)[1]
    expected = next_vector(start[rest], mean[rest])
    if after.shape != start.shape or after[rest].tobytes() != expected.tobytes():
        raise ProtocolError("the parameters beside the products are not what the sum gives")
    for pair, left, right in products:
        b, a = pair.factors(after)
        sizes = np.linalg.svd(_core(left, right), compute_uv=False)
        tail, size = np.linalg.norm(sizes[pair.r :]), np.linalg.norm(sizes)
        off = np.linalg.norm(_core(np.hstack([left, -b]), np.vstack([right, a])))
        upright = np.diag(np.arange(pair.r) < len(sizes)).astype(np.float64)
        turned = np.linalg.norm(a @ a.T - upright)
        # What is off the best of its rank is nearly orthogonal to what no such rank can have.
        if not (off**2 - tail**2 <= (TOLERANCE * size) ** 2 and turned <= TOLERANCE):
            raise ProtocolError(f"the product of {pair.name} is not what the published sum gives")


def split(layout: Layout) -> tuple[list[Pair], npt.NDArray[np.intp]]:
    """The LoRA layers of a layout, and the places of all other parameters.

    Raises:
        ProtocolError: An A without its B, or of shapes that do not go together.
    """
    places, start = dict[str, tuple[slice, tuple[int, ...]]](), 0
    for name, shape in layout:
        end = start + int(np.prod(shape, dtype=np.int64))
        places[name] = (slice(start, end), shape)
        start = end
    pairs, rest = list[Pair](), np.ones(start, dtype=bool)
    for name, (a, shape) in places.items():
        if ".lora_A." not in name:
            continue
        b, other = places.get(name.replace(".lora_A.", ".lora_B."), (slice(0), ()))
        if len(shape) != 2 or len(other) != 2 or shape[0] != other[1]:
            raise ProtocolError(f"{name} of shape {shape} has no B that it goes with")
        (r, n), (m, _) = shape, other
        pairs.append(Pair(name=name, a=a, b=b, m=m, n=n, r=r))
        rest[a] = rest[b] = False
    return pairs, np.flatnonzero(rest)


def _core(left: Numbers, right: Numbers) -> Numbers:
    """A small matrix with the singular values of a product of thin ones."""
    core: Numbers = np.linalg.qr(left)[1] @ np.linalg.qr(right.T)[1].T
    return core
