"""Two sums of sketches against the products themselves; sessions that have their sites given."""

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from fedward.aggregation import two_pass, wire
from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.products import orthonormal, split
from fedward.aggregation.schemes import Layout
from fedward.aggregation.two_pass import Second
from fedward.attempt import Attempt
from fedward.errors import CohortTooSmall, InvalidValue, ProtocolError
from tests.aggregation.rig import Rig, make_rig
from tests.aggregation.test_sketch import CLIP, KEY, LAYOUT, M, N, R, best, draw, off, product

Numbers = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float32]

PAIR = split(LAYOUT)[0][0]


def means(updates: list[Vector], layout: Layout = LAYOUT) -> tuple[Numbers, Second]:
    """Both passes in the clear."""
    sent = [two_pass.first_pass(update, layout, KEY, CLIP) for update in updates]
    first = np.stack(sent).mean(axis=0, dtype=np.float64)
    basis = two_pass.basis_of(first, layout, KEY)
    sent = [two_pass.second_pass(update, layout, basis, KEY, CLIP) for update in updates]
    return first, Second(basis=basis, mean=np.stack(sent).mean(axis=0, dtype=np.float64))


def test_three_sites_are_exact_and_of_six_a_part_is_mended():
    """Rank 4, s = 8: what three sites do not have in common has rank 8, of six sites 20."""
    start, common = draw(0), draw(99)
    for sites in (3, 6):
        updates = [common + draw(seed, 0.5) for seed in range(1, sites + 1)]
        mean = np.mean([product(start + update) for update in updates], axis=0)
        first, second = means(updates)
        after = two_pass.rebuild(start, first, LAYOUT, second)
        apart = off(product((start + np.mean(updates, axis=0)).astype(np.float32)), mean)
        optimum, found = off(best(mean), mean), off(product(after), mean)
        assert optimum <= found < apart
        assert (found < 1.0001 * optimum) == (sites == 3)
        two_pass.check_rebuilt(start, first, LAYOUT, second, after)


@pytest.mark.parametrize(
    ("base", "common", "own"), [(0.0, 0.0, 1.0), (1.0, 0.3, 0.1), (1.0, 0.3, 1.0), (1.0, 1.0, 3.0)]
)
def test_the_covariance_is_the_better_thing_to_sketch(base, common, own):
    """Nine sites on a layer as wide as models have them: nothing in common, calm, noisy, noisier.

    The sketch of whole products loses at the same words, even to averaging apart (docs/adr/0013).
    """
    width, rank, sites = 384, 8, 9
    layout: Layout = (
        ("x.lora_A.default.weight", (rank, width)),
        ("x.lora_B.default.weight", (width, rank)),
    )
    pair, generator = split(layout)[0][0], np.random.default_rng(0)

    def drawn(scale: float) -> Vector:
        values = generator.normal(0, scale / np.sqrt(width), 2 * rank * width)
        return values.astype(np.float32)

    def best_of(matrix: Numbers) -> Numbers:
        left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
        found: Numbers = (left[:, :rank] * sizes[:rank]) @ right[:rank]
        return found

    start, shared = drawn(base), drawn(common)
    start[pair.a] = orthonormal(bytes(32), width, rank).T.ravel()
    updates = [shared + drawn(own) for _ in range(sites)]
    whole = np.mean([np.matmul(*pair.factors(start + update)) for update in updates], axis=0)
    first, second = means(updates, layout)
    found = np.matmul(*pair.factors(two_pass.rebuild(start, first, layout, second)))
    apart = np.matmul(*pair.factors(start + np.mean(updates, axis=0)))
    q = np.linalg.qr(whole @ orthonormal(KEY, width, 2 * rank + 4))[0]
    errors = [off(matrix, whole) for matrix in (found, apart, best_of(q @ (q.T @ whole)))]
    assert off(best_of(whole), whole) < errors[0] < errors[1] < errors[2]


def test_the_words_are_those_announced():
    update = draw(1)
    first, second = means([update])
    assert len(first) == two_pass.words_of_first(LAYOUT) == len(update) + M * (R + 4)
    assert len(second.mean) == two_pass.words_of_second(LAYOUT) == N * (R + 4)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_no_pass_is_longer_than_its_clip_whatever_the_basis(scale):
    """The worst basis has all of b·a in its span; a long update is scaled alike in both passes."""
    update, clip = draw(1, scale), 3.0
    b, a = PAIR.factors(update)
    left = np.linalg.svd(b @ a)[0][:, : PAIR.width].astype(np.float32)
    first = two_pass.first_pass(update, LAYOUT, KEY, clip).astype(np.float64)
    second = two_pass.second_pass(update, LAYOUT, left.ravel(), KEY, clip).astype(np.float64)
    most = two_pass.clip_of_second(clip)
    assert np.linalg.norm(first) <= clip * (1 + 1e-6)
    assert np.linalg.norm(second) <= most * (1 + 1e-6)
    f = first[0] / float(update[0])
    assert (f < 1) == (scale > 0.1)
    np.testing.assert_allclose(first[: len(update)], f * update, rtol=1e-5, atol=1e-9)
    p = a.T @ (b.T @ left)
    np.testing.assert_allclose(second.reshape(N, PAIR.width), f * f * p, rtol=1e-4, atol=1e-6)
    longer = np.linalg.norm(update) > clip and np.linalg.norm(p) > most
    assert longer == (f < 1), "control: without the factor both are longer"


def test_the_clip_of_the_second_pass_is_reached_and_no_wider():
    """B and A of one direction and of equal length, and nothing else."""
    update, clip = np.zeros(6 + R * N + M * R, dtype=np.float32), 3.0
    update[6], update[6 + R * N] = (clip / np.sqrt(2),) * 2
    left = np.eye(M, PAIR.width, dtype=np.float32).ravel()
    second = two_pass.second_pass(update, LAYOUT, left, bytes(32), 1e6)
    assert np.linalg.norm(second) == pytest.approx(two_pass.clip_of_second(clip), rel=1e-6)


def test_a_site_takes_a_basis_of_the_sum_and_no_other():
    first, second = means([draw(seed, 0.3) for seed in (1, 2, 3)])
    two_pass.check_basis(first, LAYOUT, KEY, second.basis)
    q = second.basis.reshape(M, PAIR.width)
    turned = q @ np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    two_pass.check_basis(first, LAYOUT, KEY, turned.astype(np.float32).ravel())
    stretched, other = q.copy(), orthonormal(bytes(32), M, PAIR.width)
    stretched[:, 0] *= 2
    bent = q.copy()
    bent[:, -1] = other[:, -1] - q[:, :-1] @ (q[:, :-1].T @ other[:, -1])
    bent[:, -1] /= np.linalg.norm(bent[:, -1])
    for wrong in (stretched, other, bent, np.full_like(q, np.nan), np.zeros_like(q)):
        with pytest.raises(ProtocolError, match="is not one of the published sum"):
            two_pass.check_basis(first, LAYOUT, KEY, wrong.astype(np.float32).ravel())
    with pytest.raises(ProtocolError, match="words"):
        two_pass.check_basis(first, LAYOUT, KEY, second.basis[:-1])


def test_a_site_accepts_what_was_rebuilt_and_nothing_else():
    start = draw(0)
    first, second = means([draw(seed, 0.3) for seed in (1, 2, 3)])
    after = two_pass.rebuild(start, first, LAYOUT, second)
    for place in (0, 6, 6 + R * N):
        bent = after.copy()
        bent[place] += np.float32(1 if place else 1e-6)
        with pytest.raises(ProtocolError, match="not what the"):
            two_pass.check_rebuilt(start, first, LAYOUT, second, bent)
    for wrong in (
        dataclasses.replace(second, mean=second.mean[:-1]),
        dataclasses.replace(second, basis=second.basis[:-1]),
    ):
        with pytest.raises(ProtocolError, match="words"):
            two_pass.rebuild(start, first, LAYOUT, wrong)


def test_nothing_in_common_to_mend_leaves_the_mean():
    """One step from B = 0 moves no A: the covariance is zero, and its basis is any."""
    start, updates = draw(0), [draw(seed) for seed in (1, 2, 3)]
    start[6 + R * N :] = 0
    for update in updates:
        update[6 : 6 + R * N] = 0
    first, second = means(updates)
    two_pass.check_basis(first, LAYOUT, KEY, second.basis)
    after = two_pass.rebuild(start, first, LAYOUT, second)
    mean = np.mean([product(start + update) for update in updates], axis=0)
    assert off(product(after), mean) < 1e-5


# Sessions over given sites.

FIRST = Attempt(run="run", round=1, session=1)
SECOND = Attempt(run="run", round=1, session=2)
COHORT = (1, 2, 3, 4)


def second_rig(sites: tuple[int, ...] = COHORT, *, given: bool = True) -> Rig:
    """A second pass over :data:`COHORT`; without ``given`` it may have any three sites."""
    if given:
        return make_rig(sites, attempt=SECOND, cohort=COHORT, minimum=4)
    return make_rig(sites, attempt=SECOND)


def test_a_second_pass_over_all_of_its_sites_ends_in_their_sum_and_spends_the_first_reservation():
    rig = second_rig()
    assert np.array_equal(rig.run().words, rig.plain_sum(COHORT))
    assert {a for memory in rig.memories.values() for a in memory.spent} == {FIRST}
    assert {session.finished for session in rig.sessions.values()} == {rig.tally._outcome}
    other = second_rig(given=False)
    other.run()
    assert {a for memory in other.memories.values() for a in memory.spent} == {SECOND}, "control"


def hellos_without(rig: Rig) -> tuple[str, bytes]:
    rig.run_to("R1")
    hellos = [wire.decode_hello(rig.said["R0"][site]) for site in COHORT if site != 4]
    return "R1", wire.encode_hellos(hellos)


def envelopes_without(rig: Rig) -> tuple[str, bytes]:
    _, envelopes = wire.decode_envelopes(rig.run_to("R2")[1])
    kept = [envelope for envelope in envelopes if envelope.dealer != 4]
    return "R2", wire.encode_envelopes((1, 2, 3), kept)


def survivors_without(rig: Rig) -> tuple[str, bytes]:
    headers = wire.decode_survivors(rig.run_to("R3")[1])
    return "R3", wire.encode_survivors([header for header in headers if header.site != 4])


@pytest.mark.parametrize("message", [hellos_without, envelopes_without, survivors_without])
def test_a_site_shares_masks_and_signs_for_no_other_set(message):
    """A coordinator that lets one site vanish from the second pass, in each exchange."""
    rig = second_rig()
    stage, forged = message(rig)
    with pytest.raises(ProtocolError, match="the session needs 4"):
        rig.answer(stage, 1, forged)
    assert rig.sessions[1].dead
    other = second_rig(given=False)
    stage, forged = message(other)
    other.answer(stage, 1, forged)  # control: three of four are enough for any other session


def test_a_stranger_in_a_second_pass():
    """A site that was not in the first sum would take the place of its own difference."""
    rig = make_rig((1, 2, 3, 4, 5), attempt=SECOND, cohort=COHORT, minimum=4)
    messages = dict.fromkeys(rig.sites, rig.tally.request())
    rig.exchange("R0", messages)
    with pytest.raises(ProtocolError, match="not in the cohort of the first pass"):
        rig.tally.close_hellos()
    hellos = wire.encode_hellos([wire.decode_hello(rig.said["R0"][site]) for site in rig.sites])
    with pytest.raises(ProtocolError, match="not in the cohort of the first pass"):
        rig.answer("R1", 1, hellos)


@pytest.mark.parametrize("stage", ["R0", "R1", "R2"])
def test_one_that_vanishes_ends_a_second_pass(stage):
    rig = second_rig()
    rig.gone[4] = stage
    with pytest.raises(CohortTooSmall):
        rig.run()
    assert not any(rig.said["R4"].values())


def test_the_cohort_is_in_the_parameters_and_only_where_there_is_one():
    rig, other = second_rig(), second_rig(given=False)
    data = rig.parameters.to_bytes()
    assert SessionParameters.from_bytes(data) == rig.parameters
    assert b"cohort" in data
    assert b"cohort" not in other.parameters.to_bytes()
    assert "cohort = None, not [1, 2, 3, 4]" in rig.parameters.difference(
        other.parameters.to_bytes()
    )


WRONG: list[tuple[tuple[int, ...], int]] = [
    ((1, 2, 3), 4),
    ((1, 2, 3, 4, 5), 4),
    ((4, 3, 2, 1), 4),
    ((1, 1, 2, 3), 4),
    ((-1, 2, 3, 4), 4),
]


@pytest.mark.parametrize(("cohort", "minimum"), WRONG)
def test_a_cohort_that_is_none(cohort, minimum):
    with pytest.raises(InvalidValue, match="cohort"):
        make_rig(COHORT, attempt=SECOND, cohort=cohort, minimum=minimum)
