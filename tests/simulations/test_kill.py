"""kill -9 at any instant: the run goes on, and every site's spend is what it marked as sent.

In this process an interruption stands for the kill of coordinator and sites: nothing is closed in
order, only what is on the disk counts. Whole processes are killed as well, at random instants.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward import typed_toml
from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.client.training import Trainer
from fedward.plan import Plan
from fedward.server.sessions import Observer
from fedward.server.store import Phase
from fedward.simulations.federation import Federation
from tests.simulations import tiny

ELSEWHERE = {Phase.LEFT_OUT, Phase.ABORTED, Phase.FALLBACK, Phase.REFUSED}
"""What an undisturbed run of a plan without fallback and gate never comes to."""

PHASES = tuple(phase for phase in Phase if phase not in ELSEWHERE)


class Killed(BaseException):
    """The power goes."""


def killing(phase: Phase, occurrence: int = 1) -> Observer:
    """An observer that ends everything when an event of a phase has become durable."""
    seen = list[int]()

    def observe(attempt: Attempt, found: Phase, site: int, facts: Json) -> None:
        if (found, attempt.round) == (phase, 1):
            seen.append(site)
            if len(seen) == occurrence:
                raise Killed

    return observe


def until_killed(
    folder: Path, plan: Plan, trainers: Mapping[str, Trainer], phase: Phase, occurrence: int = 1
) -> None:
    """Run a federation until it is killed."""
    federation = tiny.make_federation(folder, plan, trainers)
    with pytest.raises(Killed):
        federation.run(killing(phase, occurrence))


def check_books(folder: Path, plan: Plan, federation: Federation) -> set[Any]:
    """What ledgers, memories and coordinator say about one run agrees."""
    events = tiny.events_of(folder)
    received = {(e.site, e.attempt.order) for e in events if e.phase is Phase.MASKED}
    summed = {
        (site, attempt.order)
        for attempt, facts in tiny.facts_of(folder, Phase.COMMITTED)
        for site in facts["cohort"]
    }
    marked = set()
    for site in range(len(federation.names)):
        orders = tiny.sent(folder, site)
        assert len(orders) == len(set(orders)) <= plan.rounds.count + plan.rounds.spare
        marked |= {(site, order) for order in orders}
    assert summed <= received <= marked
    rounds = [attempt.round for attempt, _ in tiny.facts_of(folder, Phase.COMMITTED)]
    assert rounds == list(range(1, plan.rounds.count + 1)), "each round once, in order"
    for name in federation.names:
        assert federation.epsilon_spent(name) <= plan.privacy.epsilon
    return marked - received


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_goes_on_from_any_event(tmp_path, base, phase):
    plan = tiny.make_plan(base)
    trainers = tiny.recorders(tiny.make_sites(3))
    until_killed(tmp_path, plan, trainers, phase)
    federation = tiny.make_federation(tmp_path, plan, trainers)
    federation.run()
    lost = check_books(tmp_path, plan, federation)
    assert tiny.cohorts(tmp_path) == [[0, 1, 2]] * 2
    # Killed when the first masked update was recorded, the two others had been sent already.
    assert lost == ({(1, (1, 1, 1)), (2, (1, 1, 1))} if phase is Phase.MASKED else set())


@pytest.mark.parametrize("phase", [Phase.STARTED, Phase.READY, Phase.KEYS, Phase.SHARED])
def test_before_masked_the_same_adapter_comes_out_bit_by_bit(tmp_path, base, phase):
    """With the secret keys fixed: nothing had left, so the same update goes out, rounded anew."""
    plan = tiny.make_plan(base)
    sites = tiny.make_sites(3)
    calm = tiny.make_federation(tmp_path / "calm", plan, tiny.recorders(sites))
    calm.run()
    until_killed(tmp_path / "killed", plan, tiny.recorders(sites), phase)
    trainers = tiny.recorders(sites)
    federation = tiny.make_federation(tmp_path / "killed", plan, trainers)
    federation.run()
    assert tiny.cohorts(tmp_path / "killed") == tiny.cohorts(tmp_path / "calm")
    assert last_adapter(tmp_path / "killed") == last_adapter(tmp_path / "calm")


def last_adapter(folder: Path) -> bytes:
    """The bytes of the last adapter."""
    return tiny.blob(folder, tiny.facts_of(folder, Phase.COMMITTED)[-1][1]["adapter"])


def test_after_masked_another_update_with_fresh_noise_goes_out(tmp_path, base):
    """Negative control of the test before: what may have been seen is never sent again."""
    plan, sites = tiny.make_plan(base), tiny.make_sites(3)
    tiny.make_federation(tmp_path / "calm", plan, tiny.recorders(sites)).run()
    trainers = tiny.recorders(sites)
    until_killed(tmp_path / "killed", plan, trainers, Phase.MASKED, 3)
    again = tiny.recorders(sites)
    tiny.make_federation(tmp_path / "killed", plan, again).run()
    first, second = trainers["a"].results[0].update, again["a"].results[0].update
    assert [request.draw for request in again["a"].requests] == [1, 0]
    assert not np.array_equal(first, second)
    assert last_adapter(tmp_path / "killed") != last_adapter(tmp_path / "calm")


def test_killed_again_and_again_a_run_ends_where_its_budget_does(tmp_path, base):
    """Three kills after sent, two spare rounds: the fourth attempt of round 1 spends round 2's."""
    plan = tiny.make_plan(base, rounds=tiny.make_rounds(spare=2))
    sites = tiny.make_sites(3)
    for _ in range(2):
        until_killed(tmp_path, plan, tiny.recorders(sites), Phase.MASKED, 3)
    federation = tiny.make_federation(tmp_path, plan, tiny.recorders(sites))
    federation.run()
    check_books(tmp_path, plan, federation)
    assert [len(tiny.sent(tmp_path, site)) for site in range(3)] == [4, 4, 4]
    assert 0.9 * plan.privacy.epsilon < federation.epsilon_spent("a") <= plan.privacy.epsilon


def test_another_plan_does_not_go_on_with_a_killed_run(tmp_path, base):
    plan, sites = tiny.make_plan(base), tiny.make_sites(3)
    until_killed(tmp_path, plan, tiny.recorders(sites), Phase.KEYS)
    other = dataclasses.replace(plan, seed=1)
    with pytest.raises(Exception, match="was started with another plan"):
        tiny.make_federation(tmp_path, other, tiny.recorders(sites)).run()


class Process:
    """``fedward simulate`` in processes of its own, over one folder."""

    def __init__(self, folder: Path, base: Path, *, count: int, spare: int) -> None:
        self.out, self.errors = folder / "out", folder / "errors.txt"
        plan = folder / "plan.toml"
        plan.write_text(tiny.plan_text(base, count=count, spare=spare))
        rows = [row for name in "abc" for row in tiny.make_rows(name, 4)]
        data = tiny.write_data(folder / "data", rows)
        self.command = [sys.executable, "-m", "fedward", "simulate", str(plan)]
        self.command += ["--data", str(data), "--out", str(self.out)]
        self.command += ["--federated-only", "--json", "--resume"]

    def start(self) -> "subprocess.Popen[bytes]":
        with self.errors.open("ab") as errors:
            return subprocess.Popen(
                self.command,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def finish(self) -> Any:
        """Let it run to its end; returns the report."""
        process = self.start()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, self.errors.read_text()
        return json.loads(output)

    def kill_after(self, changes: int, seconds: float) -> bool:
        """Kill it so long after so many changes of its events; whether it was still running."""
        before, process, started = self.traces(), self.start(), time.monotonic()
        while process.poll() is None and changes > 0 and time.monotonic() - started < 120:
            now = self.traces()
            changes -= now != before
            before = now
            time.sleep(0.001)
        time.sleep(seconds)
        running = process.poll() is None
        if running:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return running

    def traces(self) -> set[tuple[str, int, int]]:
        """Names, sizes and times of the coordinator's files."""
        found = set()
        for path in self.out.glob("run/coordinator/runs.sqlite*"):
            with contextlib.suppress(FileNotFoundError):  # SQLite's own come and go
                stat = path.stat()
                found.add((path.name, stat.st_size, stat.st_mtime_ns))
        return found

    def check(self) -> None:
        """The run is complete, and every book of it agrees."""
        report = self.finish()
        folder = self.out / "run"
        plan = typed_toml.parse_json(Plan, (folder / "plan.json").read_bytes())
        trainers = tiny.recorders(tiny.make_sites(3))
        federation = tiny.make_federation(folder, plan, trainers)
        check_books(folder, plan, federation)
        assert report["rounds"] == plan.rounds.count == len(report["cohorts"])
        assert len(report["curves"]["federated"]) == plan.rounds.count + 1
        assert set(report["epsilon"]) == {"a", "b", "c"}
        for name, spent in report["epsilon"].items():
            assert spent == pytest.approx(federation.epsilon_spent(name))
            assert spent <= plan.privacy.epsilon


@pytest.mark.slow  # `make field-test` runs it
def test_a_killed_process_goes_on(tmp_path, base):
    process = Process(tmp_path, base, count=6, spare=4)
    assert process.kill_after(12, 0.001)
    process.check()


@pytest.mark.slow
def test_a_process_killed_at_twenty_instants_goes_on(tmp_path, base):
    """Each kill costs a site at most one spare round; all of them are in the noise."""
    process = Process(tmp_path, base, count=40, spare=30)
    generator = np.random.default_rng(0)
    for changes in generator.integers(1, 60, 22).tolist():
        assert process.kill_after(changes, generator.uniform(0, 0.01)), process.errors.read_text()
    process.check()
