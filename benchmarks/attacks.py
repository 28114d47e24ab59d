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
from collections.abc import Sequence

from attack_grid import tables
from attack_grid.cells import Cell, Grid, Size, grid
from reporting import choose, grid_options, report_cells, results_folder, show, work_through

PACKAGES = ("torch", "transformers", "peft", "flwr")
QUICK = Size(test=40, public=20, rounds=2)


def wanted(options: argparse.Namespace) -> Sequence[Cell]:
    """The cells that the options name; quick ones are an attack beside none, under each defence."""
    if options.quick:
        attacks = {"nothing", "sign-flip"}
        return [cell for cell in grid() if cell.sites == 10 and cell.attack in attacks]
    return choose(grid(), options.cells, options.seeds)


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
            report_cells(results, grid(), options, PACKAGES, tables)


if __name__ == "__main__":
    main()
