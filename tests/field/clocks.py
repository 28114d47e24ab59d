"""Wrong clocks: each machine of the fault test has its own time of day, set while it runs.

``clock.c`` is preloaded into all of a machine's programs, so Python, SQLite and the TLS library see
one time. It needs a C compiler.
"""

import datetime
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.c")
HOUR, YEAR = 3600, 365 * 24 * 3600


def build(folder: Path) -> Path | None:
    """The library, built into a folder; None where there is no compiler."""
    compiler, library = shutil.which("cc"), folder / "clock.so"
    if compiler is None:
        return None
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE], check=True)
    return library


def set_wrong(clock: Path, seconds: int) -> None:
    """Let a machine's clock be wrong by so many seconds from now on."""
    with clock.open("r+b" if clock.exists() else "w+b") as file:  # the same file: it is mapped
        file.write(struct.pack("q", seconds))


def environment(library: Path | None, clock: Path) -> dict[str, str]:
    """What lets a program go by a clock."""
    if library is None:
        return {}
    return {"LD_PRELOAD": str(library), "FIELD_CLOCK": str(clock)}


def in_days(days: int) -> datetime.datetime:
    """The time on a clock that is so many days ahead."""
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
