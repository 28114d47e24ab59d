"""Writes the measured parts of ``docs/faults.md``: pairs, restores, and how often a place failed.

``python -m fedward.simulations.faults.page docs/faults.md 1000``
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedward.failpoints import NAMES
from fedward.simulations.faults.laboratory import run_seed
from fedward.simulations.faults.matrix import ONCE, ROWS, pairs, try_pair
from fedward.simulations.faults.restores import RESTORES, try_restore
from fedward.simulations.faults.schedule import AT_A_MESSAGE, POINTS, STAGES


def write_page(path: Path, schedules: int) -> None:
    """Run every pair and the schedules of the first seeds, and put what came out into the page.

    Args:
        path: The page; between its markers everything is replaced.
        schedules: How many, at least 1.
    """
    parts = {
        "pairs": [*pair_lines()],
        "restores": [*restore_lines()],
        "schedules": [*schedule_lines(schedules)],
    }
    text = path.read_text(encoding="utf-8")  # only now: the runs take minutes
    for name, lines in parts.items():
        text = replace_part(text, name, lines)
    path.write_text(text, encoding="utf-8")


def replace_part(text: str, name: str, lines: Iterable[str]) -> str:
    r"""Put lines between the markers of a part.

    >>> replace_part("a <!-- x -->\n1\n<!-- end of x --> b", "x", ["2"])
    'a <!-- x -->\n2\n<!-- end of x --> b'
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    return before + begin + "".join(f"{line}\n" for line in lines) + end + rest.partition(end)[2]


def pair_lines() -> Iterator[str]:
    """Two Markdown tables: faults at every stage, and those that only one stage has."""
    cells = {(name, stage): try_pair(fault) for name, stage, fault in pairs()}
    yield f"| fault | {' | '.join(STAGES)} | the operator sees |"
    yield "|---" * (len(STAGES) + 2) + "|"
    for row in ROWS:
        found = " | ".join(str(cells[row.name, stage]) for stage in STAGES)
        yield f"| {row.name} | {found} | {row.sees} |"
    yield ""
    yield "| fault that one stage has | stage | failpoint | what came of it |"
    yield "|---|---|---|---|"
    for name, stage, point, _ in ONCE:
        yield f"| {name} | {stage} | `{point}` | {cells[name, stage]} |"
    yield ""
    broken = [str(v) for cell in cells.values() for v in cell.outcome.violations]
    yield f"{len(cells)} pairs; {len(broken)} violations of I1 to I9."


def restore_lines() -> Iterator[str]:
    """A Markdown table: an older copy in the place of a party's files."""
    yield "| restored after round 3 | copied after round | with the copy | then | the operator |"
    yield "|---|---|---|---|---|"
    for restore in RESTORES:
        found = try_restore(restore)
        sums = [", ".join(map(str, s)) or "none" for s in (found.before, found.after)]
        broken = "".join(f" **{violation}**" for violation in found.violations)
        yield f"| {restore.name} | {restore.copied} | {' | '.join(sums)} | {restore.sees}{broken} |"


def schedule_lines(schedules: int) -> Iterator[str]:
    """What the random schedules came to, and how often an armed fault happened where."""
    fired, ended, seconds = Counter[str](), Counter[str](), 0.0
    broken = list[str]()
    for seed in range(schedules):
        outcome = run_seed(seed)
        fired.update(outcome.history.fired)
        ended[f"{len(outcome.rounds)} rounds"] += 1
        seconds += outcome.history.ended or 0.0
        broken += [f"seed {seed}: {violation}" for violation in outcome.violations]
    states = ", ".join(f"{times} runs with {state}" for state, times in sorted(ended.items()))
    yield f"{schedules} schedules, seeds 0 to {schedules - 1}: {sum(fired.values())} faults, "
    yield f"{states}, {seconds / 3600:.1f} hours of virtual time; {len(broken)} violations."
    yield from broken
    yield ""
    yield "| where | true there | faults |"
    yield "|---|---|---|"
    for name in POINTS:
        yield f"| `{name}` | {NAMES[name]} | {fired[name]} |"
    for kind in AT_A_MESSAGE:
        yield f"| to a letter | {kind.value} | {fired[kind.value]} |"


if __name__ == "__main__":
    write_page(Path(sys.argv[1]), int(sys.argv[2]))
