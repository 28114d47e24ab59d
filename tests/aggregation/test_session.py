"""Whole sessions: the exact sum or a clean end, whoever vanishes, in whatever order."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedward.aggregation import cohort as cohort_module
from fedward.aggregation import shamir
from fedward.aggregation.envelopes import agree
from fedward.aggregation.fixed_point import Grid
from fedward.aggregation.graph import Thresholds, thresholds
from fedward.aggregation.masks import apply_masks
from fedward.aggregation.parameters import Limits
from fedward.aggregation.session_memory import VolatileMemory
from fedward.aggregation.transcript import pair_mask_key, self_mask_key
from fedward.attempt import Attempt
from fedward.errors import CohortTooSmall, ProtocolError
from tests.aggregation.attacker import state
from tests.aggregation.rig import STAGES, Rig, make_rig

SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def enough(rig: Rig) -> bool:
    """Whether the specification promises a sum, from the numbers alone (complete graph)."""
    p = rig.parameters
    left = {s: sum(rig.gone.get(site, "never") > s for site in rig.sites) for s in STAGES}
    n = left["R0"]
    quorum = (n + p.colluders) // 2 + 1
    needs = max(quorum, p.minimum)
    threshold = max(p.colluders + 1, n // 2 + 1)
    return (
        min(left["R0"], left["R1"], left["R2"]) >= needs
        and left["R3"] >= quorum
        and left["R4"] >= threshold
    )


@st.composite
def rigs(draw: st.DrawFn) -> Rig:
    sites = draw(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=7, unique=True))
    colluders = draw(st.integers(0, len(sites) - 2))
    lowest = max(3, colluders + 2)
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    return make_rig(
        sites,
        gone=draw(st.dictionaries(st.sampled_from(sites), st.sampled_from(STAGES), max_size=3)),
        order=lambda messages: generator.permutation(sorted(messages)).tolist(),
        seed=draw(st.integers(0, 100)),
        dimension=draw(st.sampled_from([0, 1, 2, 7, 8, 9, 1000])),
        grid=Grid(clip=1.0, sites=len(sites), word_bits=draw(st.sampled_from([16, 32]))),
        colluders=colluders,
        minimum=draw(st.integers(lowest, len(sites))) if lowest < len(sites) else lowest,
    )


@settings(max_examples=40, deadline=None, suppress_health_check=SLOW)
@given(rigs())
def test_the_exact_sum_or_a_clean_end(rig):
    try:
        result = rig.run()
    except CohortTooSmall:
        assert not enough(rig)
        if not rig.tally._certificate:
            assert not rig.said["R4"], "a share left although the session had ended"
        return
    assert enough(rig)
    assert result.cohort == tuple(sorted(s for s in rig.sites if rig.gone.get(s, "X") > "R2"))
    np.testing.assert_array_equal(result.words, rig.plain_sum(result.cohort))
    for site in rig.said["R4"]:
        assert rig.sessions[site].outcome == result.outcome
        assert len(rig.memories[site].spent) == len(rig.memories[site].released) == 1


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lost", [1, 2, 3])
def test_dropouts_up_to_the_limit_and_beyond(stage: str, lost: int) -> None:
    """Seven sites, two colluders: two may vanish at any exchange, three may not (q = 5)."""
    rig = make_rig(7, gone=dict.fromkeys(range(1, lost + 1), stage), colluders=2, minimum=4)
    if stage == "R0":  # a smaller cohort from the start has a smaller quorum
        assert len(rig.run().cohort) == 7 - lost
    elif lost <= 2 or stage == "R4":  # four holders give every secret back
        result = rig.run()
        np.testing.assert_array_equal(result.words, rig.plain_sum(result.cohort))
    else:
        with pytest.raises(CohortTooSmall):
            rig.run()
        assert not rig.said["R4"]


def test_sites_of_a_failed_session_start_again_as_the_next_attempt():
    rig = make_rig(4, gone={1: "R2", 2: "R2"})
    with pytest.raises(CohortTooSmall):
        rig.run()
    again = make_rig(4, attempt=Attempt(run="run", round=1, attempt=2))
    again.memories.update(rig.memories)
    again.__post_init__()
    np.testing.assert_array_equal(again.run().words, again.plain_sum(again.sites))


def test_a_block_boundary_and_threads():
    size = (1 << 22) + 1
    for dimension in (size - 2, size):
        rig = make_rig(3, dimension=dimension)
        rig.sessions = {site: rig.session(site, threads=2) for site in rig.sites}
        assert np.array_equal(rig.run().words, rig.plain_sum(rig.sites))


LOST = {2: "R0", 3: "R1", 4: "R2", 5: "R3", 6: "R4"}


def test_a_small_ring_with_losses_at_every_exchange(monkeypatch):
    need = Thresholds(quorum=7, neighbours=6, threshold=2)
    monkeypatch.setattr(cohort_module, "thresholds", lambda *_: need)
    rig = make_rig(14, gone=LOST)
    result = rig.run()
    assert {len(rig.tally._cohort.graph.neighbours(s)) for s in rig.sites if s != 2} == {6}
    assert result.cohort == tuple(site for site in rig.sites if site not in {2, 3, 4})
    assert np.array_equal(result.words, rig.plain_sum(result.cohort))


@pytest.mark.slow
def test_the_ring():
    """160 sites with the specification's own thresholds, losses at every exchange."""
    lost = {10 * site + place: stage for site, stage in LOST.items() for place in range(3)}
    rig = make_rig(160, gone=lost, dropouts=16, colluders=2, minimum=100)
    result = rig.run()
    n = 160 - 3
    assert rig.tally._cohort.need == thresholds(n, 2, 16)
    assert rig.tally._cohort.need.neighbours < n - 1
    assert len(result.cohort) == 160 - 9
    assert np.array_equal(result.words, rig.plain_sum(result.cohort))
    assert not np.array_equal(result.words, rig.plain_sum(rig.sites)), "negative control"


def test_a_repeated_message_gets_the_same_bytes():
    rig = make_rig(3)
    rig.run()
    for stage, method in (
        ("R0", "hello"),
        ("R1", "shares"),
        ("R3", "consistency"),
        ("R4", "unmask"),
    ):
        for site, session in rig.sessions.items():
            again = getattr(session, method)(rig.heard[stage][site])
            assert again == rig.said[stage][site]
    header, vector = rig.sessions[1].masked(rig.heard["R2"][1], np.zeros(10, dtype=np.uint32))
    assert header == rig.said["R2"][1]
    assert vector is rig.vectors[1]


def test_the_tally_ignores_repetitions():
    rig = make_rig(3)
    rig.exchange("R0", dict.fromkeys(rig.sites, rig.tally.request()))
    rig.add("R0", 1, rig.said["R0"][1])
    rig.exchange("R1", rig.tally.close_hellos())
    rig.add("R1", 1, rig.said["R1"][1])
    rig.exchange("R2", rig.tally.close_shares())
    rig.add("R2", 1, rig.said["R2"][1])
    messages = rig.tally.close_masked()
    rig.exchange("R3", messages)
    rig.add("R3", 1, rig.said["R3"][1])
    rig.exchange("R4", rig.tally.close_consistency())
    rig.add("R4", 1, rig.said["R4"][1])
    assert np.array_equal(rig.tally.result().words, rig.plain_sum(rig.sites))


def test_the_sum_comes_early_once_enough_shares_are_there():
    rig = make_rig(5)
    messages = rig.run_to("R4")
    for count, site in enumerate(rig.sites, 1):
        assert not rig.tally.complete
        rig.add("R4", site, rig.answer("R4", site, messages[site]))
        if count == 3:
            break
    assert rig.tally.complete
    assert np.array_equal(rig.tally.result().words, rig.plain_sum(rig.sites))


def test_an_exchange_that_lacks_sites_stays_open():
    rig = make_rig(4)
    messages = dict.fromkeys(rig.sites, rig.tally.request())
    closings = (
        ("R0", rig.tally.close_hellos),
        ("R1", rig.tally.close_shares),
        ("R2", rig.tally.close_masked),
        ("R3", rig.tally.close_consistency),
    )
    for stage, close in closings:
        with pytest.raises(CohortTooSmall):
            close()
        rig.exchange(stage, messages)
        messages = close()
    with pytest.raises(CohortTooSmall):
        rig.tally.result()
    rig.exchange("R4", messages)
    assert np.array_equal(rig.tally.result().words, rig.plain_sum(rig.sites))
    with pytest.raises(ProtocolError, match="not open"):
        rig.tally.result()


def test_fixed_secrets_give_the_same_bytes():
    one, two = make_rig(3, secrets="fixed"), make_rig(3, secrets="fixed")
    assert one.run().transcript == two.run().transcript
    assert one.said == two.said
    assert make_rig(3, secrets="others").run().transcript != one.tally._frozen.session


def chi_square(data: bytes) -> float:
    """Pearson's statistic of bytes against uniform; 255 degrees of freedom, sd 22.6."""
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())


def looks_uniform(data: bytes) -> bool:
    """Bytes and single bits within five standard deviations of uniform."""
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8)).reshape(-1, 8).mean(axis=0)
    deviation = 0.5 / np.sqrt(len(data))
    return abs(chi_square(data) - 255) < 5 * 22.6 and bool(np.all(abs(bits - 0.5) < 5 * deviation))


def constant_rig(value: int, **changes: Any) -> Rig:
    rig = make_rig(3, dimension=100_000, **changes)
    for words in rig.inputs.values():
        words[:] = value
    return rig


@pytest.mark.parametrize("word_bits", [16, 32])
@pytest.mark.parametrize("value", [0, 1, (1 << 16) - 1])
def test_what_the_coordinator_gets_is_uniform(value, word_bits):
    rig = constant_rig(value, grid=Grid(clip=1.0, sites=3, word_bits=word_bits))
    rig.exchange("R2", rig.run_to("R2"))
    vectors = list(rig.vectors.values())
    assert all(looks_uniform(v.tobytes()) for v in vectors)
    assert looks_uniform((vectors[0] - vectors[1]).tobytes())
    assert not looks_uniform(rig.inputs[1].tobytes()), "negative control: the plain input"


def test_two_runs_with_one_input_are_unrelated():
    one, two = constant_rig(7), constant_rig(7, attempt=Attempt(run="other", round=1))
    for rig in (one, two):
        rig.exchange("R2", rig.run_to("R2"))
    assert looks_uniform((one.vectors[1] - two.vectors[1]).tobytes())
    masked_twice = one.vectors[1] - one.vectors[1]
    assert not looks_uniform(masked_twice.tobytes()), "negative control: one mask, used twice"


def test_a_late_upload_of_a_site_declared_dead_stays_uniform():
    """The coordinator rebuilds the dead site's mask key, then its input arrives after all."""
    rig = make_rig(4, dimension=100_000)
    for words in rig.inputs.values():
        words[:] = 5
    messages = rig.run_to("R2")
    for site in (2, 3, 4):
        rig.add("R2", site, rig.answer("R2", site, messages[site]))
    rig.answer("R2", 1, messages[1])  # sent, but late
    rig.exchange("R3", rig.tally.close_masked())
    rig.exchange("R4", rig.tally.close_consistency())
    with pytest.raises(ProtocolError):
        rig.add("R2", 1, rig.said["R2"][1])
    assert np.array_equal(rig.tally.result().words, rig.plain_sum((2, 3, 4)))

    cohort, late = rig.tally._cohort, rig.vectors[1].copy()
    private = X25519PrivateKey.from_private_bytes(shamir.join(rig.tally._released[1], 3))
    pair = [
        pair_mask_key(
            agree(private, o, cohort.hellos[o].mask_key), cohort.session, 1, o, rig.tally._u2_hash
        )
        for o in (2, 3, 4)
    ]
    apply_masks(late, subtract=pair)
    assert looks_uniform(late.tobytes()), "its own mask still covers it"


def test_without_the_self_mask_a_late_upload_is_open():
    """Negative control of the test above: the same steps, with the seed known as well."""
    rig = make_rig(3, dimension=100_000, secrets="late control")
    for words in rig.inputs.values():
        words[:] = 5
    messages = rig.run_to("R2")
    held = state(rig, 1)
    rig.answer("R2", 1, messages[1])
    opened = rig.vectors[1].copy()
    me, session = 1, held.cohort.session
    u2 = state(rig, 1).u2_hash
    pair = [
        pair_mask_key(agree(held.keys.mask, o, h.mask_key), session, me, o, u2)
        for o, h in held.cohort.hellos.items()
        if o != me
    ]
    apply_masks(opened, subtract=[*pair, self_mask_key(held.seed, session, me)])
    assert np.all(opened == 5)


def test_sizes_do_not_depend_on_the_input():
    zeros, ones = constant_rig(0), constant_rig(1)
    for rig in (zeros, ones):
        rig.run()
    for stage in STAGES:
        assert {s: len(m) for s, m in zeros.said[stage].items()} == {
            s: len(m) for s, m in ones.said[stage].items()
        }


def reachable_bytes(thing: Any, seen: set[int] | None = None) -> Iterator[bytes]:
    """Every byte string that an object still holds, however deep."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, bytes):
        yield thing
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from reachable_bytes(key, seen)
            yield from reachable_bytes(value, seen)
    elif isinstance(thing, list | tuple | set | frozenset):
        for value in thing:
            yield from reachable_bytes(value, seen)
    elif hasattr(thing, "__dict__"):
        yield from reachable_bytes(vars(thing), seen)


def draws_of(site: int, label: str) -> list[bytes]:
    return [hashlib.shake_256(f"{label} {site} {count}".encode()).digest(32) for count in (0, 1, 3)]


@pytest.mark.parametrize("end", ["done", "dead"])
def test_no_secret_outlives_the_session(end):
    label = f"wiped {end}"
    rig = make_rig(3, secrets=label)
    session = rig.sessions[1]
    secrets = draws_of(1, label)  # envelope key, mask key, seed; the third draw is the nonce
    messages = rig.run_to("R2")
    printed = repr(vars(session))
    assert not any(repr(secret) in printed or secret.hex() in printed for secret in secrets)
    rig.exchange("R2", messages)
    if end == "done":
        rig.exchange("R3", rig.tally.close_masked())
        rig.exchange("R4", rig.tally.close_consistency())
    else:
        with pytest.raises(ProtocolError) as caught:
            session.consistency(b"nonsense")
        assert not any(s.hex() in repr(caught.getrepr()) for s in secrets)
        assert session.dead
    held = set(reachable_bytes(session))
    assert not held.intersection(secrets)
    alive = make_rig(3, secrets=f"alive {end}")
    alive.run_to("R2")
    assert state(alive, 1).seed == draws_of(1, f"alive {end}")[2]
    assert draws_of(1, f"alive {end}")[2] in set(reachable_bytes(alive.sessions[1]))  # control


def test_limits_of_the_site_hold():
    for limits in (
        Limits(colluders=1),
        Limits(minimum=4),
        Limits(sites=3),
        Limits(words=9),
        Limits(one_sum=True, minimum=3),
    ):
        rig = make_rig(6, minimum=3, limits=limits)
        with pytest.raises(ProtocolError, match="limits"):
            rig.sessions[1].hello(rig.tally.request())
        assert rig.memories[1].newest("run") is None
    result = make_rig(6, minimum=4, limits=Limits(one_sum=True, minimum=4)).run()
    assert len(result.cohort) == 6


def test_memory_is_asked_before_anything_leaves():
    class Full(VolatileMemory):
        """A disk that is full at one kind of fact."""

        def __init__(self, fact: str) -> None:
            super().__init__()
            self.fact = fact

        def __getattribute__(self, name):
            if name == super().__getattribute__("fact"):
                raise OSError(28, "No space left on device")
            return super().__getattribute__(name)

    for fact, stage in (
        ("begin", "R0"),
        ("mark_spent", "R2"),
        ("remember_signed", "R3"),
        ("remember_released", "R4"),
    ):
        rig = make_rig(4)
        rig.memories[1] = Full(fact)
        rig.sessions[1] = rig.session(1)
        with pytest.raises(OSError):
            rig.run()
        assert 1 not in rig.said[stage]
        assert rig.sessions[1].dead
