"""What finished cells say together: scores, bytes, seconds and paired differences."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedward.tuning.metrics import paired_interval
from scheme_grid.cells import SEEDS, TASKS, WAYS, Cell

Results = Mapping[str, Mapping[str, Any]]

Setting = tuple[str, float]
"""Task and epsilon: what ways are compared under."""

SETTINGS = [(name, epsilon) for name, task in TASKS.items() for epsilon in task.epsilons]

PAIRS = (
    ("sketch", "fedavg"),
    ("sketch", "central"),
    ("sketch", "sketch-once"),
    ("sketch-mixed", "sketch"),
    ("sketch-once", "fedavg"),
    ("sketch-once", "ffa"),
    ("sketch-once", "central"),
    ("ffa", "fedavg"),
    ("alternating", "fedavg"),
    ("fedavg", "central"),
    ("fedavg", "alone"),
    ("pooled", "central-noise"),
    ("pooled", "central"),
    ("pooled", "fedavg"),
    ("pooled", "ffa"),
)
"""Ways whose difference is reported."""


def cells_of(
    done: Results, way: str, setting: Setting, seeds: Sequence[int] = SEEDS
) -> list[Mapping[str, Any]]:
    """What a way's finished cells found, by seed."""
    task, epsilon = setting
    names = [Cell(task=task, way=way, epsilon=epsilon, seed=seed).name for seed in seeds]
    return [done[name] for name in names if name in done]


def _both(done: Results, one: str, other: str, setting: Setting) -> list[int]:
    """The seeds of which both ways are done."""
    return [
        seed
        for seed in SEEDS
        if cells_of(done, one, setting, [seed]) and cells_of(done, other, setting, [seed])
    ]


def _difference(
    done: Results, one: str, other: str, setting: Setting
) -> tuple[float, float, float] | None:
    """Mean difference with its interval: scores are means over seeds, pairs are test rows."""
    seeds = _both(done, one, other, setting)
    if not seeds:
        return None
    ours, theirs = (
        np.mean([cell["scores"] for cell in cells_of(done, way, setting, seeds)], axis=0)
        for way in (one, other)
    )
    return paired_interval(ours, theirs)


def setting_name(setting: Setting) -> str:
    """The task and its privacy, for readers."""
    task, epsilon = setting
    return f"{task}, " + (f"epsilon {epsilon:g}" if math.isfinite(epsilon) else "no privacy")


def sentences(done: Results) -> list[str]:
    """One line a way, and one a difference."""
    lines = []
    for setting in SETTINGS:
        for way in WAYS:
            means = [cell["mean"] for cell in cells_of(done, way, setting)]
            if means:
                each = ", ".join(f"{mean:.3f}" for mean in means)
                lines.append(f"{setting_name(setting)}, {way}: {np.mean(means):.3f} ({each})")
        for one, other in PAIRS:
            found = _difference(done, one, other, setting)
            if found is not None:
                lines.append(f"{setting_name(setting)}, {one} - {other}: {_interval(found)}")
    return lines


def figures(done: Results) -> dict[str, Any]:
    """Every mean and difference by name; those of medquad without privacy have the short names."""
    named: dict[str, Any] = {}
    for setting in SETTINGS:
        task, epsilon = setting
        prefix = "" if task == "medquad" else f"{task}."
        prefix += "" if math.isinf(epsilon) else f"epsilon_{epsilon:g}."
        for way in WAYS:
            means = [cell["mean"] for cell in cells_of(done, way, setting)]
            named |= {f"{prefix}{way}": means} if means else {}
        for one, other in PAIRS:
            found = _difference(done, one, other, setting)
            if found is not None:
                key = f"{one}_minus_{other}".replace("sketch-once", "sketch_once")
                named[f"{prefix}{key}"] = found
    under_noise = named.get("epsilon_3.pooled_minus_central-noise")
    return named if under_noise is None else named | {"pooled_minus_central": under_noise}


def markdown(done: Results) -> str:
    """Tables for docs/benchmarks.md."""
    lines = [
        "| task, privacy | way | accuracy or loss (each seed) | KB up a site and round | seconds |",
        "|---|---|---|---|---|",
    ]
    for setting in SETTINGS:
        for way in WAYS:
            cells = cells_of(done, way, setting)
            if cells:
                means = [cell["mean"] for cell in cells]
                each = ", ".join(f"{mean:.3f}" for mean in means)
                sent = [c["bytes_up_a_round"] / 1e3 for c in cells if "bytes_up_a_round" in c]
                up = f"{np.median(sent):.0f}" if sent else ""
                seconds = f"{np.median([cell['seconds'] for cell in cells]):.0f}"
                score = f"{np.mean(means):.3f} ({each})"
                lines.append(f"| {setting_name(setting)} | {way} | {score} | {up} | {seconds} |")
    lines += ["", "| task, privacy | difference | [95 % paired] |", "|---|---|---|"]
    for setting in SETTINGS:
        for one, other in PAIRS:
            found = _difference(done, one, other, setting)
            if found is not None:
                lines.append(f"| {setting_name(setting)} | {one} - {other} | {_interval(found)} |")
    return "\n".join(lines)


def _interval(ends: tuple[float, float, float]) -> str:
    return f"{ends[0]:+.3f} [{ends[1]:+.3f}, {ends[2]:+.3f}]"
