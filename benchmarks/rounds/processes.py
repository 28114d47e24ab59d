"""The processes of one system under measurement: started together, ended together."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

BENCHMARKS = Path(__file__).parents[1]
_SECONDS = 300.0
_END_SECONDS = 20.0

_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_PROXY": "*",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def free_port() -> int:
    """A port of loopback that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Processes:
    """Programs with logs and homes in one folder; all end with the block.

    Args:
        folder: Where their logs are, and ``FLWR_HOME`` of each.
        environment: Variables beside this process's own.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._environment = {**os.environ, **_ENVIRONMENT, **(environment or {})}
        self._running = dict[str, subprocess.Popen[bytes]]()

    def __enter__(self) -> Self:
        """Nothing runs yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """End all of them, and what they have started."""
        if kind is not None:
            print(self._tails(), file=sys.stderr)
        for process in self._running.values():
            process.terminate()
        end = time.monotonic() + _END_SECONDS
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def start(self, name: str, *command: str) -> None:
        """Start a program that is to run until the end."""
        with self._log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(  # noqa: S603  # our own command
                command,
                cwd=BENCHMARKS,
                env=self._home(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def lives(self, name: str) -> bool:
        """Whether a program that was started runs still."""
        return self._running[name].poll() is None

    def kill(self, name: str, part: str = "") -> None:
        """Kill (-9) a program and all that it has started, or of those among them.

        Args:
            name: The program.
            part: A word of the command of those that are meant; left out, all of them.

        Raises:
            LookupError: None of them has that word in its command.
        """
        tree = [self._running[name].pid]
        for parent in tree:  # grows as it goes
            tree += _children(parent)
        meant = [process for process in tree if part in _command(process)]
        if not meant:
            raise LookupError(f"{name} has no process {part!r}")
        for process in meant:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if not part:
            self._running[name].wait()

    def run(self, name: str, *command: str) -> None:
        """Run a program to its end.

        Raises:
            subprocess.CalledProcessError: It failed; the logs are printed at the end of the block.
        """
        with self._log(name).open("ab") as log:
            subprocess.run(  # noqa: S603  # our own command
                command, check=True, cwd=BENCHMARKS, env=self._home(name), stdout=log, stderr=log
            )

    def ask(self, name: str, *command: str) -> bytes:
        """What a program prints; nothing if it fails."""
        done = subprocess.run(  # noqa: S603  # our own command
            command, check=False, cwd=BENCHMARKS, env=self._home(name), capture_output=True
        )
        return b"" if done.returncode else done.stdout

    def log(self, name: str) -> str:
        """What a program has written so far."""
        return self._log(name).read_text(errors="replace")

    def wait(self, what: str, holds: Callable[[], bool], pause: float = 0.05) -> None:
        """Wait until something holds.

        Raises:
            TimeoutError: It does not within five minutes, or a program has ended.
        """
        end = time.monotonic() + _SECONDS
        while not holds():
            gone = [name for name, process in self._running.items() if process.poll() is not None]
            if gone or time.monotonic() > end:
                raise TimeoutError(f"waited for {what}; ended meanwhile: {', '.join(gone) or None}")
            time.sleep(pause)

    def home(self, name: str) -> Path:
        """``FLWR_HOME`` of a program."""
        return self._folder / f"{name}-home"

    def _home(self, name: str) -> dict[str, str]:
        self.home(name).mkdir(parents=True, exist_ok=True)
        return {**self._environment, "FLWR_HOME": str(self.home(name))}

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _tails(self) -> str:
        logs: Sequence[Path] = sorted(self._folder.glob("*.log"))
        return "\n".join(
            "\n".join([f"-- {log.name}", *log.read_text(errors="replace").splitlines()[-20:]])
            for log in logs
        )


def _children(parent: int) -> list[int]:
    """The processes that a process has started; none if it is gone."""
    found = list[int]()
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{parent}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def _command(process: int) -> str:
    """What a process was started as; nothing if it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def answers(port: int) -> bool:
    """Whether something listens on a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
