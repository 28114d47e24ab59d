"""The shipped systemd units are as closed as they say, and start commands that exist."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedward.client.cli import site_app

ROOT = Path(__file__).parent.parent.parent
UNITS = ROOT / "packaging" / "systemd"
analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine"
)


def exposure(unit: Path) -> float:
    """systemd's own score, 0 (closed) to 10 (open)."""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stderr
    return float(found[1])


@analyze
@pytest.mark.parametrize(("name", "most"), [("agent", 1.0), ("trainer", 0.5)])
def test_a_unit_is_as_closed_as_it_says(tmp_path, name, most):
    unit = UNITS / f"fedward-{name}.service"
    assert exposure(unit) <= most
    opened = tmp_path / unit.name
    lines = unit.read_text().splitlines()
    opened.write_text(
        "\n".join(line for line in lines if not line.startswith(("Private", "SystemCall")))
    )
    assert exposure(opened) > most, "negative control"


@pytest.mark.parametrize("name", ["agent", "trainer"])
def test_a_unit_starts_a_command_that_exists(name):
    text = (UNITS / f"fedward-{name}.service").read_text()
    (line,) = re.findall(r"^ExecStart=\S+/fedward site (.+)$", text, re.MULTILINE)
    command, *options = line.split()
    shown = CliRunner().invoke(site_app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for option in options:
        assert not option.startswith("--") or option in shown.output


def test_the_trainers_unit_has_no_network_and_no_keys():
    text = (UNITS / "fedward-trainer.service").read_text()
    for line in ("PrivateNetwork=yes", "RestrictAddressFamilies=AF_UNIX", "IPAddressDeny=any"):
        assert f"\n{line}\n" in text
    (hidden,) = re.findall(r"^InaccessiblePaths=(.*)$", text, re.MULTILINE)
    for name in ("key", "fleet_key", "ledger.jsonl", "memory.jsonl"):
        assert f"-/var/lib/fedward/{name}" in hidden.split()


def test_the_units_are_in_the_wheel(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name.partition("/share/")[2] for name in archive.namelist()}
    for unit in UNITS.iterdir():
        assert f"fedward/systemd/{unit.name}" in names
