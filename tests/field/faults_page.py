"""The table of the fault test in docs/faults.md, between its markers."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.field import cases

_PART = re.compile(r"(<!-- processes -->\n).*?(<!-- end of processes -->)", re.DOTALL)


def write(page: Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Put the rows and a line of the summary into a page."""
    known = {(case.fault, case.stage): case for run in cases.RUNS for case in run.cases}
    lines = [
        "| fault | stage | attempt / sites / spent | seconds | the operator sees | and does |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = known[row["fault"], row["stage"]]
        seen = [f"`{case.at or 'site'}` logs `{case.says}`"] if case.says else []
        seen += [f"`run show`: `{reason}`" for reason in dict.fromkeys(row["left_out"])]
        cells = (
            row["fault"],
            row["stage"],
            f"{row['attempt']} / {len(row['cohort'])} / {row['spent']}",
            str(row["seconds"]),
            "; ".join(seen) or "nothing",
            case.todo,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"{len(rows)} pairs in {summary['seconds'] // 60} minutes."]
    text, found = _PART.subn(
        lambda part: part[1] + "\n".join(lines) + "\n" + part[2], page.read_text("utf-8")
    )
    if found != 1:
        raise ValueError(f"{page}: expected one part for the processes, found {found}")
    page.write_text(text, "utf-8")
