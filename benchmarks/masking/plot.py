"""The figure of the masked-input stage: CPU seconds over neighbours, one panel a size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

_WAYS = {
    "theirs": ("Flower SecAgg+", "#c44e52", "o"),
    "ours": ("Fedward", "#1f5fa8", "s"),
    "ours16": ("Fedward, 16-bit words", "#6ea6dc", "^"),
    "floor": ("floor: keystreams and one pass", "#777777", None),
}


def plot(done: Mapping[str, Any], path: Path) -> None:
    """Draw every stage that was measured.

    Args:
        done: Parts by name, as the benchmark keeps them.
        path: Where to write, SVG or PNG by its ending.
    """
    cells = {tuple(map(int, n.split()[1:])): f for n, f in done.items() if n.startswith("stage")}
    sizes = sorted({d for d, _ in cells})
    with mpl.rc_context({"svg.hashsalt": "fedward", "font.size": 9}):
        figure = Figure(figsize=(3.2 * len(sizes), 3.2), layout="constrained")
        for place, size in enumerate(sizes, start=1):
            axes = figure.add_subplot(1, len(sizes), place)
            neighbours = sorted(k for d, k in cells if d == size)
            for way, (label, colour, marker) in _WAYS.items():
                found = [cells[size, k][f"{way}_seconds"] for k in neighbours]
                style = "--" if marker is None else "-"
                medians = [one["median"] for one in found]
                axes.plot(neighbours, medians, style, color=colour, marker=marker, label=label)
                least, most = ([one[end] for one in found] for end in ("least", "most"))
                axes.fill_between(neighbours, least, most, color=colour, alpha=0.2, linewidth=0)
            axes.set(xscale="log", yscale="log", title=f"{size // 1_000_000} M parameters")
            axes.set_xticks(neighbours, map(str, neighbours))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("neighbours")
            axes.grid(visible=True, axis="y", linewidth=0.3)
            if place == 1:
                axes.set_ylabel("CPU seconds of a site's masked input")
                figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=7)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
