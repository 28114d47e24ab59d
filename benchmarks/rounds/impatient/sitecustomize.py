"""On ``PYTHONPATH``, lets no sleep of a program last longer than Fedward's shortest poll.

Stock Flower sleeps 3 s between two looks for a message and 0.5 s between two for an answer.
"""

import time
from typing import SupportsIndex

LONGEST = 0.1

_sleep = time.sleep


def _impatient(seconds: float | SupportsIndex, /) -> None:
    _sleep(min(float(seconds), LONGEST))


time.sleep = _impatient
