"""Hostile sites against the defences that secure aggregation leaves: clip, gate and groups.

The demo's model and notes dealt to ten or thirty sites, of which one or three are hostile; every
cell is a whole federation with secure aggregation, without privacy noise, which would hide the
attacks as well as the model. A finished cell is kept and never run again.

    python benchmarks/attacks.py --list                # what there is, and what is done
    python benchmarks/attacks.py --markdown            # everything
    python benchmarks/attacks.py --quick --json        # toy cells, under two minutes
"""

import fedward  # noqa: F401  # switches telemetry off before any library loads

# isort: split

import argparse
import json
from collections.abc import Sequence

from attack_grid.cells import Cell, Grid, Size, grid
from attack_grid.tables import figures, markdown, sentences
from reporting import choose, grid_options, machine, results_folder, show, work_through

PACKAGES = ("torch", "transformers", "peft", "flwr")
QUICK = Size(test=40, public=20, rounds=2)


def wanted(options: argparse.Namespace) -> Sequence[Cell]:
    """The cells that the options name; quick ones are an attack beside none, under each defence."""
    if options.quick:
        attacks = {"nothing", "sign-flip"}
        return [cell for cell in grid() if cell.sites == 10 and cell.attack in attacks]
    return choose(grid(), options.cells, options.seeds)


def report(results: Grid, options: argparse.Namespace) -> None:
    """Print what the finished cells say together."""
    done = {cell.name: kept for cell in grid() if (kept := results.result(cell)) is not None}
    print("\n".join(sentences(done)))
    if options.markdown:
        print(markdown(done))
    if options.json:
        count = {"cells": len(grid()), "done": len(done)}
        print(json.dumps({"machine": machine(*PACKAGES), **count, **figures(done)}))


def main() -> None:
    """Read the options, run what is missing and report."""
    parser = grid_options(__doc__, "out/benchmarks/attacks", data=False)
    options = parser.parse_args()
    with results_folder(parser, options, PACKAGES) as folder:
        results = Grid(folder, QUICK if options.quick else Size())
        cells = wanted(options)
        if options.list:
            show(results, cells)
        else:
            work_through(results, cells)
            report(results, options)


if __name__ == "__main__":
    main()
