"""The figure of the grid: what each way reaches, one panel a task and privacy."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from scheme_grid.cells import WAYS
from scheme_grid.tables import SETTINGS, cells_of, setting_name

_COLUMNS = 3
_PANEL = (3.3, 2.5)
_TOGETHER = "#1f5fa8"
_ELSEWHERE = "#777777"


def plot(done: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw each seed as a dot and their mean as a bar; what is no federation is grey.

    Args:
        done: Name of a finished cell to what was found.
        path: Where to write, SVG or PNG by its ending.
    """
    settings = [one for one in SETTINGS if any(cells_of(done, way, one) for way in WAYS)]
    rows = max(1, math.ceil(len(settings) / _COLUMNS))
    with mpl.rc_context({"svg.hashsalt": "fedward", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(
            figsize=(_PANEL[0] * min(_COLUMNS, len(settings) or 1), _PANEL[1] * rows),
            layout="constrained",
        )
        for place, setting in enumerate(settings, start=1):
            axes = figure.add_subplot(rows, min(_COLUMNS, len(settings)), place)
            ways = [way for way in reversed(WAYS) if cells_of(done, way, setting)]
            for height, way in enumerate(ways):
                means = [cell["mean"] for cell in cells_of(done, way, setting)]
                alone = way == "alone" or way.startswith("central")
                colour = _ELSEWHERE if alone else _TOGETHER
                axes.plot(means, [height] * len(means), "o", color=colour, markersize=3)
                axes.plot(np.mean(means), height, "|", color=colour, markersize=10)
            axes.set_yticks(range(len(ways)), ways)
            axes.set(title=setting_name(setting))
            axes.set_xlabel("loss" if setting[0] == "dolly" else "accuracy")
            axes.grid(visible=True, axis="x", linewidth=0.3)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
