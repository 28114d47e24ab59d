"""A child process that its parent supervises, and that never outlives it."""

import subprocess
from collections.abc import Mapping, Sequence

from fedward.errors import ModelError

_STOP_SECONDS = 10.0


class TrainerProcess:
    """The trainer as a child, started when it is needed.

    Its standard input is a pipe that only this process holds: when this process ends, however it
    ends, the pipe closes and the child leaves. (``PR_SET_PDEATHSIG`` would follow the thread that
    started the child, not the process.)

    Args:
        command: What to run; it must end when its standard input does.
        environment: The child's whole environment.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command, self._environment = tuple(command), dict(environment)
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The running child's process number; None if none runs."""
        child = self._child
        return None if child is None or child.poll() is not None else child.pid

    def start(self) -> None:
        """Start the child unless it runs.

        Raises:
            ModelError: The program cannot be started.
        """
        if self.pid is not None:
            return
        self.kill()  # lets go of what a dead child left
        try:
            # A session of its own: Ctrl-C is the agent's, which then stops the child in order.
            self._child = subprocess.Popen(  # noqa: S603  # a fixed command of this site
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise ModelError(f"the trainer cannot be started: {error.strerror}") from error

    def stop(self) -> None:
        """End the child, at once if it does not leave by itself."""
        if self._child is None:
            return
        if self._child.stdin is not None:
            self._child.stdin.close()
        try:
            self._child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the child at once, if it has not ended."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            if self._child.stdin is not None:
                self._child.stdin.close()
