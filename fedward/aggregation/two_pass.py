"""Scheme ``sketch``: the mean of LoRA products from two masked sums of the same sites.

As in ``sketch-once`` (:mod:`fedward.aggregation.sketch`) what the means of A and B miss is the
sites' covariance C = mean(b·a) - mean(b)·mean(a). Two sums find it with fewer words and without a
solve (Halko, Martinsson and Tropp 2011, algorithms 4.1 and 5.1, each step a sum):

1. Sites send a, b, all else that they trained, and Y = b·a·Ω. Of the sum less mean(b)·mean(a)·Ω the
   coordinator takes an orthonormal basis Q (m x s), and publishes it with the sum.
2. The same sites send P = (b·a)ᵀQ (n x s). The sum less (mean(b)·mean(a))ᵀQ is CᵀQ, and QQᵀC is
   added to (B + mean b)(A + mean a).

QQᵀC is C where it has at most rank s = r + 4, and else C without what is orthogonal to CΩ. Ranks of
sites may differ: who trains the first components alone has moved by zero in the others.

Guarantees:
    Each pass is a function of an update that is private already, and of public numbers. Beside the
    two sums over one set of sites nothing is learned of a site's update. With another set in the
    second pass the sites' difference would be: QᵀY - PᵀΩ is the sketch QᵀDΩ of whoever is gone. So
    a second session has the first one's survivors as a parameter, and no site enters it with an
    update that is not the one it held when it signed them (docs/secagg.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedward.aggregation.products import (
    TOLERANCE,
    Numbers,
    Pair,
    Product,
    best_factors,
    check_factors,
    shrunk,
    split,
)
from fedward.aggregation.schemes import Layout, Vector
from fedward.errors import ProtocolError


@dataclass(frozen=True, kw_only=True)
class Second:
    """What the second pass came to.

    Args:
        basis: Q of each layer, one after the other, as published: float32.
        mean: ``(words_of_second(layout),)`` float64.
    """

    basis: Vector
    mean: Numbers


def words_of_first(layout: Layout) -> int:
    """Words that a site sends in pass 1: the update's, and m·s for each LoRA layer."""
    pairs, rest = split(layout)
    return len(rest) + sum(p.r * (p.m + p.n) + p.m * p.width for p in pairs)


def words_of_second(layout: Layout) -> int:
    """Words that a site sends in pass 2: n·s for each LoRA layer."""
    return sum(pair.n * pair.width for pair in split(layout)[0])


def clip_of_second(clip: float) -> float:
    """L2 bound of pass 2, whatever Q is, where the update of pass 1 is no longer than ``clip``.

    Over all layers ||b·a|| <= Σ ||b||·||a|| <= Σ (||b||^2 + ||a||^2) / 2 <= clip^2 / 2.
    """
    return clip**2 / 2


def first_pass(update: Vector, layout: Layout, key: bytes, clip: float) -> Vector:
    """A site's update, and behind it Y of each layer.

    Args:
        update: ``(d,)`` float32: the trained parameters less the start.
        layout: Of the update.
        key: Public, another one for each round; fixes Ω.
        clip: L2 bound of the result, > 0. A longer update is scaled down before it is sketched, by
            a factor that both passes share.

    Returns:
        ``(words_of_first(layout),)`` float32.
    """
    sketches, f = _sketches(update, layout, key, clip)
    return np.concatenate([f * update, f * f * sketches]).astype(np.float32)


def second_pass(update: Vector, layout: Layout, basis: Vector, key: bytes, clip: float) -> Vector:
    """A site's P of each layer, L2 norm at most :func:`clip_of_second`.

    Args:
        update: The same as in pass 1.
        layout: Of the update.
        basis: As published, and checked: orthonormal columns make no P longer than b·a.
        key: As in pass 1.
        clip: As in pass 1.

    Returns:
        ``(words_of_second(layout),)`` float32.
    """
    _, f = _sketches(update, layout, key, clip)
    moves = ((q, *pair.factors(update)) for pair, q in _bases(basis, layout))
    parts = [f * f * (a.T @ (b.T @ q)).ravel() for q, b, a in moves]
    return np.concatenate([np.zeros(0), *parts]).astype(np.float32)


def basis_of(mean: Numbers, layout: Layout, key: bytes) -> Vector:
    """Q of each layer from the mean of pass 1, in one vector of Σ m·s float32."""
    parts = [np.linalg.qr(y)[0].ravel() for _, y in _centred(mean, layout, key)]
    return np.concatenate([np.zeros(0), *parts]).astype(np.float32)


def check_basis(mean: Numbers, layout: Layout, key: bytes, basis: Vector) -> None:
    """Check that a published basis is one of what the published sum of pass 1 gives.

    Raises:
        ProtocolError: Another length, columns that are not orthonormal within :data:`TOLERANCE`, or
            that do not span Y less mean(b)·mean(a)·Ω.
    """
    for (pair, q), (_, y) in zip(_bases(basis, layout), _centred(mean, layout, key), strict=True):
        turned = np.linalg.norm(q.T @ q - np.eye(pair.width))
        outside = np.linalg.norm(y - q @ (q.T @ y))
        if not (turned <= TOLERANCE and outside <= TOLERANCE * np.linalg.norm(y)):
            raise ProtocolError(f"the basis of {pair.name} is not one of the published sum")


def rebuild(start: Vector, mean: Numbers, layout: Layout, second: Second) -> Vector:
    """The next trained parameters from the means of both passes.

    Args:
        start: ``(d,)`` float32.
        mean: Of pass 1: ``(words_of_first(layout),)`` float64.
        layout: Of ``start``.
        second: Of pass 2.

    Raises:
        ProtocolError: A mean or a basis of another length.
    """
    return best_factors(start, mean, layout, _products(start, mean, layout, second))


def check_rebuilt(
    start: Vector, mean: Numbers, layout: Layout, second: Second, after: Vector
) -> None:
    """Check that published parameters are what :func:`rebuild` makes of published means.

    Raises:
        ProtocolError: As of :func:`fedward.aggregation.products.check_factors`.
    """
    check_factors(start, mean, layout, _products(start, mean, layout, second), after)


def _products(start: Vector, mean: Numbers, layout: Layout, second: Second) -> Iterator[Product]:
    _check_length(mean, words_of_first(layout))
    _check_length(second.mean, words_of_second(layout))
    place = 0
    for pair, q in _bases(second.basis, layout):
        (b, a), (db, da) = pair.factors(start), pair.factors(mean)
        end = place + pair.n * pair.width
        p = second.mean[place:end].reshape(pair.n, pair.width)
        place = end
        right: Numbers = np.vstack([a + da, p.T - (q.T @ db) @ da])
        yield pair, np.hstack([b + db, q]), right


def _centred(mean: Numbers, layout: Layout, key: bytes) -> Iterator[tuple[Pair, Numbers]]:
    """For each layer what of the mean Y the means of the factors do not have: C·Ω (m x s)."""
    _check_length(mean, words_of_first(layout))
    pairs, rest = split(layout)
    place = len(rest) + sum(pair.r * (pair.m + pair.n) for pair in pairs)
    for pair in pairs:
        db, da = pair.factors(mean)
        end = place + pair.m * pair.width
        yield pair, mean[place:end].reshape(pair.m, pair.width) - db @ (da @ pair.omega(key))
        place = end


def _bases(basis: Vector, layout: Layout) -> Iterator[tuple[Pair, Numbers]]:
    pairs, place = split(layout)[0], 0
    _check_length(basis, sum(pair.m * pair.width for pair in pairs))
    for pair in pairs:
        end = place + pair.m * pair.width
        yield pair, basis[place:end].astype(np.float64).reshape(pair.m, pair.width)
        place = end


def _sketches(update: Vector, layout: Layout, key: bytes, clip: float) -> tuple[Numbers, float]:
    """Y of each layer of an update, one after the other, and the factor of what is too long."""
    moves = ((pair, *pair.factors(update)) for pair in split(layout)[0])
    parts = [(b @ (a @ pair.omega(key))).ravel() for pair, b, a in moves]
    sketches = np.concatenate([np.zeros(0), *parts])
    first, second = (float(v @ v) for v in (update.astype(np.float64), sketches))
    return sketches, shrunk(first, second, clip)


def _check_length(vector: Vector | Numbers, words: int) -> None:
    if vector.shape != (words,):
        raise ProtocolError(f"expected {words} words, got shape {vector.shape}")
