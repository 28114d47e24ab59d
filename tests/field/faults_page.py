"""The table of the fault test in docs/faults.md, between its markers."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.field import cases

_PART = re.compile(r"(<!-- processes -->\n)(.*?)(<!-- end of processes -->)", re.DOTALL)
_HEAD = """| fault | stage | attempt / sites / spent | seconds | the operator sees | and does |
|---|---|---|---|---|---|
"""


def write(page: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put what came of some cases into a page; what it has of others stays."""
    text = page.read_text("utf-8")
    found = _PART.search(text)
    if found is None:
        raise ValueError(f"{page}: no part for the processes")
    lines = dict[tuple[str, ...], str]()
    for line in found[2].splitlines():
        lines[tuple(cell.strip() for cell in line.split("|")[1:3])] = line
    every = {(c.fault, c.stage): c for run in cases.RUNS for c in run.cases}
    for row in rows:
        key = (row["fault"], row["stage"])
        lines[key] = line_of(every[key], row)
    kept = [lines[key] for key in every if key in lines]
    part = _HEAD + "".join(f"{line}\n" for line in kept) + f"\n{len(kept)} pairs.\n"
    page.write_text(text[: found.start(2)] + part + text[found.end(2) :], "utf-8")


def line_of(case: cases.Case, row: Mapping[str, Any]) -> str:
    """The line of one case."""
    log = case.at or "site"
    seen = [f"{log}'s log: `{case.says}`"] if case.says else []
    reasons = {str(reason).partition(": ")[2] for reason in row["left_out"]}
    seen += [f"left out: {reason}" for reason in sorted(reasons)]
    came = f"{row['attempt']} / {len(row['cohort'])} / {row['spent']}"
    cells = (case.fault, case.stage, came, row["seconds"], "; ".join(seen) or "nothing", case.todo)
    return f"| {' | '.join(map(str, cells))} |"
