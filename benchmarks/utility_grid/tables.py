"""What finished cells say together: scores, what privacy takes from them, and the figure."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from fedward.tuning.metrics import paired_interval
from utility_grid.cells import EPSILONS, LEVELS, SEEDS, TASKS, Cell, base_of, patient_of

Interval = tuple[float, float, float]
"""A mean with the ends of its 95 % bootstrap interval over the test examples."""

Results = Mapping[str, Mapping[str, Any]]
"""Name of a cell to what it found."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One task, level, tuner and epsilon over the seeds that are done.

    Args:
        cell: The first seed's.
        seeds: How many are in ``score``.
        score: Mean accuracy, or mean loss.
        by_seed: Each seed's own.
        less_free: Score minus the same without privacy; None where that is missing.
        less_record: Score of unit level minus that of record level at the same epsilon.
        sigma: Noise multiplier, 0 without privacy.
        patient: The epsilon of whoever has the most records; None where it is not another than
            the line's own, or its cell is not done.
        records: How many those are.
    """

    cell: Cell
    seeds: int
    score: Interval
    by_seed: Sequence[float]
    less_free: Interval | None
    less_record: Interval | None
    sigma: float
    patient: float | None
    records: int | None


def lines(results: Results) -> list[Line]:
    """Everything of which a cell is done."""
    every = itertools.product(TASKS, LEVELS, ("ffa", "lora"), EPSILONS)
    cells = [
        Cell(task=task, seed=SEEDS[0], level=level, tuner=tuner, epsilon=epsilon)
        for task, level, tuner, epsilon in every
    ]
    return [line for cell in cells if (line := _line(cell, results)) is not None]


def _line(cell: Cell, results: Results) -> Line | None:
    found = _seeds(cell, results)
    if not found:
        return None
    scores, facts = _scores(found), next(iter(found.values()))
    free = dataclasses.replace(cell, epsilon=math.inf)
    record = dataclasses.replace(cell, level="record")
    patient = results.get(patient_of(cell.task, cell.epsilon).name) if cell == record else None
    return Line(
        cell=cell,
        seeds=len(found),
        score=paired_interval(scores, np.zeros_like(scores)),
        by_seed=[one["mean"] for one in found.values()],
        less_free=None if cell == free else _difference(cell, free, results),
        less_record=None if cell == record else _difference(cell, record, results),
        sigma=facts["noise_multiplier"],
        patient=None if patient is None else patient["mean"],
        records=None if patient is None else patient["most_records"],
    )


def _seeds(cell: Cell, results: Results) -> dict[int, Mapping[str, Any]]:
    names = {seed: dataclasses.replace(cell, seed=seed).name for seed in SEEDS}
    return {seed: results[name] for seed, name in names.items() if name in results}


def _scores(found: Mapping[int, Mapping[str, Any]]) -> npt.NDArray[np.float64]:
    """Each test example's mean score over the seeds."""
    means: npt.NDArray[np.float64] = np.mean([one["scores"] for one in found.values()], axis=0)
    return means


def _difference(first: Cell, second: Cell, results: Results) -> Interval | None:
    """First minus second over the seeds that both have; None where there is none."""
    ones, others = _seeds(first, results), _seeds(second, results)
    both = sorted(ones.keys() & others.keys())
    if not both:
        return None
    return paired_interval(
        *(_scores({seed: found[seed] for seed in both}) for found in (ones, others))
    )


def figures(found: Sequence[Line], results: Results) -> dict[str, Any]:
    """Every number by name."""
    named: dict[str, Any] = {
        f"{task}.base": results[base_of(task).name]["mean"]
        for task in TASKS
        if base_of(task).name in results
    }
    for line in found:
        values = dataclasses.asdict(line)
        del values["cell"]
        named[_name(line.cell)] = {key: v for key, v in values.items() if v is not None}
    return named


def _name(cell: Cell) -> str:
    return f"{cell.task}.{cell.level}.{cell.tuner}.{_epsilon(cell.epsilon)}"


def _epsilon(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else "none"


def sentences(found: Sequence[Line]) -> list[str]:
    """One line of text for each line, and what record level gives a patient."""
    said = []
    for line in found:
        text = f"{_name(line.cell)}: {_number(line.score, sign='')} (seeds: {line.seeds})"
        if line.less_free is not None:
            text += f", minus no privacy {_number(line.less_free)}"
        if line.patient is not None:
            text += (
                f"; a patient with {line.records} records has epsilon {line.patient:.3g}, "
                f"not {line.cell.epsilon:g}"
            )
        said.append(text)
    return said


def markdown(found: Sequence[Line]) -> str:
    """The table for docs/benchmarks.md."""
    rows = [
        "| task | level | tuner | epsilon | sigma | seeds | score | minus no privacy | "
        "unit minus record | epsilon of the largest patient |",
        "|---" * 10 + "|",
    ]
    for line in found:
        cell, promised = line.cell, _epsilon(line.cell.epsilon)
        patient = "" if cell.level == "record" else promised
        if line.patient is not None:
            patient = f"{line.patient:.3g} ({line.records} records)"
        columns = [
            f"{cell.task}, {TASKS[cell.task].score}",
            cell.level,
            cell.tuner,
            promised,
            f"{line.sigma:.2f}",
            str(line.seeds),
            _number(line.score, sign=""),
            *("" if d is None else _number(d) for d in (line.less_free, line.less_record)),
            patient,
        ]
        rows.append(f"| {' | '.join(columns)} |")
    return "\n".join(rows)


def _number(ends: Interval, sign: str = "+") -> str:
    mean, low, high = (f"{value:{sign}.3f}" for value in ends)
    return f"{mean} [{low}, {high}]"


_STYLES = {
    ("unit", "ffa"): ("unit, FFA", "#1f5fa8", "s-"),
    ("unit", "lora"): ("unit, LoRA", "#6ea6dc", "o-"),
    ("record", "ffa"): ("record, FFA", "#c44e52", "s--"),
    ("record", "lora"): ("record, LoRA", "#e39a9c", "o--"),
}


def plot(found: Sequence[Line], results: Results, path: Path) -> None:
    """Draw score over epsilon, one panel a task, one line a level and tuner.

    Args:
        found: What :func:`lines` gave.
        results: Gives each task's start, a dotted line.
        path: Where to write, SVG or PNG by its ending.
    """
    tasks = [task for task in TASKS if any(line.cell.task == task for line in found)]
    with mpl.rc_context({"svg.hashsalt": "fedward", "font.size": 9}):
        figure = Figure(figsize=(4.2 * max(1, len(tasks)), 3.4), layout="constrained")
        for place, task in enumerate(tasks, start=1):
            axes = figure.add_subplot(1, len(tasks), place)
            for shift, ((level, tuner), (label, colour, style)) in enumerate(_STYLES.items()):
                mine = [
                    line
                    for line in found
                    if (line.cell.task, line.cell.level, line.cell.tuner) == (task, level, tuner)
                ]
                means, lows, highs = np.array([line.score for line in mine]).reshape(-1, 3).T
                axes.errorbar(
                    [EPSILONS.index(line.cell.epsilon) + 0.06 * (shift - 1.5) for line in mine],
                    means,
                    yerr=[means - lows, highs - means],
                    fmt=style,
                    color=colour,
                    label=label,
                    linewidth=1.2,
                    markersize=4,
                )
            if base_of(task).name in results:
                axes.axhline(results[base_of(task).name]["mean"], color="#777777", linestyle=":")
            axes.set_xticks(range(len(EPSILONS)), map(_epsilon, EPSILONS))
            axes.set(xlabel="epsilon", ylabel=TASKS[task].score, title=task)
            axes.grid(visible=True, axis="y", linewidth=0.3)
            if place == 1:
                figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=7)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
