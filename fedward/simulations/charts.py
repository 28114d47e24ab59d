"""Line charts as inline SVG: no script, no font and no address outside the page.

Colours come from the page's ``--series-N`` variables, so a chart follows its light and dark theme.
Lines also differ in dashes, because colour alone does not reach every reader.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 720, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 16, 44
_DASHES = ("", "8 4", "2 4", "12 4 2 4", "4 4", "1 3")
SERIES = 8
"""How many ``--series-N`` colours a page has to define; later lines start again."""


def line_chart(curves: Mapping[str, Sequence[float]], *, title: str, x: str, y: str) -> str:
    """Draw curves over 0, 1, 2, ... with a legend.

    Args:
        curves: Name to finite values, one or more each; at least one curve.
        title: What the chart shows, read out by screen readers.
        x: What the horizontal axis counts.
        y: What the vertical axis measures.

    Returns:
        An ``svg`` element and its legend.
    """
    last = max(1, *(len(values) - 1 for values in curves.values()))
    ticks = _ticks([value for values in curves.values() for value in values])
    low, high = ticks[0], ticks[-1]

    def across(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low)

    grid = [
        f'<path class="grid" d="M{_LEFT} {up(t):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 8}" y="{up(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        for t in ticks
    ]
    every = max(1, math.ceil(last / 12))
    grid += [
        f'<text x="{across(s):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{s}</text>'
        for s in range(0, last + 1, every)
    ]
    lines = [
        f'<polyline {_stroke(number)} points="'
        + " ".join(f"{across(s):.1f},{up(value):.1f}" for s, value in enumerate(values))
        + f'"><title>{escape(name)}</title></polyline>'
        for number, (name, values) in enumerate(curves.items())
    ]
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(grid)}{''.join(lines)}"
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(y)}</text></svg>{_legend(list(curves))}"
    )


def _stroke(number: int) -> str:
    dash = _DASHES[number % len(_DASHES)]
    return (
        f'fill="none" stroke-width="2.2" stroke="var(--series-{number % SERIES})" '
        f'stroke-dasharray="{dash}"'
    )


def _legend(names: Sequence[str]) -> str:
    items = [
        f'<li><svg viewBox="0 0 32 8" aria-hidden="true"><path {_stroke(number)} d="M0 4h32"/>'
        f"</svg>{escape(name)}</li>"
        for number, name in enumerate(names)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _ticks(values: Sequence[float]) -> list[float]:
    """Four to nine round numbers that enclose the values.

    >>> _ticks([0.53, 0.84])
    [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85]
    >>> _ticks([2.0, 2.0])
    [1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6]
    """
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= 7)
    first, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, end + 1)]
