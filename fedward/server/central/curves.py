"""Loss and metric curves of a job, from what its trainers logged: PNG, and one page with all."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedward import __version__
from fedward.server.central.tracking import LOG

Curve = Sequence[tuple[int, float]]
"""Optimizer step and value, each step once, in order."""

PICTURE, PAGE = "curves.png", "curves.html"

_EVALUATION = "eval_"
_NO_CURVES = (
    "epoch",
    "step",
    "total_flos",
    "train_",
    "num_tokens",
    "num_input_tokens_seen",
    "eval_runtime",
    "eval_num_tokens",
    "eval_samples_per_second",
    "eval_steps_per_second",
)
"""Beginnings of logged names that say how far and how fast, not how well."""

_COLUMNS, _WIDTH, _HEIGHT = 3, 4.6, 3.1  # inches a chart


def read_curves(log: Path) -> dict[str, Curve]:
    """The curves in a log, the loss first; of a step that was logged twice the last value.

    Args:
        log: JSON lines with ``step`` and numbers, as a trainer logs them.
    """
    found: dict[str, dict[int, float]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        logged = json.loads(line)
        for name, value in logged.items():
            if not name.startswith(_NO_CURVES) and _is_finite(value):
                found.setdefault(name, {})[int(logged["step"])] = float(value)
    first = sorted(found, key=lambda name: (not name.endswith("loss"), name))
    return {name: sorted(found[name].items()) for name in first}


def draw(log: Path, picture: Path) -> bool:
    """Draw a log's curves into a PNG, those of training and evaluation of one name together.

    Args:
        log: As for :func:`read_curves`.
        picture: Replaced.

    Returns:
        False where there is nothing to draw; then no picture is made.
    """
    curves = read_curves(log)
    if not curves:
        return False
    names = list(dict.fromkeys(name.removeprefix(_EVALUATION) for name in curves))
    columns = min(_COLUMNS, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * lines), layout="constrained")
    charts = list(figure.subplots(lines, columns, squeeze=False).flat)
    for chart in charts:
        chart.set_axis_off()
    for chart, name in zip(charts, names, strict=False):
        _chart(chart, name, curves)
    partial = picture.with_name(picture.name + ".partial")
    figure.savefig(partial, format="png", dpi=110)
    partial.replace(picture)
    return True


def _chart(chart: Axes, name: str, curves: Mapping[str, Curve]) -> None:
    chart.set_axis_on()
    chart.set_title(name, fontsize=10)
    chart.set_xlabel("step", fontsize=8)
    chart.grid(visible=True, alpha=0.3)
    for full, label, style in ((name, "training", "-"), (_EVALUATION + name, "held out", "o--")):
        if full in curves:
            steps, values = zip(*curves[full], strict=True)
            chart.plot(steps, values, style, label=label, markersize=3)
    chart.legend(fontsize=8)


def write_curves(out: Path, steps: Sequence[str]) -> Path | None:
    """Draw every step of a job that has a log, and put all pictures on one page.

    Args:
        out: The job's folder.
        steps: Names of its steps, each a folder there.

    Returns:
        The page, which loads nothing from elsewhere; None where there is nothing to draw.
    """
    drawn = [
        name
        for name in steps
        if (out / name / LOG).exists() and draw(out / name / LOG, out / name / PICTURE)
    ]
    if not drawn:
        return None
    sections = [_section(name, out / name) for name in drawn]
    page = out / PAGE
    page.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(out.name)}: curves</title>"
        "<style>body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;"
        "padding:0 1rem}img{max-width:100%}td,th{padding:.1rem .8rem .1rem 0;text-align:right}"
        "th[scope=row]{text-align:left}</style></head>"
        f"<body><h1>{escape(out.name)}</h1>{''.join(sections)}"
        f"<footer>Fedward {__version__}</footer></body></html>\n",
        encoding="utf-8",
    )
    return page


def _section(name: str, folder: Path) -> str:
    picture = base64.b64encode((folder / PICTURE).read_bytes()).decode()
    rows = [
        f'<tr><th scope="row">{escape(key)}</th><td>{curve[0][1]:.5g}</td>'
        f"<td>{curve[-1][1]:.5g}</td><td>{curve[-1][0]}</td></tr>"
        for key, curve in read_curves(folder / LOG).items()
    ]
    return (
        f"<h2>{escape(name)}</h2>"
        f'<img alt="Curves of {escape(name)}" src="data:image/png;base64,{picture}">'
        "<table><tr><th></th><th>first</th><th>last</th><th>at step</th></tr>"
        f"{''.join(rows)}</table>"
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
