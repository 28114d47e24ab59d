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

from collections.abc import Iterator

import numpy as np

from fedward.aggregation.products import (
    Numbers,
    Pair,
    Product,
    best_factors,
    check_factors,
    orthonormal,
    shrunk,
    split,
)
from fedward.aggregation.schemes import Layout, Vector
from fedward.canonical import digest
from fedward.errors import ProtocolError


def sketched_words(layout: Layout) -> int:
    """Words that a site sends: the update's, and m·s + n·l for each LoRA layer."""
    pairs, rest = split(layout)
    return len(rest) + sum(p.r * (p.m + p.n) + p.m * p.width + p.n * _height(p) for p in pairs)


def sketch(update: Vector, layout: Layout, key: bytes, clip: float) -> Vector:
    """A site's update, and behind it the sketches of b·a of each layer.

    Args:
        update: ``(d,)`` float32: the trained parameters less the start.
        layout: Of the update.
        key: Public, another one for each round; fixes Ω and Ψ.
        clip: L2 bound of the result, > 0. A longer update is scaled down before it is sketched.

    Returns:
        ``(sketched_words(layout),)`` float32.
    """
    parts = list[Numbers]()
    for pair in split(layout)[0]:
        b, a = pair.factors(update)
        parts += [(b @ (a @ pair.omega(key))).ravel(), ((_psi(pair, key).T @ b) @ a).ravel()]
    sketches = np.concatenate([np.zeros(0), *parts])
    first, second = (float(v @ v) for v in (update.astype(np.float64), sketches))
    f = shrunk(first, second, clip)
    return np.concatenate([f * update, f * f * sketches]).astype(np.float32)


def rebuild(start: Vector, mean: Numbers, layout: Layout, key: bytes, clip: float) -> Vector:
    """The next trained parameters from the mean of what sites sent.

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
    return best_factors(start, mean, layout, _products(start, mean, layout, key, clip))


def check_rebuilt(
    start: Vector, mean: Numbers, layout: Layout, key: bytes, clip: float, after: Vector
) -> None:
    """Check that published parameters are what :func:`rebuild` makes of a published mean.

    Raises:
        ProtocolError: As of :func:`fedward.aggregation.products.check_factors`.
    """
    check_factors(start, mean, layout, _products(start, mean, layout, key, clip), after)


def _products(
    start: Vector, mean: Numbers, layout: Layout, key: bytes, clip: float
) -> Iterator[Product]:
    if mean.shape != (sketched_words(layout),):
        raise ProtocolError(f"expected {sketched_words(layout)} words, got shape {mean.shape}")
    place = len(start)
    for pair in split(layout)[0]:
        (b, a), (db, da) = pair.factors(start), pair.factors(mean)
        omega, psi = pair.omega(key), _psi(pair, key)
        end = place + pair.m * pair.width
        y = mean[place:end].reshape(pair.m, pair.width) - db @ (da @ omega)
        place = end + _height(pair) * pair.n
        w = mean[end:place].reshape(_height(pair), pair.n) - (psi.T @ db) @ da
        q = np.linalg.qr(y)[0]
        x: Numbers = np.linalg.lstsq(psi.T @ q, w, rcond=None)[0].astype(np.float64)
        x *= min(1.0, clip**2 / max(float(np.linalg.norm(x)), 1e-300))
        right: Numbers = np.vstack([a + da, x])
        yield pair, np.hstack([b + db, q]), right


def _height(pair: Pair) -> int:
    """``l``: columns of Ψ."""
    return min(2 * pair.width, pair.m)


def _psi(pair: Pair, key: bytes) -> Numbers:
    """Ψ (m x l), orthonormal columns, public."""
    return orthonormal(digest("sketch of rows", key, pair.name), pair.m, _height(pair))
