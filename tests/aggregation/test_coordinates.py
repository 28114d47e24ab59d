"""Parts of an update: exact counts, whole cycles, uniform draws, and what the others keep."""

import hashlib
import itertools
import math
import struct

import numpy as np
import numpy.typing as npt
import pytest

from fedward.aggregation.coordinates import Sent, count_sent, draw_sent
from fedward.aggregation.masks import keystream
from fedward.aggregation.rules import Rule
from fedward.aggregation.server_optimizer import next_state
from fedward.attempt import Attempt
from fedward.canonical import digest
from fedward.errors import InvalidValue, ProtocolError
from fedward.plan_aggregation import Aggregation

LAYOUT = (("a", (30, 4)), ("b", (80,)))
D = 200


def attempt(number: int, run: str = "run", **more: int) -> Attempt:
    return Attempt(run=run, round=number, **more)


def rule(number: int, share: float = 0.25, **settings: object) -> Rule:
    aggregation = Aggregation(coordinates=share, **settings)  # type: ignore[arg-type]  # a test's
    return Rule(settings=aggregation, layout=LAYOUT, attempt=attempt(number))


def vectors(seed: int, count: int, size: int = D) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)


@pytest.mark.parametrize("share", [0.25, 0.3, 0.7, 0.001, 1 / 3, 0.999])
@pytest.mark.parametrize("dimension", [1, 2, 7, 200, 1003])
def test_every_round_sends_as_many_and_a_cycle_covers_all(share, dimension):
    count = count_sent(dimension, share)
    cycle = -(-dimension // count)
    assert cycle <= math.ceil(1 / share)
    for first in (1, 1 + cycle, 1 + 7 * cycle):
        drawn = [draw_sent(dimension, share, attempt(first + i)) for i in range(cycle)]
        assert [int(sent.sum()) for sent in drawn] == [count] * cycle
        times = np.sum(drawn, axis=0)
        assert times.min() == 1
        assert times.max() <= 2
        assert times.sum() == cycle * count
    if count < dimension:
        other = [draw_sent(dimension, share, attempt(1 + i)) for i in range(cycle - 1)]
        assert np.sum(other, axis=0).min() == 0, "control: a round fewer leaves some out"


def test_the_draw_is_the_same_everywhere_and_in_every_attempt():
    """A known answer: it must be that of every site's machine."""
    drawn = draw_sent(1000, 0.25, attempt(3))
    again = draw_sent(1000, 0.25, attempt(3, session=2, attempt=5))
    assert drawn.tobytes() == again.tobytes()
    expected = "25dafaeb39ba687569746143ec2859bf3d152ddf6688b4f1e1372f9c36ee4b5f"
    assert hashlib.sha256(drawn.tobytes()).hexdigest() == expected
    others = [attempt(4), attempt(7), attempt(3, run="other")]
    assert all(draw_sent(1000, 0.25, each).tobytes() != drawn.tobytes() for each in others)


@pytest.mark.parametrize("number", [1, 4, 5])
def test_the_draw_is_a_part_of_a_sorted_stream(number):
    """As the module's docstring has it, one number after the other; over two blocks of a stream."""
    size, count = 70_001, 17_501
    cycle, part = divmod(number - 1, 4)
    key = digest("coordinates", b"run", cycle.to_bytes(4, "big"))
    blocks = (keystream(key, block, "ctr").update(bytes(8 << 16)) for block in (0, 1))
    words = struct.unpack(f"<{2 << 16}Q", b"".join(blocks))[:size]
    order = sorted(range(size), key=lambda place: (words[place] >> 17, place))
    mine = {order[(part * count + i) % size] for i in range(count)}
    assert mine == set(np.flatnonzero(draw_sent(size, 0.25, attempt(number))).tolist())


def chi_square(drawn: list[Sent], places: int = 20) -> float:
    """Pearson's statistic, for each pair of places, of how often it is sent together.

    1 expected; its deviation is 0.12 where 20 sets of 2000 draws are uniform permutations.
    """
    pairs = list(itertools.combinations(range(places), 2))
    counts = np.array([sum(bool(sent[a] and sent[b]) for sent in drawn) for a, b in pairs])
    chance = (places // 4) * (places // 4 - 1) / (places * (places - 1))
    expected = len(drawn) * chance
    return float(((counts - expected) ** 2 / (expected * (1 - chance))).sum() / len(pairs))


def test_draws_are_uniform():
    """Every pair is sent together as often, over first parts and last parts of 2000 cycles."""
    for part in (0, 3):
        drawn = [draw_sent(20, 0.25, attempt(1 + part + 4 * cycle)) for cycle in range(2000)]
        each = np.sum(drawn, axis=0)
        assert np.abs(each - 500).max() < 5 * math.sqrt(2000 * 0.25 * 0.75)
        assert abs(chi_square(drawn) - 1) < 5 * 0.12
        # Control: one of each four neighbours is as often sent, but never two of them together.
        offsets = np.random.default_rng(0).integers(0, 4, size=(2000, 5))
        stripes = [np.eye(4, dtype=bool)[each].ravel() for each in offsets]
        assert chi_square(stripes) > 5


def test_the_mean_moves_what_is_drawn_and_nothing_else():
    """Exact: the mean on the drawn numbers, the old values elsewhere; after a cycle all moved."""
    updates, start = vectors(0, 3), vectors(1, 1)[0]
    vector, moved = start, np.zeros(D, dtype=bool)
    for number in (1, 2, 3, 4):
        here = rule(number, update_clip=100.0)
        sent = draw_sent(D, 0.25, attempt(number))
        parts = [here.to_send(update) for update in updates]
        assert [part.shape for part in parts] == [(here.words,)] * 3
        assert here.words == D // 4
        assert parts[0].tobytes() == updates[0][sent].tobytes()
        mean = np.mean(np.stack(parts).astype(np.float64), axis=0)
        before, (vector, moments) = vector, here.advance(vector, {}, mean)
        accepted, _ = here.accept(before, {}, mean, None)
        assert accepted.tobytes() == vector.tobytes()
        expected = before.copy()
        expected[sent] = (before[sent].astype(np.float64) + mean).astype(np.float32)
        assert vector.tobytes() == expected.tobytes()
        assert moments == {}
        moved |= sent
    whole = np.mean(updates.astype(np.float64), axis=0)
    assert moved.all()
    assert vector.tobytes() == (start.astype(np.float64) + whole).astype(np.float32).tobytes()


def test_the_whole_update_is_clipped_before_a_part_is_taken():
    update = vectors(0, 1)[0]
    part = rule(1, update_clip=1.0).to_send(update)
    whole = rule(1, share=1.0, update_clip=1.0).to_send(update)
    assert part.tobytes() == whole[draw_sent(D, 0.25, attempt(1))].tobytes()
    assert 0.2 < float(np.linalg.norm(part)) < 0.8, "a quarter of the squares, about half the norm"


@pytest.mark.parametrize("kind", ["momentum", "adam", "yogi", "adagrad"])
def test_an_optimizer_acts_on_what_was_sent_alone(kind):
    """Each number goes as if its rounds were all there are; the others' moments stay."""
    settings = {"optimizer": kind, "server_learning_rate": 0.5, "tau": 0.125}
    start, means = vectors(1, 1)[0], vectors(2, 8).astype(np.float64)
    vector, moments = start, dict[str, npt.NDArray[np.float32]]()
    for number in range(1, 9):
        sent = draw_sent(D, 0.25, attempt(number))
        mean, before = means[number - 1][sent], (vector, moments)
        here = rule(number, **settings)
        vector, moments = here.advance(vector, moments, mean)
        accepted = here.accept(*before, mean, None)
        assert accepted[0].tobytes() == vector.tobytes()
        assert vector[~sent].tobytes() == before[0][~sent].tobytes()
        for name in before[1]:
            assert moments[name][~sent].tobytes() == before[1][name][~sent].tobytes()
    for place in range(0, D, 17):
        mine = [n for n in range(8) if draw_sent(D, 0.25, attempt(n + 1))[place]]
        assert len(mine) == 2
        alone, kept = start[place : place + 1], dict[str, npt.NDArray[np.float32]]()
        plain = Aggregation(**settings)
        for number in mine:
            alone, kept = next_state(alone, kept, means[number, place : place + 1], plain)
        assert alone[0] == vector[place]


def test_moments_of_another_length_are_refused():
    moments = {"first": np.zeros(D // 4, dtype=np.float32)}
    with pytest.raises(ProtocolError, match="moments"):
        rule(1, optimizer="momentum").advance(vectors(1, 1)[0], moments, np.zeros(D // 4))


@pytest.mark.parametrize("scheme", ["alternating", "sketch", "sketch-once"])
def test_schemes_that_need_the_whole_update_are_refused(scheme):
    with pytest.raises(InvalidValue, match="coordinates"):
        Aggregation(scheme=scheme, coordinates=0.25)


@pytest.mark.parametrize("share", [0.0, 1.1, -1.0, math.nan])
def test_limits(share):
    with pytest.raises(InvalidValue, match="coordinates"):
        Aggregation(scheme="fedavg", coordinates=share)
