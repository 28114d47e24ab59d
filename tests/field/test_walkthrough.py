"""docs/walkthrough.md works: its commands are read from the page and typed into one shell."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fedward.client.journal import verify_journal
from fedward.client.site_folder import SiteFolder
from fedward.simulations.demo import prepare_demo
from tests.server.office import free_port

PAGE = Path(__file__).parents[2] / "docs" / "walkthrough.md"
COMMANDS = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_the_page_has_fewer_than_fifteen_commands_and_says_how_many():
    assert len(COMMANDS) < 15
    assert COMMANDS[0] == "make demo\n"
    assert f"{['twelve', 'thirteen', 'fourteen'][len(COMMANDS) - 12]} commands" in PAGE.read_text()


@pytest.mark.slow
def test_the_commands_of_the_page_end_in_a_finished_run_of_three_sites(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    prepare_demo(0, Console(quiet=True))  # what make demo leaves; the demo itself is tested apart
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    script = "set -euo pipefail\n" + "".join(COMMANDS[1:]).replace("9443", str(free_port()))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "*"}
    with (tmp_path / "said").open("wb") as said:
        shell = subprocess.Popen(
            ["/bin/bash", "-c", script],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            code = shell.wait(1200)
        finally:
            os.killpg(shell.pid, signal.SIGKILL)
    logs = "\n".join(path.read_text()[-2000:] for path in tmp_path.glob("out/walk/*.log"))
    printed = (tmp_path / "said").read_text()
    assert code == 0, printed + logs
    assert printed.splitlines()[-1].startswith("round 2: committed"), printed
    for name in ("northgate", "harbour", "valley"):
        site = SiteFolder.load(tmp_path / "out" / "walk" / name)
        entries = [json.loads(line)["entry"] for line in site.ledger.read_text().splitlines()]
        assert [e["round"] for e in entries if e["kind"] == "sent"] == [1, 2]
        whats = {e["what"] for e in verify_journal(site, site.identity().public_key)}
        assert {"enrolled", "data added", "model added", "plan approved", "reserved"} <= whats
