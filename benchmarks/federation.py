"""Ways to train together: schemes beside each site alone and all data in one place.

The question types of medical answers at nine real institutes, the conditions in medical abstracts
at six sites with uneven shares, an encoder of 22 M parameters with LoRA; and the loss of a small
language model on instructions at FedIT's ten clients. At most 2,500 training rows, every federated
cell with secure aggregation. A cell's scores of every test row are kept as soon as they are known;
a finished cell is never run again.

    python benchmarks/federation.py --list                # what there is, and what is done
    python benchmarks/federation.py --markdown --plot docs/federation.svg    # everything
    python benchmarks/federation.py --tune --cells 'dolly.0.*fedavg'   # the rates that were tried
    python benchmarks/federation.py --quick --json        # toy cells, under two minutes
"""

import fedward  # noqa: F401  # switches telemetry off before any library loads

# isort: split

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from reporting import (
    choose,
    grid_options,
    report_cells,
    results_folder,
    show,
    work_through,
)
from scheme_grid import tables
from scheme_grid.cells import Cell, Grid, Size, grid
from scheme_grid.plot import plot

PACKAGES = ("torch", "transformers", "peft", "opacus", "flwr")
QUICK = Size(rows=600, test=60, rounds=2)


def wanted(options: argparse.Namespace) -> Sequence[Cell]:
    """The cells that the options name; quick ones are what the two differences of JSON need."""
    if options.quick:
        ways = {math.inf: {"fedavg", "sketch"}, 3.0: {"pooled", "central-noise"}}
        medquad = [cell for cell in grid() if (cell.task, cell.seed) == ("medquad", 0)]
        return [cell for cell in medquad if cell.way in ways.get(cell.epsilon, ())]
    return choose(grid(), options.cells, options.seeds)


def tune(results: Grid, cells: Sequence[Cell]) -> None:
    """Print what each rate comes to on training units that are held out."""
    for cell in cells:
        found = {rate: round(score, 3) for rate, score in results.tune(cell).items()}
        print(f"{cell.name}: {found}", flush=True)


def main() -> None:
    """Read the options, run what is missing and report."""
    parser = grid_options(__doc__, "out/benchmarks/federation")
    parser.add_argument("--tune", action="store_true", help="try learning rates, keep nothing")
    parser.add_argument("--plot", type=Path, help="draw the figure: a file .svg or .png")
    options = parser.parse_args()
    with results_folder(parser, options, PACKAGES) as folder:
        results = Grid(folder, options.data, QUICK if options.quick else Size())
        cells = wanted(options)
        if options.list:
            show(results, cells)
        elif options.tune:
            tune(results, cells)
        else:
            work_through(results, cells)
            print("accuracy (dolly: loss) on the test rows, mean over seeds; differences with 95 %")
            print("paired intervals over the test rows, of these trainings and no others")
            done = report_cells(results, grid(), options, PACKAGES, tables)
            if options.plot is not None:
                plot(done, options.plot)


if __name__ == "__main__":
    main()
