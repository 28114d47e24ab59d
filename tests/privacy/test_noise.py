import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from scipy import stats  # type: ignore[import-untyped]  # no py.typed

from fedward.privacy import noise
from fedward.privacy.noise import SecureStream

KEY = bytes(range(32))
Draws = npt.NDArray[np.float64]
ACCEPT = 1e-4  # two-sided level of every statistical test here; keys are fixed


def normal_p_value(draws: Draws, scale: float = 1.0) -> float:
    """Kolmogorov-Smirnov against N(0, scale^2)."""
    return float(stats.kstest(draws / scale, "norm").pvalue)


def variance_p_value(draws: Draws, scale: float) -> float:
    """Chi-square test that the variance is scale^2."""
    n = len(draws)
    lower = stats.chi2.cdf(np.sum(draws**2) / scale**2, n)
    return float(2 * min(lower, 1 - lower))


def test_words_are_aes_256_in_counter_mode():
    stream = SecureStream(KEY)
    inner = stream._derive("words")
    reference = Cipher(AES(inner), CTR(bytes(16))).encryptor().update(bytes(8 * 1000))
    assert SecureStream(KEY).words(1000).tobytes() == reference


def test_the_stream_never_changes_for_a_key():
    # A recorded value: a silent change would break the replay of interrupted runs.
    recorded = hashlib.sha256(SecureStream(KEY).words(4096).astype("<u8").tobytes()).hexdigest()
    assert recorded == "af65aa6049a76a9fb38bdb0c4d0e48aa00b1da8ac69e7306c9019b2124af9d6d"


def test_pieces_join_to_the_same_words():
    whole, parts = SecureStream(KEY), SecureStream(KEY)
    expected = whole.words(1500)
    assert np.array_equal(np.concatenate([parts.words(n) for n in (1, 0, 2, 997, 500)]), expected)


def test_chunks_do_not_show(monkeypatch):
    expected = SecureStream(KEY).words(1001)
    monkeypatch.setattr(noise, "_CHUNK", 64)
    assert np.array_equal(SecureStream(KEY).words(1001), expected)


def test_without_a_key_no_two_streams_agree():
    assert not np.array_equal(SecureStream().words(4), SecureStream().words(4))


def test_a_key_of_another_length_is_refused():
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        SecureStream(KEY[:31])


def test_children_depend_on_key_and_labels_only():
    one, other = SecureStream(KEY), SecureStream(KEY)
    other.words(17)
    assert np.array_equal(one.child("a", b"b").words(8), other.child("a", b"b").words(8))
    streams = [one, *(one.child(*labels) for labels in ([], ["ab"], ["a", "b"], ["b", "a"]))]
    draws = {
        stream.words(2).tobytes() for stream in (*streams, one.child("ä"), one.child("ab", ""))
    }
    assert len(draws) == 7
    words = [one.child("x").words(20000) & np.uint64(1), one.child("y").words(20000) & np.uint64(1)]
    assert abs(np.corrcoef(words[0], words[1])[0, 1]) < 0.03


def test_uniforms_lie_above_zero_and_reach_one():
    class Fixed(SecureStream):
        def words(self, n):
            return np.array([0, 2**64 - 1], dtype=np.uint64)

    assert Fixed().uniform(2).tolist() == [2.0**-53, 1.0]
    draws = SecureStream(KEY).uniform(100_000)
    assert stats.kstest(draws, "uniform").pvalue > ACCEPT
    assert stats.kstest(draws**1.03, "uniform").pvalue < ACCEPT


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_normals_have_the_asked_shape(n):
    assert SecureStream(KEY).normal(n).shape == (n,)


def test_normals_are_standard_and_a_wrong_scale_is_noticed():
    draws = SecureStream(KEY).normal(300_001)
    assert normal_p_value(draws) > ACCEPT
    assert variance_p_value(draws, 1.0) > ACCEPT
    assert normal_p_value(draws, 1.02) < ACCEPT
    assert variance_p_value(draws, 2 / 3) < ACCEPT
    assert variance_p_value(draws, 3 / 2) < ACCEPT
    # Pairs of one Box-Muller draw and neighbours are uncorrelated.
    half = len(draws) // 2
    assert abs(np.corrcoef(draws[:half], draws[half : 2 * half])[0, 1]) < 0.01
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01


def test_normals_are_chunked(monkeypatch):
    monkeypatch.setattr(noise, "_CHUNK", 10)
    draws = SecureStream(KEY).normal(20_001)
    assert normal_p_value(draws) > ACCEPT
    assert len(np.unique(draws)) == len(draws)


def test_integers_are_uniform_and_bias_is_noticed():
    draws = SecureStream(KEY).integers(70_000, 7)
    counts = np.bincount(draws, minlength=7)
    assert len(counts) == 7
    assert stats.chisquare(counts).pvalue > ACCEPT
    biased = SecureStream(KEY).words(70_000) % np.uint64(8) % np.uint64(7)
    assert stats.chisquare(np.bincount(biased.astype(int), minlength=7)).pvalue < ACCEPT


def test_integers_reject_what_would_be_biased():
    pieces = [[2**64 - 1, 5], [2**63]]

    class Fixed(SecureStream):
        def words(self, n):
            return np.array(pieces.pop(0), dtype=np.uint64)

    # 2^64 - 1 lies above the last multiple of 3 * 2^62 and is drawn again.
    assert Fixed().integers(2, 3 * 2**61).tolist() == [5, 2**63 % (3 * 2**61)]


@pytest.mark.parametrize("bound", [0, -1, 2**63 + 1])
def test_a_bound_out_of_range_is_refused(bound):
    with pytest.raises(ValueError, match="expected 1 to 2"):
        SecureStream(KEY).integers(1, bound)


def test_the_largest_bounds_hold():
    stream = SecureStream(KEY)
    assert stream.integers(5, 1).tolist() == [0] * 5
    assert (stream.integers(5, 2**63) >= 0).all()


def test_choices_are_different_and_every_order_is_equally_likely():
    stream = SecureStream(KEY)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        chosen = tuple(stream.choose(4, 2).tolist())
        counts[chosen] = counts.get(chosen, 0) + 1
    assert len(counts) == 12  # all ordered pairs of different numbers
    assert stats.chisquare(list(counts.values())).pvalue > ACCEPT
    assert sorted(stream.choose(9, 9).tolist()) == list(range(9))
    assert stream.choose(3, 0).tolist() == []
    with pytest.raises(ValueError, match="expected 0 to 3"):
        stream.choose(3, 4)
