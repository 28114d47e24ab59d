"""Weekly windows of local time, as a policy writes them: ``"mon-fri 20:00-06:00"``."""

import re
from dataclasses import dataclass
from datetime import datetime

from fedward.errors import InvalidValue

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY = f"(?:{'|'.join(_DAYS)})"
_WINDOW = re.compile(
    rf"(?:(?P<days>{_DAY}(?:-{_DAY})?(?:,{_DAY}(?:-{_DAY})?)*) )?"
    r"(?P<start>[0-2]\d:[0-5]\d)-(?P<end>[0-2]\d:[0-5]\d)"
)
_DAY_MINUTES = 24 * 60


@dataclass(frozen=True, kw_only=True)
class Window:
    """Some minutes of some weekdays; one that ends before it starts goes on after midnight.

    Args:
        days: Weekdays on which it starts, Monday is 0.
        start: First minute of the day, 0 to 1439.
        end: The minute after its last, 0 to 1440.
    """

    days: frozenset[int]
    start: int
    end: int

    def contains(self, now: datetime) -> bool:
        """Whether a local time lies in the window.

        >>> night = parse_window("fri 22:00-06:00")
        >>> night.contains(datetime(2026, 5, 2, 5, 59))  # a Saturday
        True
        """
        minute, day = now.hour * 60 + now.minute, now.weekday()
        if self.start < self.end:
            return day in self.days and self.start <= minute < self.end
        late = day in self.days and minute >= self.start
        return late or ((day - 1) % 7 in self.days and minute < self.end)


def parse_window(text: str) -> Window:
    """Read ``[DAYS ]HH:MM-HH:MM``; DAYS is a list like ``mon-fri,sun``, left out: every day.

    Raises:
        InvalidValue: It is no such window.
    """
    found = _WINDOW.fullmatch(text)
    start, end = (_minute(found[key]) for key in ("start", "end")) if found else (0, 0)
    if found is None or start == end or start >= _DAY_MINUTES or end > _DAY_MINUTES:
        raise InvalidValue("hours", text, "like '20:00-06:00' or 'mon-fri,sun 08:00-24:00'")
    parts = (found["days"] or "mon-sun").split(",")
    return Window(
        days=frozenset(day for part in parts for day in _days(part)), start=start, end=end
    )


def _minute(clock: str) -> int:
    hour, _, minute = clock.partition(":")
    return int(hour) * 60 + int(minute)


def _days(part: str) -> list[int]:
    first, _, last = part.partition("-")
    start, end = _DAYS.index(first), _DAYS.index(last or first)
    return [(start + step) % 7 for step in range((end - start) % 7 + 1)]
