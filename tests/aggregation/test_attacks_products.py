"""What sums of LoRA's products tell beside the sum of the updates: where the sites differ."""

import numpy as np
import pytest

from fedward.aggregation.products import Numbers, split
from fedward.aggregation.schemes import Layout, Vector
from fedward.aggregation.two_pass import first_pass

RANK, CLIP, KEY = 2, 1e6, bytes(32)
LAYOUT: Layout = (("q.lora_A.weight", (RANK, 30)), ("q.lora_B.weight", (40, RANK)))
(PAIR,) = split(LAYOUT)[0]
WORDS = RANK * (30 + 40)


def updates(count: int) -> list[Vector]:
    generator = np.random.default_rng(count)
    return [generator.normal(size=WORDS).astype(np.float32) for _ in range(count)]


def differences(total: Numbers, count: int) -> Numbers:
    """Left singular vectors of the covariance's sketch, most important first."""
    (b, a), y = PAIR.factors(total[:WORDS]), total[WORDS:].reshape(PAIR.m, PAIR.width)
    return np.linalg.svd(y - b @ (a @ PAIR.omega(KEY)) / count)[0]


def outside(vector: Numbers, span: Numbers) -> float:
    """The share of a matrix that no combination of columns has."""
    rest = vector - span @ (span.T @ vector)
    return float(np.linalg.norm(rest) / np.linalg.norm(vector))


@pytest.mark.parametrize(("honest", "known"), [(2, RANK), (3, 2 * RANK)])
def test_a_sum_of_products_tells_the_span_in_which_honest_sites_differ(honest, known):
    """All else are colluders who sent nothing: B of each site is the mean plus a mix of columns.

    With two honest sites as many columns as B has: all of it but a matrix of r x r. So a reader of
    sums under ``sketch`` and ``sketch-once`` is held off by the noise, and by a third site.
    """
    sites = updates(honest)
    total = np.sum([first_pass(each, LAYOUT, KEY, CLIP) for each in sites], axis=0)
    columns, middle = differences(total.astype(np.float64), honest), np.mean(sites, axis=0)
    for update in sites:
        moved = PAIR.factors(update)[0] - PAIR.factors(middle)[0]
        assert outside(moved, columns[:, :known]) < 1e-4
        assert outside(moved, columns[:, : known - 1]) > 0.05, "control: not in fewer"
        blind = np.linalg.qr(np.random.default_rng(9).normal(size=(PAIR.m, known)))[0]
        assert outside(moved, blind) > 0.8, "control: who has the sum of the updates alone"
