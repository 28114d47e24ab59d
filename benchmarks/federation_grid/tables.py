"""What finished cells say together: differences with paired intervals, checks and tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from federation_grid.cells import TASKS, Cell
from fedward.tuning.metrics import paired_interval

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One task with or without privacy, over the seeds of which everything is done.

    Args:
        means: Way to its mean score for each seed; ``alone`` is the mean over the sites.
        less_alone: Federated minus alone with the ends of its 95 % paired interval.
        less_central: The same against central.
        errors: For each seed the standard error of federated minus alone over the test examples.
        seconds: Median, least and most seconds of one federated training.
    """

    task: str
    private: bool
    seeds: Sequence[int]
    means: Mapping[str, Sequence[float]]
    less_alone: tuple[float, float, float]
    less_central: tuple[float, float, float]
    errors: Sequence[float]
    seconds: tuple[float, float, float]


def compare(
    task: str, private: bool, results: Mapping[str, Mapping[str, Any]]
) -> Comparison | None:
    """Set the ways of one task beside each other; None where no seed is complete."""

    def found(seed: int, way: str, private: bool = private) -> Mapping[str, Any] | None:
        return results.get(Cell(task=task, seed=seed, private=private, way=way).name)

    ways = ["federated", "central", *(f"alone-{site}" for site in TASKS[task].sites)]
    scores: dict[str, list[Scores]] = {"federated": [], "alone": [], "central": []}
    seeds, seconds = [], []
    for seed in TASKS[task].seeds:
        cells = [cell for way in ways if (cell := found(seed, way)) is not None]
        if len(cells) == len(ways):
            federated, central, *alone = (np.array(cell["scores"]) for cell in cells)
            scores["federated"].append(federated)
            scores["central"].append(central)
            scores["alone"].append(np.mean(alone, axis=0))
            seeds.append(seed)
            seconds.append(cells[0]["seconds_training"])
    if not seeds:
        return None
    means = {way: [float(s.mean()) for s in each] for way, each in scores.items()}
    for name, way in (("base", "base"), ("classical", "classical"), ("central_free", "central")):
        known = [cell["mean"] for seed in seeds if (cell := found(seed, way, False)) is not None]
        means |= {name: known} if known else {}
    ours, apart, together = (_joined(task, each) for each in scores.values())
    differences = [f - a for f, a in zip(scores["federated"], scores["alone"], strict=True)]
    return Comparison(
        task=task,
        private=private,
        seeds=seeds,
        means=means,
        less_alone=paired_interval(ours, apart),
        less_central=paired_interval(ours, together),
        errors=[float(d.std(ddof=1) / math.sqrt(d.size)) for d in differences],
        seconds=(float(np.median(seconds)), min(seconds), max(seconds)),
    )


def _joined(task: str, each: Sequence[Scores]) -> Scores:
    """The seeds' scores of the same examples as means; each seed of the demo has other notes."""
    return np.concatenate(each) if TASKS[task].plan is None else np.mean(each, axis=0)


def checks(demo: Comparison) -> dict[str, bool]:
    """What the demo must show, each of it for every seed that is done."""
    means = demo.means
    gains = [f - a for f, a in zip(means["federated"], means["alone"], strict=True)]
    found = {
        "demo.federated>=alone+2se": all(
            gain >= 2 * error for gain, error in zip(gains, demo.errors, strict=True)
        )
    }
    if len(gains) > 1:
        error = float(np.std(gains, ddof=1) / math.sqrt(len(gains)))
        found["demo.federated>=alone+2se_over_seeds"] = float(np.mean(gains)) >= 2 * error
    if "base" in means:
        rises = [f - b for f, b in zip(means["federated"], means["base"], strict=True)]
        found["demo.federated>=base+0.10"] = min(rises) >= 0.10
    if "classical" in means:
        found["demo.classical<0.97"] = max(means["classical"]) < 0.97
    return found


def figures(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Every mean, difference, ratio and time by name."""
    named: dict[str, Any] = {}
    for c in comparisons:
        prefix = f"{c.task}.{'dp' if c.private else 'free'}"
        mean = {way: float(np.mean(each)) for way, each in c.means.items()}
        named |= {f"{prefix}.{way}": value for way, value in mean.items()}
        named |= {f"{prefix}.{way}.by_seed": each for way, each in c.means.items()}
        named[f"{prefix}.federated-alone"] = c.less_alone
        named[f"{prefix}.federated-central"] = c.less_central
        named[f"{prefix}.federated/alone"] = mean["federated"] / mean["alone"]
        named[f"{prefix}.federated/central"] = mean["federated"] / mean["central"]
        named[f"{prefix}.seconds"] = c.seconds
    return named


COLUMNS = ("base", "alone", "federated", "central", "central_free", "classical")


def markdown(comparisons: Sequence[Comparison]) -> str:
    """Tables for docs/benchmarks.md: every task, and the demo seed by seed."""
    head = "base | alone (mean) | federated | central | central, no DP | TF-IDF, no DP"
    lines = [
        f"| task | privacy | seeds | {head} | federated - alone | federated - central |",
        "|---" * 11 + "|",
    ]
    for c in comparisons:
        privacy = "DP" if c.private else "none"
        cells = [_spread(c.means.get(way, ())) for way in COLUMNS]
        ends = [_interval(c.less_alone), _interval(c.less_central)]
        lines.append(f"| {' | '.join([c.task, privacy, str(len(c.seeds)), *cells, *ends])} |")
    for c in comparisons:
        if c.task == "demo":
            lines += ["", f"| demo, seed | {head} | 2 standard errors |", "|---" * 8 + "|"]
            for place, seed in enumerate(c.seeds):
                each = [c.means.get(way, ()) for way in COLUMNS]
                cells = [f"{v[place]:.3f}" if len(v) > place else "" for v in each]
                lines.append(f"| {seed} | {' | '.join(cells)} | {2 * c.errors[place]:.3f} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def _interval(ends: tuple[float, float, float]) -> str:
    return f"{ends[0]:+.3f} [{ends[1]:+.3f}, {ends[2]:+.3f}]"
