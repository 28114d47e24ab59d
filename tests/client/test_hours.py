"""Windows of local time, at their edges."""

from datetime import datetime, timedelta

import pytest

from fedward.client.hours import parse_window
from fedward.errors import InvalidValue

MONDAY = datetime(2026, 5, 4)  # noqa: DTZ001  # local time


def minutes(text: str) -> list[int]:
    """Every minute of a week, from Monday, that the window contains."""
    window = parse_window(text)
    return [m for m in range(7 * 1440) if window.contains(MONDAY + timedelta(minutes=m))]


def test_a_window_within_a_day():
    assert minutes("mon 08:00-09:30") == list(range(480, 570))


def test_a_window_over_midnight_belongs_to_the_day_it_starts():
    assert minutes("tue 23:59-00:01") == [2 * 1440 - 1, 2 * 1440]
    assert minutes("sun 23:00-01:00") == [*range(60), *range(7 * 1440 - 60, 7 * 1440)]


@pytest.mark.parametrize(
    ("text", "days"),
    [
        ("00:00-24:00", {0, 1, 2, 3, 4, 5, 6}),
        ("mon-fri 00:00-24:00", {0, 1, 2, 3, 4}),
        ("sat-mon,wed 00:00-24:00", {5, 6, 0, 2}),
    ],
)
def test_days(text, days):
    assert {m // 1440 for m in minutes(text)} == days
    assert len(minutes(text)) == 1440 * len(days)


@pytest.mark.parametrize(
    "text",
    ["", "8:00-9:00", "08:00", "08:00-08:00", "24:00-06:00", "08:00-24:01", "08:60-09:00",
     "day 08:00-09:00", "mon-fri,08:00-09:00", "MON 08:00-09:00", "29:00-08:00"],
)  # fmt: skip
def test_what_is_no_window_is_refused(text):
    with pytest.raises(InvalidValue, match="hours"):
        parse_window(text)
