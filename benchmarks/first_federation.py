"""What a federation is worth: against each site alone, all data in one place, and TF-IDF.

A grid of cells, each one training (task, seed, with or without privacy, way) by the house's own
code. A cell's scores of every test example are kept as soon as they are known; a finished cell is
never run again, and an interrupted federation goes on at its last round.

    python benchmarks/first_federation.py --list              # what there is, and what is done
    python benchmarks/first_federation.py --markdown          # everything, about two hours
    python benchmarks/first_federation.py --cells demo,'medquad.0.dp.*' --seeds 0,1
    python benchmarks/first_federation.py --quick --json      # a short demo, under two minutes
"""

import fedward  # noqa: F401  # switches telemetry off before any library loads

# isort: split

import argparse
import dataclasses
import json

import numpy as np
from federation_grid.cells import TASKS, Cell, Grid, grid
from federation_grid.tables import checks, compare, figures, markdown
from reporting import choose, finished, grid_options, machine, results_folder, show, work_through

from fedward.plan import Plan

PACKAGES = ("torch", "transformers", "peft", "opacus", "flwr", "scikit-learn")


def wanted(patterns: str, seeds: str | None) -> list[Cell]:
    """The cells that the options name; a task's name stands for all of its cells."""
    names = [f"{name}.*" if name in TASKS else name for name in patterns.split(",")]
    return choose(grid(), ",".join(names), seeds)


def short_demo(plan: Plan) -> Plan:
    """Two rounds of the demo: enough to see every part work, not what it reaches."""
    return dataclasses.replace(plan, rounds=dataclasses.replace(plan.rounds, count=2, spare=0))


def report(results: Grid, options: argparse.Namespace) -> None:
    """Print what the finished cells say together."""
    cells = finished(results, grid())
    pairs = [(task, private) for task in TASKS for private in (True, False)]
    comparisons = [c for pair in pairs if (c := compare(*pair, cells)) is not None]
    held = {
        name: holds for c in comparisons if c.task == "demo" for name, holds in checks(c).items()
    }
    print("accuracy (loss for sft), mean over seeds; in tables the median (least-most), and")
    print("95 % paired intervals over the test examples, of these trainings and no others")
    for c in comparisons:
        means = {way: round(float(np.mean(each)), 3) for way, each in c.means.items()}
        print(f"{c.task} {'DP' if c.private else 'no privacy'}: {means}")
    for name, holds in held.items():
        print(f"{'holds' if holds else 'FAILS'}: {name}")
    if options.markdown:
        print(markdown(comparisons))
    if options.json:
        numbers = figures(comparisons)
        print(json.dumps({"machine": machine(*PACKAGES), "figures": numbers, "checks": held}))


def main() -> None:
    """Read the options, run what is missing and report."""
    parser = grid_options(__doc__, "out/benchmarks/first-federation")
    options = parser.parse_args()
    with results_folder(parser, options, PACKAGES) as folder:
        shorten = short_demo if options.quick else lambda plan: plan
        results = Grid(folder, options.data, shorten)
        quick = ("demo", "0")
        cells = wanted(*(quick if options.quick else (options.cells, options.seeds)))
        if options.list:
            show(results, cells)
        else:
            work_through(results, cells)
            report(results, options)


if __name__ == "__main__":
    main()
