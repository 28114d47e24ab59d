"""The second process: what it finds is what this one finds, and it never outlives this one."""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedward.client.trainer import mechanism
from fedward.errors import InvalidValue, ModelError
from fedward.plan import Model, Plan, Task
from fedward.simulations.comparison import Comparison, comparisons, measure
from fedward.simulations.second_process import second_process
from tests.simulations import tiny

SITES = tiny.make_sites(3)
TEST = tiny.make_records("t", 8)


@pytest.fixture(scope="module")
def there():
    """The measurement in a second process; starting one takes seconds."""
    with second_process(TEST, 1) as found:
        yield found
    assert not multiprocessing.active_children()


def comparison(plan: Plan) -> Comparison:
    return Comparison(name="alone-a", plan=plan, records=SITES["a"], step=mechanism(plan))


def test_it_finds_what_this_process_finds(there, base):
    one = comparison(tiny.make_plan(base, privacy=tiny.NAKED))
    rounds = list[int]()
    found = there(one, rounds.append)
    assert rounds == [1, 2]
    assert np.array_equal(found.losses, measure(one, TEST).losses)


def test_it_draws_noise_of_its_own(there, base):
    one = comparison(tiny.make_plan(base))
    first, second = (there(one, lambda _: None) for _ in range(2))
    assert not np.array_equal(first.losses, second.losses)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (ModelError, {"model": Model(path="/nowhere")}),
        (InvalidValue, {"task": Task(objective="classify", labels=tiny.LABELS, max_length=1000)}),
    ],
)
def test_its_errors_are_the_same_errors(there, base, kind, wrong):
    one = comparison(tiny.make_plan(base, **wrong))
    with pytest.raises(kind) as here:
        measure(one, TEST)
    with pytest.raises(kind) as elsewhere:
        there(one, lambda _: None)
    assert type(elsewhere.value) is type(here.value)
    assert str(elsewhere.value) == str(here.value)


def test_its_warnings_come_up_here(there, base, tmp_path, caplog):
    folder = shutil.copytree(base, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    there(comparison(tiny.make_plan(folder)), lambda _: None)
    assert "the update is noise alone" in caplog.text


def test_every_alternative_is_there_and_the_longest_comes_first(base):
    plan = tiny.make_plan(base)
    found = {one.name: one for one in comparisons(plan, SITES)}
    assert list(found) == ["central", "central-no-privacy", "alone-c", "alone-b", "alone-a"]
    assert found["central"].step.normaliser == 3 * plan.rounds.normaliser
    assert found["central"].step.noise_multiplier == found["alone-a"].step.noise_multiplier > 0
    assert found["central-no-privacy"].step.noise_multiplier == 0
    naked = comparisons(dataclasses.replace(plan, privacy=tiny.NAKED), SITES)
    assert "central-no-privacy" not in {one.name for one in naked}


def test_that_it_died_is_said(there, base):  # the last that uses it
    (process,) = multiprocessing.active_children()
    process.kill()
    with pytest.raises(ModelError, match="'alone-a' died"):
        there(comparison(tiny.make_plan(base)), lambda _: None)


def seconds_of(group: int) -> dict[str, float]:
    """Command lines of the living processes of a group, and the processor time they took."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            facts = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(facts[2]) == group and facts[0] != "Z":
            found[command] = int(facts[11]) / os.sysconf("SC_CLK_TCK")
    return found


def wait_for(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether it comes to hold in time."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("worked", [0, 8], ids=["while-it-starts", "while-it-trains"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_the_first_process(tmp_path, base, how, worked):
    plan = tmp_path / "plan.toml"
    plan.write_text(tiny.plan_text(base, count=20_000))
    rows = [row for name in "abc" for row in tiny.make_rows(name, 4)]
    data = tiny.write_data(tmp_path / "data", rows)
    command = [sys.executable, "-m", "fedward", "simulate", plan, "--data", data]
    with subprocess.Popen(
        [*map(str, command), "--out", str(tmp_path / "out")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:

        def second_works() -> bool:
            found = seconds_of(process.pid)
            return any("spawn_main" in name and found[name] >= worked for name in found)

        try:
            assert wait_for(second_works, 400)
            assert process.poll() is None
            if how is signal.SIGINT:  # Ctrl-C reaches the whole group
                os.killpg(process.pid, how)
            else:
                process.send_signal(how)
            # Seconds; more where the machine is busy, but far less than its trainings would take.
            _, errors = process.communicate(timeout=120)
            assert wait_for(lambda: not seconds_of(process.pid), 10), seconds_of(process.pid)
        finally:
            if seconds_of(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert "--resume goes on" in errors
        assert "Traceback" not in errors
