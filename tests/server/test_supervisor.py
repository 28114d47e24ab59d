"""Parts that die start again, and none outlives its supervisor."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedward.server import serve
from fedward.server.supervisor import Part, supervise
from tests.server import office

WRITE = "import os, sys; open(sys.argv[1], 'a').write(f'{os.getpid()}\\n'); "
STAY = WRITE + "sys.stdin.buffer.read()"
DIE = WRITE + "sys.exit(3)"


def part(path: Path, program: str) -> Part:
    return Part(name=path.name, command=[sys.executable, "-S", "-c", program, str(path)])


def pids(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def wait_for(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_killed_part_starts_again_and_all_end_together(tmp_path):
    a, b, stop = tmp_path / "a", tmp_path / "b", threading.Event()
    thread = threading.Thread(target=supervise, args=([part(a, STAY), part(b, STAY)], stop))
    thread.start()
    wait_for(lambda: len(pids(a)) == len(pids(b)) == 1)
    os.kill(pids(a)[0], signal.SIGKILL)
    wait_for(lambda: len(pids(a)) == 2)
    assert len(pids(b)) == 1
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
    assert not any(alive(pid) for pid in (*pids(a), *pids(b)))


@pytest.mark.slow
def test_a_part_that_dies_at_once_is_started_more_and_more_slowly(tmp_path):
    path, stop = tmp_path / "a", threading.Event()
    thread = threading.Thread(target=supervise, args=([part(path, DIE)], stop))
    thread.start()
    time.sleep(3.2)  # starts at 0, 0.5, 1.5 and 3.5 s at the earliest
    stop.set()
    thread.join(30)
    assert 1 <= len(pids(path)) <= 3


def test_no_part_outlives_a_killed_supervisor(tmp_path):
    path = tmp_path / "a"
    program = (
        "import sys, threading; from fedward.server.supervisor import Part, supervise; "
        f"part = Part(name='a', command=[sys.executable, '-S', '-c', {STAY!r}, {str(path)!r}]); "
        "supervise([part], threading.Event())"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as supervisor:
        wait_for(lambda: len(pids(path)) == 1)
        supervisor.kill()
    wait_for(lambda: not alive(pids(path)[0]))


def test_a_part_that_ignores_sigterm_is_killed(tmp_path):
    path, stop = tmp_path / "a", threading.Event()
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    stubborn = part(path, deaf + WRITE + "time.sleep(600)")
    thread = threading.Thread(target=supervise, args=([stubborn], stop), kwargs={"grace": 0.5})
    thread.start()
    wait_for(lambda: len(pids(path)) == 1)
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
    assert not alive(pids(path)[0])


def test_a_part_ends_when_its_standard_input_does():
    program = (
        "import threading; from fedward.server.supervisor import end_with_supervisor; "
        "stop = threading.Event(); end_with_supervisor(stop); print('up', flush=True); stop.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.stdin.close()
        assert process.wait(30) in {0, -signal.SIGTERM}


def test_the_coordinators_parts_run_no_code_of_the_folder_they_are_started_in(
    tmp_path, monkeypatch
):
    parts = list[Part]()
    monkeypatch.setattr(serve, "supervise", lambda found, _: parts.extend(found))
    serve.serve(office.make_coordinator(tmp_path / "c"), threading.Event())
    (tmp_path / "fedward").mkdir()
    (tmp_path / "fedward" / "__init__.py").write_text("raise SystemExit('planted')")
    *command, _ = parts[0].command
    done = subprocess.run(
        [*command, str(tmp_path / "none")], cwd=tmp_path, capture_output=True, text=True
    )
    assert "planted" not in done.stderr
    assert "not the folder of a coordinator" in done.stderr
