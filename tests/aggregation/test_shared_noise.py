"""Shares of discrete noise inside whole sessions."""

import dataclasses

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]  # no py.typed

from fedward.aggregation.fixed_point import Grid
from fedward.aggregation.packing import pack, unpack
from fedward.aggregation.parameters import SessionParameters, Slot
from fedward.aggregation.shared_noise import HEADROOM, add_noise_share, noisy_grid
from fedward.errors import InvalidValue, ProtocolError
from fedward.privacy.distributed import SharedGaussian, share_of
from fedward.privacy.noise import SecureStream
from tests.aggregation.rig import Rig, make_rig

SIGMA, MINIMUM, COLLUDERS = 0.6, 4, 1
SHARE = share_of(SIGMA, minimum=MINIMUM, colluders=COLLUDERS)
DIMENSION = 4000
ACCEPT = 1e-4


def noisy_rig(*, noise: bool = True) -> tuple[Rig, dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Six sites with updates, and what each adds to them; site 6 drops out before its upload."""
    rig = make_rig(
        6,
        gone={6: "R2"},
        dimension=DIMENSION,
        minimum=MINIMUM,
        colluders=COLLUDERS,
        noise=SHARE,
        grid=noisy_grid(1.0, share=SHARE, sites=6),
        slots=(Slot(name="loss", clip=8.0),),
    )
    updates, added = {}, {}
    for site in rig.sites:
        stream = SecureStream(bytes([site]) * 32)
        update = np.full(DIMENSION, (-1) ** site * 0.01)
        updates[site] = update
        words = pack(update, np.array([0.5]), rig.parameters, stream.child("rounding"))
        plain = words.copy()
        if noise:
            add_noise_share(words, rig.parameters, stream.child("noise"))
        added[site] = (words - plain).view(np.int32)[:DIMENSION] * rig.parameters.grid.gamma
        rig.inputs[site] = words
    return rig, updates, added


def variance_fits(values: np.ndarray, variance: float) -> bool:
    lower = stats.chi2.cdf(np.sum(values**2) / variance, len(values))
    return bool(2 * min(lower, 1 - lower) > ACCEPT)


def test_the_noise_is_really_in_the_sum():
    rig, updates, added = noisy_rig()
    result = rig.run()
    assert result.cohort == (1, 2, 3, 4, 5)
    total, slots = unpack(result.words, rig.parameters)
    noise = total - np.sum([updates[site] for site in result.cohort], axis=0)
    assert variance_fits(noise, 5 * SHARE**2)
    assert not variance_fits(noise, 4 * SHARE**2), "negative control: a share less"
    assert not variance_fits(noise, 6 * SHARE**2), "negative control: the lost site's share"
    # What a colluder can take away leaves four shares; the guarantee asks for three.
    left = noise - added[2]
    assert variance_fits(left, 4 * SHARE**2)
    assert np.var(left) > SIGMA**2
    # The slot brings its own noise and gets none here.
    assert slots["loss"] == pytest.approx(2.5, abs=1e-5)


def test_without_shares_the_sum_is_bare():
    """Negative control."""
    rig, updates, _ = noisy_rig(noise=False)
    total, _ = unpack(rig.run().words, rig.parameters)
    noise = total - np.sum([updates[site] for site in (1, 2, 3, 4, 5)], axis=0)
    assert np.max(np.abs(noise)) < 6 * rig.parameters.grid.gamma
    assert not variance_fits(noise, 5 * SHARE**2)


def test_shares_of_two_sites_are_unrelated():
    _, _, added = noisy_rig()
    bound = 5 / np.sqrt(DIMENSION)
    assert abs(np.corrcoef(added[1], added[2])[0, 1]) < bound
    assert abs(np.corrcoef(added[1], added[1])[0, 1]) > bound, "negative control"


def test_the_grid_is_fine_enough_to_be_accounted_and_wide_enough_not_to_wrap():
    """A LoRA adapter of 20 M at a noise multiplier of 1, among 50 sites."""
    share = share_of(1.0, minimum=40, colluders=5)
    grid = noisy_grid(1.0, share=share, sites=50)
    event = SharedGaussian(
        clip=1.0,
        grid_step=grid.gamma,
        dimension=20_000_000,
        share=share,
        shares=35,
        sampling_rate=0.02,
        steps=100,
    )
    assert event.sensitivity < 1.001
    half = 2.0 ** (grid.word_bits - 1) * grid.gamma
    assert 50 * 1.0 + HEADROOM * share * np.sqrt(50) <= half * (1 + 1e-6)
    coarse = noisy_grid(1.0, share=share, sites=50, word_bits=16)
    with pytest.raises(InvalidValue, match="grid_step"):
        dataclasses.replace(event, grid_step=coarse.gamma)


def parameters_with(**changes: object) -> SessionParameters:
    return make_rig(4, **changes).parameters  # type: ignore[arg-type]  # any field


def test_too_little_noise():
    parameters = parameters_with(noise=3.9 * Grid(clip=1.0, sites=4, word_bits=32).gamma)
    words = np.zeros(parameters.words, dtype=np.uint32)
    with pytest.raises(InvalidValue, match="noise"):
        add_noise_share(words, parameters, SecureStream())
    assert not words.any()


def test_words_of_another_session_or_masked_already():
    parameters = parameters_with(noise=0.1)
    with pytest.raises(ProtocolError, match="words"):
        add_noise_share(np.zeros(3, dtype=np.uint32), parameters, SecureStream())
    words = np.zeros(parameters.words, dtype=np.uint32)
    words.setflags(write=False)
    with pytest.raises(ProtocolError, match="masked"):
        add_noise_share(words, parameters, SecureStream())
