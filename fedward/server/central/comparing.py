"""Which of two models is better, or that no difference is shown.

One figure decides, known before anything is computed: the first that the models have, or one that
is named. Both models answer the same rows, so they are compared pair by pair.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest  # type: ignore[import-untyped]  # no py.typed

from fedward.errors import ConfigurationError, InvalidValue, ModelError
from fedward.server.central.data import file_digest
from fedward.server.central.evaluating import LOWER, Figure, Interval, as_json, figures_of
from fedward.server.central.loading import identity
from fedward.server.central.opening import Opened
from fedward.server.central.scoring import Asked, Numbers, Scores, read_rows, score
from fedward.tuning.resampling import Units, bootstrap, swap_test

LEVEL = 0.05
"""Models that are alike are called different at most so often."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same rows.

    Args:
        decides: The figure that is tested.
        first: Name to figure of the first model.
        second: The same of the second.
        differences: First minus second, with paired intervals.
        p_value: Of no difference in ``decides``.
        test: What gave it.
        rows: How many rows.
        units: How many units.
    """

    decides: str
    first: Mapping[str, float]
    second: Mapping[str, float]
    differences: Mapping[str, Interval]
    p_value: float
    test: str
    rows: int
    units: int

    @property
    def shown(self) -> bool:
        """Whether a difference is shown: p below 0.05, and an interval without 0."""
        each = self.differences[self.decides]
        return self.p_value < LEVEL and not each.low <= 0 <= each.high

    @property
    def better(self) -> str | None:
        """``first`` or ``second``, or None where no difference is shown."""
        if not self.shown:
            return None
        more = self.differences[self.decides].value > 0
        return "first" if more is not (self.decides in LOWER) else "second"


def compare_models(
    first: Opened, second: Opened, asked: Asked, console: Console, *, decides: str | None = None
) -> Comparison:
    """Compare two models on one file.

    Args:
        first: One model.
        second: Another of the same kind.
        asked: What on, and how.
        console: Where progress is shown.
        decides: The figure that is tested; left out: the first of the kind.

    Raises:
        ConfigurationError: ``decides`` is no figure of these models.
        DataError: Records that cannot be used.
        ModelError: Models that cannot be compared.
    """
    if first.kind != second.kind:
        raise ModelError(f"a {first.kind} and a {second.kind} model cannot be compared")
    rows = read_rows(asked, first.kind)
    one, other = (score(each, rows, asked, console) for each in (first, second))
    return compare_scores(one, other, rows.units, decides=decides)


def compare_scores(
    one: Scores,
    other: Scores,
    units: Units,
    *,
    decides: str | None = None,
    resamples: int = 2000,
) -> Comparison:
    """Compare two models' scores of the same rows.

    Args:
        one: Of one model.
        other: Of the other.
        units: Which rows belong together.
        decides: As in :func:`compare_models`.
        resamples: How often units are drawn, and how often models are swapped.

    Raises:
        ConfigurationError: ``decides`` is no figure of these scores.
        ModelError: They tell other labels apart.

    Guarantees:
        Where both models are alike, :attr:`Comparison.shown` is true with probability at most 0.05.
    """
    if one.labels != other.labels:
        labels = " and ".join(", ".join(scores.labels) for scores in (one, other))
        raise ModelError(f"the models tell other labels apart: {labels}")
    figures = figures_of(one)
    if "tokens" in one.numbers and not np.array_equal(
        one.numbers["tokens"], other.numbers["tokens"]
    ):
        del figures["perplexity"]  # of tokens that differ; bits per byte can be compared
    decides = decides or next(iter(figures))
    if decides not in figures:
        raise InvalidValue("--by", decides, f"one of {', '.join(figures)}")
    differences = _differences(figures, one.numbers, other.numbers, units, resamples)
    if np.isnan(differences[decides].value):
        raise ConfigurationError(f"{decides} cannot be computed on these rows: name another --by")
    column = _COUNTED.get(decides)
    if column is not None and units.size.max() == 1:
        test, p_value = "McNemar, exact", mcnemar(one.numbers[column], other.numbers[column])
    else:
        test = "paired randomisation"
        p_value = _swapped(figures[decides], one.numbers, other.numbers, units, resamples)
    return Comparison(
        decides=decides,
        first={name: figure(one.numbers) for name, figure in figures.items()},
        second={name: figure(other.numbers) for name, figure in figures.items()},
        differences=differences,
        p_value=p_value,
        test=test,
        rows=units.rows.size,
        units=units.size.size,
    )


def _differences(
    figures: Mapping[str, Figure], one: Numbers, other: Numbers, units: Units, resamples: int
) -> dict[str, Interval]:
    def statistic(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        a, b = ({name: each[rows] for name, each in n.items()} for n in (one, other))
        return np.array([figure(a) - figure(b) for figure in figures.values()])

    values = statistic(np.arange(units.rows.size))
    ends = zip(values, *bootstrap(statistic, units, resamples=resamples), strict=True)
    return {
        name: Interval(value=float(value), low=float(low), high=float(high))
        for name, (value, low, high) in zip(figures, ends, strict=True)
    }


_COUNTED = {"accuracy": "correct", "preference_accuracy": "preferred"}
"""Figures that are a share of rows, and the column that says which."""


def _swapped(figure: Figure, one: Numbers, other: Numbers, units: Units, resamples: int) -> float:
    def difference(swapped: npt.NDArray[np.bool_]) -> float:
        a = {key: np.where(swapped, other[key], one[key]) for key in one}
        b = {key: np.where(swapped, one[key], other[key]) for key in one}
        return figure(a) - figure(b)

    return swap_test(difference, units, resamples=resamples)


def mcnemar(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Two-sided p-value of two models that are right equally often, from the rows they differ in.

    McNemar 1947, "Note on the sampling error of the difference between correlated proportions", by
    the exact binomial.

    Args:
        one: ``(n,)`` of 0 and 1.
        other: The same of the other model.

    >>> round(mcnemar(np.array([1.0] * 9 + [0.0]), np.array([0.0] * 9 + [1.0])), 4)
    0.0215
    """
    only_one, only_other = int((one > other).sum()), int((other > one).sum())
    if only_one + only_other == 0:
        return 1.0
    return float(binomtest(only_one, only_one + only_other).pvalue)


def verdict(comparison: Comparison, first: str, second: str) -> str:
    """The outcome as one sentence.

    Args:
        comparison: Of the two.
        first: The first model's name.
        second: The second's.
    """
    name = comparison.decides
    each = comparison.differences[name]
    evidence = f"p = {comparison.p_value:.3g}, {comparison.test}"
    said = name.replace("_", " ")
    if comparison.better is None:
        return (
            f"No difference in {said} is shown: {first} less {second} is {each.value:+.4g} "
            f"[{each.low:+.4g}, {each.high:+.4g}] ({evidence})."
        )
    winner, loser = (first, second) if comparison.better == "first" else (second, first)
    low, high = sorted(map(abs, (each.low, each.high)))
    way = "lower" if name in LOWER else "higher"
    return (
        f"{winner} is better than {loser}: {said} is {way} by {abs(each.value):.4g} "
        f"[{low:.4g}, {high:.4g}] ({evidence})."
    )


def comparison_document(
    comparison: Comparison, first: Opened, second: Opened, asked: Asked
) -> dict[str, Any]:
    """What ``comparison.json`` says; figures that are no number become null."""
    return {
        "verdict": verdict(comparison, first.name, second.name),
        "better": {"first": first.name, "second": second.name, None: None}[comparison.better],
        "decides": comparison.decides,
        "p_value": comparison.p_value,
        "test": comparison.test,
        "rows": comparison.rows,
        "units": comparison.units,
        "data": str(asked.data),
        "data_sha256": file_digest(asked.data),
        "models": [
            {"model": each.name, "identity": identity(each.folder)} for each in (first, second)
        ],
        "figures": {
            name: {
                "first": _number(comparison.first[name]),
                "second": _number(comparison.second[name]),
                "difference": as_json(each),
            }
            for name, each in comparison.differences.items()
        },
    }


def comparison_table(comparison: Comparison, first: str, second: str) -> Table:
    """Every figure of both, and the difference, for the terminal."""
    table = Table("figure", first, second, "difference", "95 % interval")
    for name, each in comparison.differences.items():
        table.add_row(
            name.replace("_", " "),
            f"{comparison.first[name]:.4g}",
            f"{comparison.second[name]:.4g}",
            f"{each.value:+.4g}",
            f"{each.low:+.4g} to {each.high:+.4g}",
            style="bold" if name == comparison.decides else "",
        )
    return table


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
