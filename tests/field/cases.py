"""What the fault test does in each round, and what must come of it."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedward.plan import Plan
from tests.field import clocks, hold, scene
from tests.field import disturbances as do

NORTHGATE, HARBOUR, VALLEY, SUMMIT = scene.HOSPITALS

Stage = Literal["training", "masked", "upload", "between"]

_PLACES = {"training": hold.training, "masked": hold.survivors, "upload": hold.masked}

NOTHING = "nothing: it goes on by itself"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One fault at one stage of one round.

    Args:
        fault: In words.
        stage: ``training``: after the second of three steps; ``upload``: the masked update is
            ready; ``masked``: the masked updates of all are in; ``between`` two rounds.
        strike: What happens.
        victim: The struck hospital; with the coordinator's faults, whose cable is looked at.
        sites: In the round's sum; 3: all but the victim; 0: as it comes.
        at: Whose log the operator reads, if not the victim's.
        says: A pattern that has to be in what was logged meanwhile.
        todo: What the operator does.
        apart: Whether the victim need not be there when the others have reached the stage.
    """

    fault: str
    stage: Stage
    strike: do.Fault
    victim: str = HARBOUR
    sites: int = 4
    at: str = ""
    says: str = ""
    todo: str = NOTHING
    apart: bool = False

    def place(self, number: int) -> str:
        """Where all sites wait in the round; between two rounds the run is paused instead."""
        return hold.NOWHERE if self.stage == "between" else _PLACES[self.stage](number)

    def check(self, row: Mapping[str, Any], said: str) -> None:
        """Whether what came of it is what should."""
        words = f"{self.fault}, {self.stage}"
        if not re.search(self.says, said):
            raise AssertionError(f"{words}: {self.says!r} is not in\n{said[-3000:]}")
        if self.sites and len(row["cohort"]) != self.sites:
            raise AssertionError(f"{words}: a sum of {row['cohort']}, {self.sites} were due")
        if self.sites == len(scene.HOSPITALS) - 1 and self.victim in row["cohort"]:
            raise AssertionError(f"{words}: {self.victim} should not be in the sum")


def _patient() -> list[Case]:
    """The deadline is long: whatever comes back is waited for."""
    unreachable = "the coordinator cannot be reached"
    half_open = do.cable(do.SHORT, lost=True)
    return [
        Case(fault="agent killed", stage="between", strike=do.kill_agent),
        Case(fault="trainer killed", stage="between", strike=do.kill_trainer),
        Case(fault="coordinator killed", stage="between", strike=do.kill_coordinator),
        Case(fault="link killed", stage="training", strike=do.kill_part("link"),
             at="coordinator", says="link ended with -9"),
        Case(fault="link killed", stage="masked", strike=do.kill_part("link"),
             at="coordinator", says="link ended with -9"),
        Case(fault="engine killed", stage="training", strike=do.kill_part("engine"),
             at="coordinator", says="engine ended with -9"),
        Case(fault="engine killed", stage="masked", strike=do.kill_part("engine"),
             at="coordinator", says="engine ended with -9"),
        Case(fault="half-open connection, 40 s", stage="training", strike=half_open,
             says=unreachable),
        Case(fault="half-open connection, 40 s", stage="masked", strike=half_open,
             says=unreachable),
        Case(fault="half-open connection, 40 s", stage="between", strike=half_open,
             says=unreachable),
        Case(fault="1 Mbit/s both ways", stage="training", strike=do.cable(None, rate=125_000.0)),
        Case(fault="1 Mbit/s both ways", stage="upload", strike=do.cable(None, rate=125_000.0)),
        Case(fault="500 ms each way", stage="training", strike=do.cable(None, delay=0.5)),
        Case(fault="500 ms each way", stage="masked", strike=do.cable(None, delay=0.5)),
        Case(fault="cut before the upload", stage="upload", strike=do.upload(cut_after=0),
             says=unreachable),
        Case(fault="cut in the upload", stage="upload", strike=do.upload(cut_after=200_000),
             says=unreachable),
        Case(fault="cut after the upload", stage="upload", strike=do.cut_after_upload),
        Case(fault="byte corrupted on its way up", stage="upload",
             strike=do.upload(spoil_after=100_000), says=unreachable),
        Case(fault="byte corrupted on its way down", stage="masked",
             strike=do.download(spoil_after=300), says=unreachable),
        Case(fault="earlier bytes played again", stage="masked", strike=do.replay_bytes),
        Case(fault="second daemon on one folder", stage="training", strike=do.second_daemon,
             says="another process runs this site", todo="stop one of the two"),
    ]  # fmt: skip


def _clocks() -> list[Case]:
    """Wrong clocks, set right after 40 seconds; the deadline is long."""
    set_it = "set the clock; `site doctor` names it"
    found = []
    refused, distrusted = "cannot be reached: status 401", "cannot be reached: ConnectError"
    for words, seconds, says in (
        ("an hour ahead", clocks.HOUR, refused),
        ("an hour behind", -clocks.HOUR, refused),
        ("a year ahead", clocks.YEAR, refused),
        ("a year behind", -clocks.YEAR, distrusted),
    ):
        found += [
            Case(fault=f"site's clock {words}", stage="training", strike=do.clock(seconds),
                 says=says, todo=set_it),
            Case(fault=f"coordinator's clock {words}", stage="training",
                 strike=do.clock(seconds, of="coordinator"), says=refused,
                 todo="set the clock"),
        ]  # fmt: skip
    return found


def _strict() -> list[Case]:
    """The deadline is a minute, and what stands still does so for 90."""
    return [
        Case(fault="server certificate expired", stage="between", strike=do.certificate(-400),
             says="cannot be reached", todo="start `coordinator serve` again: it renews"),
        Case(fault="server certificate of a clock a year ahead", stage="between",
             strike=do.certificate(365), says="cannot be reached",
             todo="start `coordinator serve` again: it renews"),
        Case(fault="agent stands still for 90 s", stage="training", strike=do.stop_agent, sites=3),
        Case(fault="agent stands still for 90 s", stage="masked", strike=do.stop_agent),
        Case(fault="trainer stands still for 90 s", stage="training", strike=do.stop_trainer,
             sites=3, says="took longer than the plan's deadline"),
        Case(fault="coordinator stands still for 90 s", stage="training",
             strike=do.stop_coordinator),
        Case(fault="coordinator stands still for 90 s", stage="masked", strike=do.stop_coordinator),
        Case(fault="engine stands still for 90 s", stage="training", strike=do.stop_engine),
        Case(fault="engine stands still for 90 s", stage="masked", strike=do.stop_engine),
        Case(fault="half-open connection, 90 s", stage="training",
             strike=do.cable(do.LONG, lost=True), sites=3),
        Case(fault="half-open connection, 90 s", stage="upload",
             strike=do.cable(do.LONG, lost=True), sites=3),
    ]  # fmt: skip


def _members() -> list[Case]:
    """Who is who; the deadline is a minute."""
    return [
        Case(fault="copy of a site's folder elsewhere", stage="between",
             strike=do.copied_folder, victim=SUMMIT, sites=0, says="lines were once acknowledged",
             todo="revoke the site: its keys are in two places"),
        Case(fault="that member revoked", stage="training", strike=do.revoke, victim=SUMMIT,
             sites=3, apart=True, says="it was revoked",
             todo="nothing; the site needs a new token and new keys to come back"),
        Case(fault="none, with the three that are left", stage="training", strike=do.nothing,
             victim=SUMMIT, sites=3),
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the fault test: a round for each case.

    Args:
        name: The run's.
        deadline: As the plan has it.
        cases: In order; the first is not between two rounds.
    """

    name: str
    deadline: str
    cases: list[Case]

    def plan(self, plan: Plan) -> Plan:
        """The scene's plan with a round for each case and an adapter that fills a slow wire."""
        rounds = dataclasses.replace(
            plan.rounds, count=len(self.cases), spare=8, deadline=self.deadline
        )
        arguments = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}
        tuner = dataclasses.replace(plan.tuner, arguments=arguments)
        return dataclasses.replace(plan, name=self.name, rounds=rounds, tuner=tuner)


NONE = Case(fault="none", stage="training", strike=do.nothing, sites=0)
"""Every run begins with it: models are loaded, and a busy machine may be late."""

RUNS = [
    Run(name="patient", deadline="10m", cases=[NONE, *_patient()]),
    Run(name="clocks", deadline="10m", cases=[NONE, *_clocks()]),
    Run(name="strict", deadline=f"{do.DEADLINE}s", cases=[NONE, *_strict()]),
    Run(name="members", deadline=f"{do.DEADLINE}s", cases=[NONE, *_members()]),
]
