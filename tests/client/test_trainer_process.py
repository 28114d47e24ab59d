"""A supervised child: there when needed, gone with its parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedward.client.trainer_process import TrainerProcess
from fedward.errors import ModelError

CAT = ("/bin/cat",)


def test_a_child_is_started_once_and_again_after_its_death():
    process = TrainerProcess(CAT, {})
    process.start()
    first = process.pid
    assert first is not None
    process.start()
    assert process.pid == first
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: process.pid is None)
    process.start()
    assert process.pid not in {None, first}
    process.stop()
    assert process.pid is None


def test_a_program_that_is_not_there_is_an_error():
    with pytest.raises(ModelError, match="cannot be started"):
        TrainerProcess(["/no/such/program"], {}).start()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_never_outlives_its_parent(end):
    program = (
        "import sys, time; from fedward.client.trainer_process import TrainerProcess; "
        f"p = TrainerProcess({CAT}, {{}}); p.start(); print(p.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)  # it is there
        parent.send_signal(end)
        wait_until(lambda: not Path(f"/proc/{child}").exists() or zombie(child))


def zombie(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
