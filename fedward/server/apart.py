"""Our own work in a process of its own: what loads a model leaves with it when it ends."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_LOOK_SECONDS = 0.2


def run_apart(
    module: str, arguments: Sequence[Path], said: Path, look: Callable[[], None] = lambda: None
) -> int:
    """Run ``python -m MODULE ARGUMENTS`` to its end.

    Args:
        module: One of ours.
        arguments: Paths.
        said: What it prints goes into this file.
        look: Called while it runs; what it raises ends the process.

    Returns:
        Its exit status.
    """
    command = [sys.executable, "-P", "-m", module, *map(str, arguments)]
    with said.open("wb") as output:
        child = subprocess.Popen(  # noqa: S603  # our own command
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            while child.poll() is None:
                look()
                try:
                    child.wait(_LOOK_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            child.kill()
            child.wait()
    return child.returncode


def last_line(said: Path) -> str:
    """The last line that a process printed, for an error."""
    lines = said.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "nothing was said")
