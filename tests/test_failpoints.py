"""The table of failpoints is the code's, and arming is loud, explicit and local."""

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import timeit
from collections import Counter
from pathlib import Path

import pytest

from fedward import failpoints
from fedward.errors import InvalidValue

PACKAGE = Path(failpoints.__file__).parent


def used(root: Path) -> Counter[str]:
    """Every name that a file of the package passes, and how often."""
    sources = (p.read_text() for p in root.rglob("*.py") if p.name != "failpoints.py")
    return Counter(name for text in sources for name in re.findall(r'\bhit\("([^"]+)"\)', text))


def test_every_name_is_used_exactly_once_and_every_use_is_in_the_table():
    assert used(PACKAGE) == dict.fromkeys(failpoints.NAMES, 1)
    assert len(failpoints.NAMES) >= 30


def test_a_use_that_is_not_in_the_table_would_be_found(tmp_path):
    (tmp_path / "x.py").write_text('failpoints.hit("no.name")\nfailpoints.hit("ledger.sent")\n')
    assert used(tmp_path).keys() - failpoints.NAMES.keys() == {"no.name"}


def test_nothing_else_arms_a_process():
    """No module but the command line's start reads the variable or arms, apart from simulations."""
    calls = re.compile(r"arm_from|failpoints\.armed|failpoints\._handler|FEDWARD_FAILPOINTS")
    found = {
        str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if calls.search(p.read_text())
    }
    outside = {name for name in found if not name.startswith("simulations/faults/")}
    assert outside == {"failpoints.py", "cli.py"}


def test_off_a_failpoint_costs_less_than_a_microsecond():
    number = 100_000
    seconds = min(timeit.repeat(lambda: failpoints.hit("ledger.sent"), number=number, repeat=5))
    assert seconds / number < 1e-6


def test_a_handler_sees_what_is_passed_until_its_end():
    seen = list[str]()
    with failpoints.armed(seen.append):
        failpoints.hit("ledger.sent")
    failpoints.hit("ledger.run")
    assert seen == ["ledger.sent"]


@pytest.fixture
def disarmed(monkeypatch):
    monkeypatch.setattr(failpoints, "_handler", None)


@pytest.mark.parametrize(("action", "number"), [("error", errno.EIO), ("enospc", errno.ENOSPC)])
def test_the_environment_arms_one_visit(disarmed, caplog, action, number):
    with caplog.at_level(logging.WARNING):
        failpoints.arm_from({failpoints.VARIABLE: f"ledger.sent:{action}@2"})
    assert "fail on purpose" in caplog.text
    failpoints.hit("ledger.sent")
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        failpoints.hit("ledger.sent")
    assert caught.value.errno == number
    failpoints.hit("ledger.sent")


def test_without_the_variable_nothing_is_armed(disarmed, caplog):
    failpoints.arm_from({})
    assert failpoints._handler is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ledger.sant:kill", "expected ledger.sent"),
        ("ledger.sent", "NAME:ACTION"),
        ("ledger.sent:explode", "NAME:ACTION"),
        ("ledger.sent:kill@0", "NAME:ACTION"),
        ("ledger.sent:kill,", "NAME:ACTION"),
    ],
)
def test_what_nobody_knows_is_refused(disarmed, text, words):
    with pytest.raises(InvalidValue, match=words):
        failpoints.arm_from({failpoints.VARIABLE: text})
    assert failpoints._handler is None


def run(code: str, armed: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {failpoints.VARIABLE: armed}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )


WRITE = """
import os, sys
from fedward import failpoints
from fedward.identity import Identity
from fedward.privacy.chain import Chain
from pathlib import Path
failpoints.arm_from(os.environ)
with Chain(Path(sys.argv[-1] if len(sys.argv) > 1 else "x"), Identity(bytes(32)), purpose="t") as c:
    c.append({"n": 1})
    print("acknowledged", flush=True)
    c.append({"n": 2})
"""


def test_a_real_process_is_killed_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(WRITE, "chain.written:kill@2")
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "acknowledged\n")
    assert "fail on purpose" in done.stderr
    assert len((tmp_path / "x").read_bytes().splitlines()) == 2


def test_the_command_line_reads_the_variable_and_says_what_is_wrong():
    program = str(Path(sys.executable).parent / "fedward")
    environment = os.environ | {failpoints.VARIABLE: "ledger.sant:kill"}
    done = subprocess.run([program, "--version"], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 2
    assert b"ledger.sent" in done.stderr
