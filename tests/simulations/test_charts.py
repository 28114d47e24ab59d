"""Charts: well-formed, inside their frame, and safe against names with markup."""

import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import pytest

from fedward.simulations.charts import line_chart


def draw(curves: Mapping[str, Sequence[float]]) -> ElementTree.Element:
    page = f"<div>{line_chart(curves, title='a & b', x='round', y='accuracy')}</div>"
    return ElementTree.fromstring(page)  # noqa: S314  # our own output


def points(line: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in line.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def test_every_curve_is_drawn_inside_the_frame():
    lines = list(draw({"one": [0.5, 0.7, 0.8], "two": [0.5, 0.6]}).iter("polyline"))
    assert [len(points(line)) for line in lines] == [3, 2]
    for line in lines:
        assert all(0 <= x <= 720 and 0 <= y <= 340 for x, y in points(line))


def test_higher_values_stand_higher():
    (line,) = draw({"one": [0.2, 0.9]}).iter("polyline")
    (_, low), (_, high) = points(line)
    assert high < low


def test_names_are_text_and_not_markup():
    page = line_chart({"<b>": [1.0]}, title='"x"', x="<i>", y="y")
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;b&gt;" in page


def test_lines_differ_in_colour_and_dashes():
    page = line_chart({str(i): [0.0, 1.0] for i in range(6)}, title="t", x="x", y="y")
    strokes = re.findall(r"<polyline (.*?) points", page)
    assert len(set(strokes)) == 6
    assert len({stroke.split("dasharray")[1] for stroke in strokes}) == 6


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-1e-4, 1e-4], [2.0, 1e6]])
def test_odd_ranges_are_drawn(values):
    (line,) = draw({"one": values}).iter("polyline")
    assert all(0 <= y <= 340 for _, y in points(line))
