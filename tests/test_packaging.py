"""What is installed and what a newcomer types: the wheel, the import, the Makefile and CI."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = {"help", "demo", "test", "check", "field-test", "fault-test", "bench", "base-lm"}
TELEMETRY = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def run(*command: str | Path, **environment: str) -> str:
    """Run a command at the root of the project and return what it printed."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"MAKEFLAGS": ""} | environment,  # an outer make's variables would win
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in a wheel that is built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    (built,) = folder.glob("fedward-*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_package(wheel):
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fedward").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"fedward/py.typed", "fedward/plan.py", "fedward/client/__init__.py"} <= package
    assert {name for name in wheel if name.startswith("fedward/")} == package


def test_the_wheel_holds_nothing_else(wheel):
    assert {name.split("/")[0].split("-")[0] for name in wheel} == {"fedward"}


def test_importing_fedward_switches_telemetry_off():
    code = f"import fedward, os; print(*(os.environ[name] for name in {list(TELEMETRY)}))"
    printed = run(sys.executable, "-c", code, **dict.fromkeys(TELEMETRY, "other"))
    assert printed.split() == list(TELEMETRY.values())


def test_importing_fedward_loads_no_library():
    # A variable that is set after its library was imported comes too late.
    code = "import fedward, sys; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in run(sys.executable, "-c", code).split()}
    assert not loaded & {"torch", "flwr", "transformers", "datasets", "huggingface_hub", "ray"}


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_make_knows_the_target_and_help_shows_it(target):
    run("make", "--dry-run", target)
    assert re.search(rf"^  make {target}\s+\w", run("make", "help"), re.MULTILINE)


def test_the_pages_name_only_targets_that_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    pattern = re.compile(r"(?:^|`)make ([a-z-]+)", re.MULTILINE)
    named = {target for page in pages for target in pattern.findall(page.read_text("utf-8"))}
    assert named <= TARGETS


@pytest.mark.parametrize(
    ("variables", "torch"),
    [
        ({"CI": "", "FEDWARD_CPU": ""}, "'torch'"),
        ({"CI": "true", "FEDWARD_CPU": ""}, "'torch==2.13.0'"),
        ({"CI": "", "FEDWARD_CPU": "1"}, "'torch==2.13.0'"),
    ],
)
def test_torch_comes_before_the_project(tmp_path, variables, torch):
    steps = run("make", "--dry-run", f"VENV={tmp_path}", "test", **variables)
    order = [steps.index(f"pip install {part}") for part in (torch, "--editable")]
    assert order == sorted(order)


def test_ci_runs_what_a_newcomer_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    run("bash", "-n", script)
    assert "for target in test check" in script.read_text()


def test_every_decision_is_in_the_index():
    folder = ROOT / "docs" / "adr"
    pages = sorted(path.name for path in folder.glob("0*.md"))
    assert re.findall(r"\((0.+\.md)\)", (folder / "README.md").read_text()) == pages
    assert all(len((folder / page).read_text().splitlines()) <= 40 for page in pages)
