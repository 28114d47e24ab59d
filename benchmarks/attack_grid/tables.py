"""What finished cells say together: accuracy, backdoor success, and what the defences cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attack_grid.cells import ATTACKS, DEFENCES, HOSTILE, SEEDS, Cell

Results = Mapping[str, Mapping[str, Any]]

_ROWS = ("nothing", *ATTACKS)


def _of(done: Results, sites: int, attack: str, defence: str) -> list[Mapping[str, Any]]:
    names = [Cell(sites=sites, attack=attack, defence=defence, seed=s).name for s in SEEDS]
    return [done[name] for name in names if name in done]


def _mean(cells: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([cell[key] for cell in cells]))


def figures(done: Results) -> dict[str, dict[str, float]]:
    """Means over seeds by sites, attack and defence."""
    keys = ("mean", "backdoor", "refused", "aborted", "rounds", "missed")
    return {
        f"{sites}.{attack}.{defence}": {key: _mean(cells, key) for key in keys}
        for sites in HOSTILE
        for attack in _ROWS
        for defence in DEFENCES
        if (cells := _of(done, sites, attack, defence))
    }


def sentences(done: Results) -> list[str]:
    """One line a cell."""
    return [
        f"{name}: accuracy {found['mean']:.3f}, backdoor {found['backdoor']:.3f}, "
        f"{found['rounds']:g} rounds committed, {found['refused']:g} refused, "
        f"{found['aborted']:g} attempts lost, honest sites missed {found['missed']:g}"
        for name, found in figures(done).items()
    ]


def markdown(done: Results) -> str:
    """A table for docs/benchmarks.md: in each cell accuracy, and what else there is to say."""
    lines = [
        "| sites (hostile) | attack | " + " | ".join(DEFENCES) + " |",
        "|---|---|" + "---|" * len(DEFENCES),
    ]
    for sites, hostile in HOSTILE.items():
        for attack in _ROWS:
            cells = [_of(done, sites, attack, defence) for defence in DEFENCES]
            count = 0 if attack == "nothing" else hostile
            row = " | ".join(_cell(found, attack) if found else "" for found in cells)
            lines.append(f"| {sites} ({count}) | {attack} | {row} |")
    return "\n".join(lines)


def _cell(cells: Sequence[Mapping[str, Any]], attack: str) -> str:
    said = [f"{_mean(cells, 'mean'):.3f}"]
    if attack in {"nothing", "backdoor"}:
        said.append(f"backdoor {_mean(cells, 'backdoor'):.2f}")
    for key, words in (("refused", "refused"), ("aborted", "lost"), ("missed", "missed")):
        if (count := _mean(cells, key)) > 0:
            said.append(f"{count:g} {words}")
    if any(cell["ended"] for cell in cells):
        said.append("ended early")
    return ", ".join(said)
