"""Sketches against the products themselves: exact where the ranks fit, near the best where not."""

import numpy as np
import numpy.typing as npt
import pytest

from fedward.aggregation import sketch as sketch_module
from fedward.aggregation.products import split
from fedward.aggregation.schemes import Layout
from fedward.aggregation.sketch import check_rebuilt, rebuild, sketch, sketched_words
from fedward.errors import ProtocolError

M, N, R = 40, 60, 4
LAYOUT: Layout = (
    ("head", (3, 2)),
    ("x.lora_A.default.weight", (R, N)),
    ("x.lora_B.default.weight", (M, R)),
)
KEY, CLIP = bytes(32), 1e3

Vector = npt.NDArray[np.float32]


def draw(seed: int, scale: float = 1.0) -> Vector:
    size = 6 + R * N + M * R
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


def product(vector: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    a, b = np.split(vector[6:].astype(np.float64), [R * N])
    found: npt.NDArray[np.float64] = b.reshape(M, R) @ a.reshape(R, N)
    return found


def mean_of(updates: list[Vector]) -> npt.NDArray[np.float64]:
    sketches = [sketch(update, LAYOUT, KEY, CLIP).astype(np.float64) for update in updates]
    found: npt.NDArray[np.float64] = np.mean(sketches, axis=0)
    return found


def best(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    found: npt.NDArray[np.float64] = (left[:, :R] * sizes[:R]) @ right[:R]
    return found


def off(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_one_site_gets_its_own_product_back():
    start, update = draw(0), draw(1, 0.1)
    after = rebuild(start, mean_of([update]), LAYOUT, KEY, CLIP)
    assert off(product(after), best(product(start + update))) < 1e-5
    assert np.array_equal(after[:6], (start + update)[:6])
    a = after[6 : 6 + R * N].reshape(R, N)
    np.testing.assert_allclose(a @ a.T, np.eye(R), atol=1e-5)


def test_the_mean_of_products_is_exact_where_the_ranks_of_their_moves_fit():
    """Two sites move two rows of A and two columns of B each."""
    start, updates = draw(0), []
    for seed, rows in ((1, slice(0, 2)), (2, slice(2, 4))):
        moved, update = draw(seed), np.zeros_like(start)
        for part in (
            (slice(6, 6 + R * N), (R, N), (rows, slice(None))),
            (slice(6 + R * N, None), (M, R), (slice(None), rows)),
        ):
            where, shape, kept = part
            update[where].reshape(shape)[kept] = moved[where].reshape(shape)[kept]
        updates.append(update)
    mean = np.mean([product(start + update) for update in updates], axis=0)
    after = rebuild(start, mean_of(updates), LAYOUT, KEY, CLIP)
    assert off(product(after), best(mean)) < 1e-5
    apart = start + np.mean(updates, axis=0, dtype=np.float32)
    assert off(product(apart), best(mean)) > 0.1, "control: the means of A and B apart"


def test_three_sites_are_exact_and_of_six_a_part_is_mended():
    """Rank 4, s = 8: two sites' ranks beside what all have in common fit, five do not."""
    start, common = draw(0), draw(99)
    for sites in (3, 6):
        updates = [common + draw(seed, 0.5) for seed in range(1, sites + 1)]
        mean = np.mean([product(start + update) for update in updates], axis=0)
        after = rebuild(start, mean_of(updates), LAYOUT, KEY, CLIP)
        apart = off(product((start + np.mean(updates, axis=0)).astype(np.float32)), mean)
        optimum, found = off(best(mean), mean), off(product(after), mean)
        assert optimum <= found < apart
        assert (found < 1.0001 * optimum) == (sites == 3)


def test_the_words_are_those_announced():
    start = draw(0)
    assert sketched_words(LAYOUT) == len(start) + (M + 2 * N) * (R + 4)
    assert sketch(draw(1), LAYOUT, KEY, CLIP).shape == (sketched_words(LAYOUT),)


def test_a_site_accepts_what_was_rebuilt_and_nothing_else():
    start, updates = draw(0), [draw(seed, 0.3) for seed in (1, 2, 3)]
    mean = mean_of(updates)
    after = rebuild(start, mean, LAYOUT, KEY, CLIP)
    check_rebuilt(start, mean, LAYOUT, KEY, CLIP, after)
    for factor in (2.0, 1e30):  # the same product from other factors, in which nothing is learned
        turned = after.copy()
        turned[6 : 6 + R * N] *= np.float32(factor)
        turned[6 + R * N :] /= np.float32(factor)
        with pytest.raises(ProtocolError, match="not what the"):
            check_rebuilt(start, mean, LAYOUT, KEY, CLIP, turned)
    for place in (0, 6, 6 + R * N):
        bent = after.copy()
        bent[place] += np.float32(1 if place else 1e-6)
        with pytest.raises(ProtocolError, match="not what the"):
            check_rebuilt(start, mean, LAYOUT, KEY, CLIP, bent)
    for other in (start, np.zeros_like(start), np.full_like(start, np.nan)):
        with pytest.raises(ProtocolError, match="not what the"):
            check_rebuilt(start, mean, LAYOUT, KEY, CLIP, other)
    with pytest.raises(ProtocolError, match="not what the"):
        check_rebuilt(start, mean, LAYOUT, KEY, CLIP, after[:-1])


def test_another_key_has_other_matrices():
    update = draw(1)
    one, other = (sketch(update, LAYOUT, key, CLIP) for key in (KEY, b"\1" * 32))
    assert not np.array_equal(one[len(update) :], other[len(update) :])
    assert np.array_equal(one[: len(update)], update)


def test_nothing_learned_leaves_directions_to_learn():
    """Products of zero: B is zero as at the start of LoRA, and A still has R rows of length one."""
    start = draw(0)
    start[6 + R * N :] = 0
    after = rebuild(start, mean_of([np.zeros_like(start)]), LAYOUT, KEY, CLIP)
    assert not after[6 + R * N :].any()
    np.testing.assert_allclose(np.linalg.norm(after[6 : 6 + R * N].reshape(R, N), axis=1), 1, 1e-5)


def test_what_does_not_fit():
    start = draw(0)
    with pytest.raises(ProtocolError, match="words"):
        rebuild(start, np.zeros(3), LAYOUT, KEY, CLIP)
    for layout in ((LAYOUT[1],), (LAYOUT[1], ("x.lora_B.default.weight", (M, R + 1)))):
        with pytest.raises(ProtocolError, match="no B"):
            sketched_words(layout)


def test_twenty_honest_rebuilds_are_accepted_and_a_shift_of_a_thousandth_is_not():
    for seed in range(20):
        start, updates = draw(seed), [draw(100 * seed + site, 0.3) for site in range(1, 9)]
        mean = mean_of(updates)
        after = rebuild(start, mean, LAYOUT, KEY, CLIP)
        check_rebuilt(start, mean, LAYOUT, KEY, CLIP, after)
        after[6 + R * N :] *= np.float32(1.001)
        with pytest.raises(ProtocolError, match="not what the"):
            check_rebuilt(start, mean, LAYOUT, KEY, CLIP, after)


def test_a_long_update_is_clipped_before_it_is_sketched():
    start, update = draw(0), draw(1, 10.0)
    clip = 3.0
    sent = sketch(update, LAYOUT, KEY, clip)
    assert np.linalg.norm(sent) == pytest.approx(clip, rel=1e-5)
    shorter = sent[: len(update)]
    np.testing.assert_allclose(shorter / update, shorter[0] / update[0], rtol=1e-4)
    after = rebuild(start, sent.astype(np.float64), LAYOUT, KEY, clip)
    assert off(product(after), best(product(start + shorter))) < 1e-5
    naive = sketch(update, LAYOUT, KEY, CLIP**2)
    naive *= clip / np.linalg.norm(naive)
    apart = rebuild(start, naive.astype(np.float64), LAYOUT, KEY, clip)
    found = product(start + naive[: len(update)])
    assert off(product(apart), best(found)) > 0.01, "control: clipped behind the sketch"


def test_a_site_that_knows_the_matrices_moves_no_more_than_the_clip():
    """Its Y lies nearly where the rebuilding cannot look, so that little becomes much."""
    layout = LAYOUT[1:]
    pair, clip = split(layout)[0][0], 1.0
    psi, height = sketch_module._psi(pair, KEY), sketch_module._height(pair)
    hidden = np.random.default_rng(0).normal(size=(M, pair.width))
    hidden -= psi @ (psi.T @ hidden) * (1 - 1e-6)
    evil = np.zeros(sketched_words(layout))
    d = R * (M + N)
    evil[d : d + M * pair.width] = 0.7 * hidden.ravel() / np.linalg.norm(hidden)
    evil[d + M * pair.width :] = 0.7 / np.sqrt(height * N)
    start = np.zeros(d, dtype=np.float32)
    a, b = np.split(rebuild(start, evil, layout, KEY, clip).astype(np.float64), [R * N])
    assert np.linalg.norm(b.reshape(M, R) @ a.reshape(R, N)) <= clip**2 * 1.001
    a, b = np.split(rebuild(start, evil, layout, KEY, CLIP).astype(np.float64), [R * N])
    assert np.linalg.norm(b.reshape(M, R) @ a.reshape(R, N)) > 100 * clip**2, "control"
