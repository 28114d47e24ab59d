"""What privacy costs in usefulness: task x level x tuner x epsilon x seed, trained in one place.

Question types of medical answers (an encoder of 22 M parameters) and sentences about restaurants
(the 8 M Llama of ``make base-lm``), at most 5,000 rows and 64 tokens each, by the house's own
DP-SGD. A cell takes about a minute of one quiet core; its scores of every test example are kept as
soon as they are known, and a finished cell is never run again.

    python benchmarks/dp_utility.py --list                    # what there is, and what is done
    python benchmarks/dp_utility.py --cells 'medquad.*.unit.*' --seeds 0
    python benchmarks/dp_utility.py --markdown --plot docs/dp-utility.svg
    python benchmarks/dp_utility.py --quick --json            # six toy cells, under two minutes
"""

import fedward  # noqa: F401  # switches telemetry off before any library loads

# isort: split

import argparse
import json
import math
from pathlib import Path

from reporting import choose, finished, grid_options, machine, results_folder, show, work_through
from utility_grid.cells import Cell, Grid, Size, grid
from utility_grid.tables import figures, lines, markdown, plot, sentences

PACKAGES = ("torch", "transformers", "peft", "opacus")
QUICK = Size(rows=300, test=32, steps=2)


def wanted(patterns: str, seeds: str | None, *, quick: bool) -> list[Cell]:
    """The cells that the options name."""
    if quick:
        return [
            cell
            for cell in grid()
            if (cell.task, cell.seed) == ("medquad", 0)
            and cell.tuner != "lora"
            and cell.epsilon in {math.inf, 1.0}
        ]
    return choose(grid(), patterns, seeds)


def report(results: Grid, options: argparse.Namespace) -> None:
    """Print what the finished cells say together."""
    done = finished(results, grid())
    found = lines(done)
    print(
        "accuracy (medquad) or loss (e2e): mean over seeds with 95 % bootstrap intervals over the"
    )
    print("test examples of these trainings; differences are paired")
    print("\n".join(sentences(found)))
    if options.markdown:
        print(markdown(found))
    if options.plot is not None:
        plot(found, done, options.plot)
    if options.json:
        count = {"cells": len(grid()), "done": len(done)}
        print(json.dumps({"machine": machine(*PACKAGES), **count, "figures": figures(found, done)}))


def main() -> None:
    """Read the options, run what is missing and report."""
    parser = grid_options(__doc__, "out/benchmarks/dp-utility")
    parser.add_argument("--plot", type=Path, help="draw the figure: a file .svg or .png")
    options = parser.parse_args()
    with results_folder(parser, options, PACKAGES) as folder:
        results = Grid(folder, options.data, QUICK if options.quick else Size())
        cells = wanted(options.cells, options.seeds, quick=options.quick)
        if options.list:
            show(results, cells)
        else:
            work_through(results, cells)
            report(results, options)


if __name__ == "__main__":
    main()
