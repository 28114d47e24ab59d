"""docs/cli.md shows the help of every command exactly as the command prints it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedward.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
BLOCKS = dict(
    re.findall(r"```text\n\$ (fedward[^\n]* --help)\n(.*?)```", PAGE.read_text("utf-8"), re.S)
)
PLAIN = {"COLUMNS": "90", "NO_COLOR": "1", "TERM": "dumb", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}


def printed(line: str) -> str:
    """What a command line prints, without the blanks that fill its lines."""
    done = CliRunner().invoke(app, line.split()[1:], prog_name="fedward", env=PLAIN)
    assert done.exit_code == 0, done.output
    lines = [row.rstrip() for row in done.stdout.splitlines()]
    return "\n".join(lines).strip("\n") + "\n"


def test_the_installed_program_prints_the_same():
    command = [str(Path(sys.executable).parent / "fedward"), "simulate", "--help"]
    done = subprocess.run(command, env=os.environ | PLAIN, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split() == printed("fedward simulate --help").split()


@pytest.mark.parametrize("line", list(BLOCKS))
def test_the_page_shows_what_the_command_prints(line):
    assert BLOCKS[line] == printed(line), f"docs/cli.md needs\n\n$ {line}\n{printed(line)}"


def commands(line: str = "fedward") -> list[str]:
    """A command line's help and that of every command below it."""
    below = printed(f"{line} --help").partition("─ Commands ─")[2]
    names = re.findall(r"^│ ([a-z][\w-]*) ", below, re.MULTILINE)
    return [f"{line} --help", *(found for name in names for found in commands(f"{line} {name}"))]


def test_the_page_shows_every_command():
    shown = commands()
    assert len(shown) > 1
    assert set(BLOCKS) == set(shown)
