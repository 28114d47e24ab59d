"""Scheme ``sketch-once``: the mean of LoRA products from one masked sum.

Training moves a layer's product from B·A to (B + b)(A + a). Averaging A and B apart gets the mean
of the products wrong by the sites' covariance, mean(b·a) - mean(b)·mean(a), and the products
themselves would be m x n words. So a site sends a, b and two sketches of b·a: Y = b·a·Ω and
W = Ψᵀ·b·a, with public random Ω (n x s) and Ψ (m x l). From their means those of mean(b)·mean(a)
are taken off, and the covariance is rebuilt at rank s: with Q an orthonormal basis of what is left
of Y, it is Q (ΨᵀQ)⁺ W (Halko, Martinsson and Tropp 2011, section 5.5; Tropp et al. 2017, arXiv
1609.00048, algorithm 4). The best rank r of product and covariance is the next adapter.

The mean is exact where the covariance has at most rank s: (K - 1)·r for K sites of rank r that have
nothing in common. Sketches are functions of updates that are private already: they cost nothing.
"""

import math
from collections.abc import Iterator
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
class _Pair:
    """One LoRA layer: where its A (r x n) and B (m x r) lie in the vector."""

    name: str
    a: slice
    b: slice
    m: int
    n: int
    r: int

    @property
    def width(self) -> int:
        """``s``: columns of Ω, and the rank that the rebuilt covariance can have."""
        return min(self.r + _OVERSAMPLING, self.m, self.n)

    @property
    def height(self) -> int:
        """``l``: columns of Ψ."""
        return min(2 * self.width, self.m)

    @property
    def words(self) -> int:
        """Of the two sketches."""
        return self.m * self.width + self.n * self.height

    def factors(self, vector: Vector | Numbers) -> tuple[Numbers, Numbers]:
        """B and A in float64."""
        b, a = vector[self.b].astype(np.float64), vector[self.a].astype(np.float64)
        return b.reshape(self.m, self.r), a.reshape(self.r, self.n)

    def matrices(self, key: bytes) -> tuple[Numbers, Numbers]:
        """Ω (n x s) and Ψ (m x l), orthonormal columns, public."""
        return (
            _orthonormal(digest("sketch of columns", key, self.name), self.n, self.width),
            _orthonormal(digest("sketch of rows", key, self.name), self.m, self.height),
        )


def _orthonormal(seed: bytes, rows: int, columns: int) -> Numbers:
    drawn = SecureStream(seed).normal(rows * columns).reshape(rows, columns)
    return np.linalg.qr(drawn)[0]


def sketched_words(layout: Layout) -> int:
    """Words that a site sends: the update's, and m·s + n·l for each LoRA layer."""
    pairs, rest = _parts(layout)
    return sum(pair.words + pair.r * (pair.m + pair.n) for pair in pairs) + len(rest)


def sketch(update: Vector, layout: Layout, key: bytes, clip: float) -> Vector:
    """A site's update, and behind it the sketches of b·a of each layer.

    Args:
        update: ``(d,)`` float32: the trained parameters less the start.
        layout: Of the update.
        key: Public, another one for each round; fixes Ω and Ψ.
        clip: L2 bound of the result, > 0. A longer update is scaled down before it is sketched: b·a
            shrinks with its square.

    Returns:
        ``(sketched_words(layout),)`` float32.
    """
    parts = list[Numbers]()
    for pair in _parts(layout)[0]:
        b, a = pair.factors(update)
        omega, psi = pair.matrices(key)
        parts += [(b @ (a @ omega)).ravel(), ((psi.T @ b) @ a).ravel()]
    sketches = np.concatenate([np.zeros(0), *parts])
    first, second = (float(v @ v) for v in (update.astype(np.float64), sketches))
    f = 1.0
    if first + second > clip**2:  # the f for which f^2 * first + f^4 * second = clip^2
        f = math.sqrt(2 * clip**2 / (first + math.sqrt(first**2 + 4 * second * clip**2)))
    return np.concatenate([f * update, f * f * sketches]).astype(np.float32)


def rebuild(start: Vector, mean: Numbers, layout: Layout, key: bytes, clip: float) -> Vector:
    """The next trained parameters from the mean of what sites sent.

    A comes out with orthonormal rows, the products' size in B: so a direction that the mean does
    not have yet can still be learned.

    Args:
        start: ``(d,)`` float32.
        mean: ``(sketched_words(layout),)`` float64.
        layout: Of ``start``.
        key: The round's, as in :func:`sketch`.
        clip: The same. No honest b·a is longer than its square: a rebuilt covariance that is was
            made up by a site that knows Ψ, and is scaled down to it.

    Raises:
        ProtocolError: A mean of another length.
    """
    after = np.zeros_like(start)
    for pair, left, right in _products(start, mean, layout, key, clip):
        (q, upper), (p, lower) = np.linalg.qr(left), np.linalg.qr(right.T)
        u, sizes, v = np.linalg.svd(upper @ lower.T, full_matrices=False)
        kept = min(pair.r, len(sizes))
        b, a = np.zeros((pair.m, pair.r)), np.zeros((pair.r, pair.n))
        b[:, :kept] = (q @ u[:, :kept]) * sizes[:kept]
        a[:kept] = v[:kept] @ p.T
        after[pair.b], after[pair.a] = b.ravel(), a.ravel()
    rest = _parts(layout)[1]
    after[rest] = next_vector(start[rest], mean[rest])
    return after


def check_rebuilt(
    start: Vector, mean: Numbers, layout: Layout, key: bytes, clip: float, after: Vector
) -> None:
    """Check that published parameters are what :func:`rebuild` makes of a published mean.

    Raises:
        ProtocolError: A product is off the best of its rank by more than :data:`TOLERANCE` of the
            rebuilt mean, or the rows of its A are not orthonormal by as much; or another parameter
            differs in any bit.
    """
    rest = _parts(layout)[1]
    expected = next_vector(start[rest], mean[rest])
    if after.shape != start.shape or after[rest].tobytes() != expected.tobytes():
        raise ProtocolError("the parameters beside the products are not what the sum gives")
    for pair, left, right in _products(start, mean, layout, key, clip):
        b, a = pair.factors(after)
        sizes = np.linalg.svd(_core(left, right), compute_uv=False)
        tail, size = np.linalg.norm(sizes[pair.r :]), np.linalg.norm(sizes)
        off = np.linalg.norm(_core(np.hstack([left, -b]), np.vstack([right, a])))
        upright = np.diag(np.arange(pair.r) < len(sizes)).astype(np.float64)
        turned = np.linalg.norm(a @ a.T - upright)
        # What is off the best of its rank is nearly orthogonal to what no such rank can have.
        if not (off**2 - tail**2 <= (TOLERANCE * size) ** 2 and turned <= TOLERANCE):
            raise ProtocolError(f"the product of {pair.name} is not what the published sum gives")


def _products(
    start: Vector, mean: Numbers, layout: Layout, key: bytes, clip: float
) -> Iterator[tuple[_Pair, Numbers, Numbers]]:
    """For each layer two thin matrices, (m x k) and (k x n), whose product is the mean's."""
    if mean.shape != (sketched_words(layout),):
        raise ProtocolError(f"expected {sketched_words(layout)} words, got shape {mean.shape}")
    place = len(start)
    for pair in _parts(layout)[0]:
        (b, a), (db, da) = pair.factors(start), pair.factors(mean)
        omega, psi = pair.matrices(key)
        end = place + pair.m * pair.width
        y = mean[place:end].reshape(pair.m, pair.width) - db @ (da @ omega)
        place = end + pair.height * pair.n
        w = mean[end:place].reshape(pair.height, pair.n) - (psi.T @ db) @ da
        q = np.linalg.qr(y)[0]
        x: Numbers = np.linalg.lstsq(psi.T @ q, w, rcond=None)[0].astype(np.float64)
        x *= min(1.0, clip**2 / max(float(np.linalg.norm(x)), 1e-300))
        right: Numbers = np.vstack([a + da, x])
        yield pair, np.hstack([b + db, q]), right


def _core(left: Numbers, right: Numbers) -> Numbers:
    """A small matrix with the singular values of a product of thin ones."""
    core: Numbers = np.linalg.qr(left)[1] @ np.linalg.qr(right.T)[1].T
    return core


def _parts(layout: Layout) -> tuple[list[_Pair], npt.NDArray[np.intp]]:
    """The LoRA layers of a layout, and the places of all other parameters.

    Raises:
        ProtocolError: An A without its B, or of shapes that do not go together.
    """
    places, start = dict[str, tuple[slice, tuple[int, ...]]](), 0
    for name, shape in layout:
        end = start + int(np.prod(shape, dtype=np.int64))
        places[name] = (slice(start, end), shape)
        start = end
    pairs, rest = list[_Pair](), np.ones(start, dtype=bool)
    for name, (a, shape) in places.items():
        if ".lora_A." not in name:
            continue
        b, other = places.get(name.replace(".lora_A.", ".lora_B."), (slice(0), ()))
        if len(shape) != 2 or len(other) != 2 or shape[0] != other[1]:
            raise ProtocolError(f"{name} of shape {shape} has no B that it goes with")
        (r, n), (m, _) = shape, other
        pairs.append(_Pair(name=name, a=a, b=b, m=m, n=n, r=r))
        rest[a] = rest[b] = False
    return pairs, np.flatnonzero(rest)
