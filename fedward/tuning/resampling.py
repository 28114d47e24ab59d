"""How far a figure may be off by luck, and whether two are the same: units are drawn again.

A unit is what is drawn: a row, or all rows of one patient, question or dialogue, which are alike
and must not be counted as if they were many.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedward.errors import DataError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Units:
    """Which rows belong together.

    Args:
        rows: ``(n,)``, every row's number, those of one unit side by side.
        first: ``(u,)``, where in ``rows`` each unit begins.
        size: ``(u,)``, how many rows each has, 1 or more.
    """

    rows: Indices
    first: Indices
    size: Indices

    def draw(self, generator: np.random.Generator) -> Indices:
        """The rows of as many units as there are, each drawn from all of them."""
        drawn = generator.integers(0, self.size.size, self.size.size)
        size = self.size[drawn]
        before = np.repeat(np.cumsum(size) - size, size)
        inside: Indices = np.arange(size.sum()) - before
        found: Indices = self.rows[np.repeat(self.first[drawn], size) + inside]
        return found

    def toss(self, generator: np.random.Generator) -> npt.NDArray[np.bool_]:
        """``(n,)``, heads or tails for every row, the same for all rows of a unit."""
        heads = np.empty(self.rows.size, dtype=np.bool_)
        heads[self.rows] = np.repeat(generator.random(self.size.size) < 0.5, self.size)
        return heads


def units_of(names: Sequence[object]) -> Units:
    """Units from the name of each row's; rows without one (None, empty text) are their own.

    Raises:
        DataError: No rows.
    """
    if not names:
        raise DataError("expected at least one row")
    members: dict[object, list[int]] = {}
    for number, name in enumerate(names):
        members.setdefault((number,) if name in (None, "") else str(name), []).append(number)
    size = np.array([len(rows) for rows in members.values()])
    rows = np.array([row for rows in members.values() for row in rows])
    return Units(rows=rows, first=np.cumsum(size) - size, size=size)


def each_row(count: int) -> Units:
    """Every row by itself.

    Raises:
        DataError: No rows.
    """
    return units_of([None] * count)


def bootstrap(
    statistic: Callable[[Indices], npt.NDArray[np.float64]],
    units: Units,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """95 % percentile bootstrap intervals of several figures at once, by unit.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; drawing whole units:
    Davison and Hinkley 1997, section 3.8. With fewer than about 20 units it is too narrow.

    Args:
        statistic: Figures, shape (k,), of the rows of these numbers; NaN where there is none.
        units: What is drawn.
        seed: Seed of the drawing.
        resamples: How many, at least 100 make sense.

    Returns:
        Lower and upper ends, both of shape (k,); NaN for a figure that no draw has.
    """
    generator = np.random.default_rng(seed)
    found = np.array([statistic(units.draw(generator)) for _ in range(resamples)])
    ends = np.full((2, found.shape[1]), np.nan)
    for column, values in enumerate(found.T):
        known = values[~np.isnan(values)]
        if known.size:
            ends[:, column] = np.quantile(known, [0.025, 0.975])
    return ends[0], ends[1]


def swap_test(
    difference: Callable[[npt.NDArray[np.bool_]], float],
    units: Units,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> float:
    """Chance of a difference as large as this one, were the two models alike: by swapping them.

    The paired randomisation test (Noreen 1989, "Computer-Intensive Methods for Testing Hypotheses",
    chapter 2): where the models are alike, whose answer is whose is decided by coins, one a unit.

    Args:
        difference: The difference of the two when the marked rows, shape (n,), are swapped.
        units: What is swapped as a whole.
        seed: Seed of the coins.
        resamples: How often they are tossed.

    Returns:
        The two-sided p-value, above 0 and at most 1.

    Guarantees:
        Where the models are alike, p is at most a with probability at most a, whatever the number
        of units.
    """
    generator = np.random.default_rng(seed)
    seen = abs(difference(np.zeros(units.rows.size, dtype=np.bool_)))
    # Sums of the same numbers in another order differ in their last bits.
    least = seen - 1e-9 * max(1.0, seen)
    reached = sum(abs(difference(units.toss(generator))) >= least for _ in range(resamples))
    return (reached + 1) / (resamples + 1)
