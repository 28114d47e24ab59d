"""What every benchmark says of where it ran, and how a grid's cells are chosen."""

import argparse
import contextlib
import fnmatch
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedward.errors import ConfigurationError, FedwardError
from fedward.plan import Plan


def machine(*packages: str) -> dict[str, str]:
    """Where the figures come from: processor, cores, system, Python and packages beside fedward."""
    facts = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    names = [line.split(":")[1].strip() for line in facts.splitlines() if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("fedward", *packages)},
    }


C_contra = TypeVar("C_contra", contravariant=True)


class Named(Protocol):
    """A cell of a grid."""

    @property
    def name(self) -> str:
        """What patterns are matched with."""
        ...

    @property
    def seed(self) -> int:
        """What ``--seeds`` chooses by."""
        ...


C = TypeVar("C", bound=Named)


Done = Mapping[str, Mapping[str, Any]]
"""Name of a finished cell to what was found."""


class Tables(Protocol):
    """A grid's module of tables."""

    def sentences(self, done: Done) -> list[str]:
        """What there is to say, by lines."""
        ...

    def markdown(self, done: Done) -> str:
        """Tables for docs/benchmarks.md."""
        ...

    def figures(self, done: Done) -> dict[str, Any]:
        """Figures by name, for JSON."""
        ...


class Results(Protocol[C_contra]):
    """The kept results of a grid."""

    def result(self, cell: C_contra) -> dict[str, Any] | None:
        """What a finished cell found, or None."""
        ...

    def run(self, cell: C_contra) -> dict[str, Any]:
        """Do a cell and keep what came of it: ``mean``, ``seconds`` and ``load`` at least."""
        ...


def choose(cells: Sequence[C], patterns: str, seeds: str | None) -> list[C]:
    """The cells of some seeds whose names one of the comma-separated patterns matches.

    Raises:
        ConfigurationError: A pattern matches nothing.
    """
    numbers = None if seeds is None else {int(seed) for seed in seeds.split(",")}
    cells = [cell for cell in cells if numbers is None or cell.seed in numbers]
    chosen = set[str]()
    for pattern in patterns.split(","):
        matching = fnmatch.filter([cell.name for cell in cells], pattern)
        if not matching:
            raise ConfigurationError(
                f"no cell {pattern!r}: expected a pattern over the names that --list shows"
            )
        chosen |= set(matching)
    return [cell for cell in cells if cell.name in chosen]


def kept_result(path: Path, plan: Callable[[], Plan]) -> dict[str, Any] | None:
    """What a finished cell's file holds, or None.

    Args:
        path: The file.
        plan: Today's plan of the cell; an open cell needs neither its model nor its data for that.

    Raises:
        ConfigurationError: It was of another plan.
    """
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["plan"] != plan().hash().hex():
        raise ConfigurationError(
            f"{path}: of another plan than today's; remove that task's files or choose another "
            "--out"
        )
    return found


def work_through(results: Results[C], cells: Sequence[C]) -> None:
    """Run what is not done yet, and say what each cell came to."""
    for number, cell in enumerate(cells, start=1):
        known = results.result(cell)
        found = known or results.run(cell)
        spent = [f"{found['cpu_seconds']:.0f} CPU s"] if "cpu_seconds" in found else []
        note = ", ".join([*spent, f"{found['seconds']:.0f} s, load {found['load']}"])
        says = "kept" if known else note
        print(f"[{number}/{len(cells)}] {cell.name}: {found['mean']:.4f} ({says})", flush=True)


def show(results: Results[C], cells: Sequence[C]) -> None:
    """Say which cells are done."""
    for cell in cells:
        print(f"{'done' if results.result(cell) else 'open'} {cell.name}")


def finished(results: Results[C], cells: Sequence[C]) -> dict[str, dict[str, Any]]:
    """Name to what was found, of every cell that is done."""
    return {cell.name: kept for cell in cells if (kept := results.result(cell)) is not None}


def report_cells(
    results: Results[C],
    cells: Sequence[C],
    options: argparse.Namespace,
    packages: Sequence[str],
    tables: Tables,
) -> Done:
    """Print what the finished cells say together: sentences, tables and figures as asked for.

    Returns:
        The finished cells.
    """
    done = finished(results, cells)
    print("\n".join(tables.sentences(done)))
    if options.markdown:
        print(tables.markdown(done))
    if options.json:
        count = {"cells": len(cells), "done": len(done)}
        print(json.dumps({"machine": machine(*packages), **count, **tables.figures(done)}))
    return done


@contextlib.contextmanager
def results_folder(
    parser: argparse.ArgumentParser, options: argparse.Namespace, packages: Sequence[str]
) -> Iterator[Path]:
    """Name the machine, give the folder of results, and end the program as users expect."""
    from transformers.utils import logging  # slow, and not every benchmark may load torch

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers left it bare
    print(", ".join(f"{name} {value}" for name, value in machine(*packages).items()), flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="fedward-") as scratch:
            folder: Path = Path(scratch) if options.quick else options.out
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
    except FedwardError as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; finished cells are kept, the same command goes on\n")


def grid_options(about: str | None, out: str, *, data: bool = True) -> argparse.ArgumentParser:
    """The options of every grid of cells; ``data``: whether it reads the shared data sets."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    if data:
        parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="data sets")
    parser.add_argument("--out", type=Path, default=Path(out), help="keeps finished cells")
    parser.add_argument("--cells", default="*", help="patterns of names, with commas between")
    parser.add_argument("--seeds", help="only these, with commas between")
    parser.add_argument("--list", action="store_true", help="show the cells and which are done")
    parser.add_argument("--markdown", action="store_true", help="print tables for the docs")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="toy cells that are not kept")
    return parser
