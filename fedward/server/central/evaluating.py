"""How good a model is: figures over its scores, each with a 95 % interval.

Intervals are percentile bootstraps over units (:mod:`fedward.tuning.resampling`).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr  # type: ignore[import-untyped]  # no py.typed

from fedward.server.central.data import file_digest
from fedward.server.central.loading import identity
from fedward.server.central.opening import Opened
from fedward.server.central.scoring import (
    ROUGE,
    Asked,
    Numbers,
    Rows,
    Scores,
    read_rows,
    score,
)
from fedward.tuning.resampling import Units, bootstrap

Figure = Callable[[Numbers], float]
Class = npt.NDArray[np.float64]

LOWER = ("bits_per_byte", "perplexity")
"""Figures of which less is better."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its 95 % interval; NaN where there is none.

    Args:
        value: On all rows.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model reached on a file.

    Args:
        kind: ``language``, ``reward`` or ``classifier``.
        figures: Name to figure; the first is the one by which models are compared.
        classes: Class to its ``precision``, ``recall`` and ``f1``.
        rows: Read.
        scores: What they were computed from.
    """

    kind: str
    figures: Mapping[str, Interval]
    classes: Mapping[str, Mapping[str, Interval]]
    rows: Rows
    scores: Scores

    def confusion(self) -> list[list[int]]:
        """How many rows of each class (lines) got each label (columns), by ``scores.labels``."""
        if not self.scores.labels:
            return []
        found: list[list[int]] = _confusion(self.scores.numbers, len(self.scores.labels)).tolist()
        return found


def figures_of(scores: Scores) -> dict[str, Figure]:
    """Every figure that these scores have, by name, the deciding one first."""
    has, found = scores.numbers, dict[str, Figure]()
    if "correct" in has:
        classes = len(scores.labels)
        found["accuracy"] = _mean("correct")
        for place, name in enumerate(("precision", "recall", "f1")):
            found[f"macro_{name}"] = _macro(classes, place)
    if "preferred" in has:
        found["preference_accuracy"] = _mean("preferred")
        found["mean_margin"] = _mean("margin")
    if "score" in has:
        rated = "margin" if "margin" in has else "rating"
        found["spearman"] = lambda n: _spearman(n[rated], n["score"])
    if "reward" in has:
        found["reward"] = _mean("reward")
    if "nll" in has:
        found["bits_per_byte"] = lambda n: _ratio(n["nll"], n["bytes"]) / math.log(2)
        found["perplexity"] = lambda n: math.exp(min(700.0, _ratio(n["nll"], n["tokens"])))
    found |= {name: _mean(name) for name in ROUGE if name in has}
    return found


def evaluate_model(opened: Opened, asked: Asked, console: Console) -> Evaluation:
    """Evaluate one model on one file.

    Args:
        opened: The model.
        asked: What on, and how.
        console: Where progress is shown.

    Raises:
        ConfigurationError: Columns or a rule that do not go with the model.
        DataError: Records that cannot be used.
    """
    rows = read_rows(asked, opened.kind)
    scores = score(opened, rows, asked, console)
    figures = figures_of(scores)
    found = intervals(
        lambda n: np.array([figure(n) for figure in figures.values()]), scores.numbers, rows.units
    )
    classes = dict[str, dict[str, Interval]]()
    if scores.labels:
        width = len(scores.labels)
        each = intervals(lambda n: np.concatenate(_by_class(n, width)), scores.numbers, rows.units)
        classes = {
            label: {
                name: each[place * width + number]
                for place, name in enumerate(("precision", "recall", "f1"))
            }
            for number, label in enumerate(scores.labels)
        }
    return Evaluation(
        kind=opened.kind,
        figures=dict(zip(figures, found, strict=True)),
        classes=classes,
        rows=rows,
        scores=scores,
    )


def intervals(
    statistic: Callable[[Numbers], npt.NDArray[np.float64]], numbers: Numbers, units: Units
) -> list[Interval]:
    """Several figures of the same rows with their intervals.

    Args:
        statistic: Figures, shape (k,), of columns of equal length.
        numbers: The columns.
        units: Which rows are drawn together.
    """
    values = statistic(numbers)
    low, high = bootstrap(
        lambda rows: statistic({name: column[rows] for name, column in numbers.items()}), units
    )
    return [
        Interval(value=float(a), low=float(b), high=float(c))
        for a, b, c in zip(values, low, high, strict=True)
    ]


def document(opened: Opened, asked: Asked, evaluation: Evaluation) -> dict[str, Any]:
    """What ``evaluation.json`` says; figures that are no number become null."""
    units = evaluation.rows.units
    return {
        "model": opened.name,
        "model_identity": identity(opened.folder),
        "kind": evaluation.kind,
        "data": str(asked.data),
        "data_sha256": file_digest(asked.data),
        "columns": list(evaluation.rows.way),
        "rows": int(units.rows.size),
        "units": int(units.size.size),
        "inputs_cut": evaluation.scores.cut,
        "figures": {name: as_json(each) for name, each in evaluation.figures.items()},
        "classes": {
            label: {name: as_json(each) for name, each in named.items()}
            for label, named in evaluation.classes.items()
        },
        "confusion": {
            "labels": list(evaluation.scores.labels),
            "counts": evaluation.confusion(),
        },
    }


def as_json(interval: Interval) -> dict[str, float | None]:
    """An interval for JSON, which knows no NaN."""
    values: dict[str, float] = dataclasses.asdict(interval)
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def write_evaluation(folder: Path, written: Mapping[str, Any], evaluation: Evaluation) -> None:
    """Write ``evaluation.json`` and ``rows.jsonl``: what was found, and from which rows.

    Args:
        folder: Made if it is not there.
        written: What :func:`document` gave.
        evaluation: Its rows and scores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = evaluation.scores
    columns = {**{name: each.tolist() for name, each in scores.numbers.items()}, **scores.texts}
    lines = [
        json.dumps({**row, **{name: column[number] for name, column in columns.items()}})
        for number, row in enumerate(evaluation.rows.values)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    text = json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / "evaluation.json").write_text(text, encoding="utf-8")


def tables(evaluation: Evaluation) -> list[Table]:
    """Figures, classes and confusion matrix for the terminal."""
    figures = Table("figure", "value", "95 % interval")
    for name, each in evaluation.figures.items():
        figures.add_row(name.replace("_", " "), f"{each.value:.4g}", _ends(each))
    if not evaluation.classes:
        return [figures]
    classes = Table("class", "precision", "recall", "F1", title="Classes", title_justify="left")
    for label, named in evaluation.classes.items():
        classes.add_row(label, *(f"{each.value:.3f} {_ends(each)}" for each in named.values()))
    labels = evaluation.scores.labels
    confusion = Table("class \\ label", *labels, title="Confusion", title_justify="left")
    for label, counts in zip(labels, evaluation.confusion(), strict=True):
        confusion.add_row(label, *map(str, counts))
    return [figures, classes, confusion]


def _ends(each: Interval) -> str:
    return f"{each.low:.4g} to {each.high:.4g}"


def _mean(name: str) -> Figure:
    return lambda numbers: float(numbers[name].mean())


def _ratio(over: npt.NDArray[np.float64], under: npt.NDArray[np.float64]) -> float:
    total = float(under.sum())
    return float(over.sum()) / total if total else math.nan


def _spearman(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan  # no order
    found: Any = spearmanr(one, other)
    return float(found.statistic)


def _confusion(numbers: Numbers, classes: int) -> npt.NDArray[np.int64]:
    """Shape (classes, classes): truth by prediction."""
    cells = (numbers["truth"] * classes + numbers["predicted"]).astype(np.int64)
    counts: npt.NDArray[np.int64] = np.bincount(cells, minlength=classes * classes)
    return counts.reshape(classes, classes)


def _by_class(numbers: Numbers, classes: int) -> tuple[Class, Class, Class]:
    """Precision, recall and F1 of each class, shape (classes,); NaN for one that does not occur."""
    counts = _confusion(numbers, classes)
    hits, true, said = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    absent = np.where(true > 0, 0.0, np.nan)
    return (
        absent + hits / np.maximum(said, 1),
        absent + hits / np.maximum(true, 1),
        absent + 2 * hits / np.maximum(true + said, 1),
    )


def _macro(classes: int, place: int) -> Figure:
    """Unweighted mean over the classes that occur of precision, recall or F1."""

    def macro(numbers: Numbers) -> float:
        values = _by_class(numbers, classes)[place]
        return float(values[~np.isnan(values)].mean())

    return macro
