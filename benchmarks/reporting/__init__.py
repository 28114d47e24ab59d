"""What every benchmark says of where it ran, and how a grid's cells are chosen."""

import fnmatch
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from fedward.errors import ConfigurationError

C = TypeVar("C")


def machine(*packages: str) -> dict[str, str]:
    """Where the figures come from: processor, cores, system, Python and packages beside fedward."""
    facts = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    names = [line.split(":")[1].strip() for line in facts.splitlines() if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("fedward", *packages)},
    }


def choose(cells: Sequence[C], name: Callable[[C], str], patterns: str) -> list[C]:
    """The cells whose names one of the comma-separated patterns matches, in their order.

    Raises:
        ConfigurationError: A pattern matches nothing.
    """
    chosen = set[str]()
    for pattern in patterns.split(","):
        matching = fnmatch.filter([name(cell) for cell in cells], pattern)
        if not matching:
            raise ConfigurationError(
                f"no cell {pattern!r}: expected a pattern over the names that --list shows"
            )
        chosen |= set(matching)
    return [cell for cell in cells if name(cell) in chosen]
