"""One schedule of kill -9 for two systems: a run of four rounds, a fault in the second."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rounds.processes import Processes

ROUNDS, TRAINING_SECONDS = 4, 2.0
VICTIM = 1
"""The site that is struck."""

FAULTS = {
    "none": "none",
    "site": "site's daemon, all of it, back after 2 s",
    "training": "the training process",
    "coordinator": "coordinator, all of it, back after 4 s",
    "job": "coordinator's process of the run",
}
_GIVE_UP_SECONDS = 180.0
_LOOK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class System:
    """What the schedule has to know of a system that runs.

    Args:
        processes: Its programs.
        site: The victim's program.
        worker: A word of the command of the process that trains, which the site has started.
        coordinator: The coordinator's program.
        job: A word of the command of the process that conducts the run.
        start: Starts either of the two programs again.
        end: How the run ended; nothing while it goes on.
    """

    processes: Processes
    site: str
    worker: str
    coordinator: str
    job: str
    start: Mapping[str, Callable[[], None]]
    end: Callable[[], str]

    def strike(self, fault: str) -> None:
        """Let one of :data:`FAULTS` happen."""
        if fault in {"site", "training"}:
            self.processes.kill(self.site, self.worker if fault == "training" else "")
        elif fault != "none":
            self.processes.kill(self.coordinator, self.job if fault == "job" else "")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a run.

    Args:
        ended: ``finished``, or how else, or when it was given up.
        seconds: From the first training to the end.
        counted: In how many of the four rounds the victim's work is.
        said: What the coordinator says of it.
    """

    ended: str
    seconds: float
    counted: int
    said: str


def play(system: System, marks: Path, fault: str) -> tuple[str, float]:
    """Let the fault happen in the middle of the victim's second training; see the run to its end.

    Whatever ends is started again by who supervises it: a site after 2 s, a coordinator after 4 s.

    Args:
        system: It runs, and has been given the run.
        marks: Where each site makes a file ``SITE-ROUND`` when it begins to train.
        fault: One of :data:`FAULTS`.

    Returns:
        How it ended, and after how many seconds.
    """
    system.processes.wait("the second round", (marks / f"{VICTIM}-2").exists)
    time.sleep(TRAINING_SECONDS / 2)
    system.strike(fault)
    began = min(mark.stat().st_mtime for mark in marks.glob("*-1"))
    give_up, died = time.monotonic() + _GIVE_UP_SECONDS, dict[str, float]()
    while not (end := system.end()) and time.monotonic() < give_up:
        for name, pause in ((system.site, 2.0), (system.coordinator, 4.0)):
            if system.processes.lives(name):
                continue
            if time.monotonic() > died.setdefault(name, time.monotonic()) + pause:
                system.start[name]()
                del died[name]
        time.sleep(_LOOK_SECONDS)
    return end or f"not within {_GIVE_UP_SECONDS:.0f} s", time.time() - began
