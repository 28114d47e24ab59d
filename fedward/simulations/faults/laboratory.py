"""One run of the laboratory: what was to go wrong, what happened, whether all invariants held."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedward.plan import Plan
from fedward.simulations.faults.checker import Violation, check
from fedward.simulations.faults.ground import PLAN
from fedward.simulations.faults.history import History
from fedward.simulations.faults.schedule import Fault, random_schedule
from fedward.simulations.faults.world import World


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of the laboratory showed.

    Args:
        seed: Of delays and losses.
        schedule: What was armed.
        history: What happened.
        violations: What must not have.
        rounds: Attempt and sites of each committed round, from round 1.
        spent: For each site the rounds for which it spent an update, in order.
    """

    seed: int
    schedule: tuple[Fault, ...]
    history: History
    violations: tuple[Violation, ...]
    rounds: tuple[tuple[int, tuple[int, ...]], ...]
    spent: tuple[tuple[int, ...], ...]

    def transcript(self) -> str:
        """Schedule, events and verdict; the same for the same seed."""
        armed = [f"  {fault}" for fault in self.schedule]
        happened = [f"  {when:7.2f} s  {words}" for when, words in self.history.lines]
        verdict = [f"  {violation}" for violation in self.violations]
        return "\n".join(
            [
                f"seed {self.seed}",
                "armed:",
                *armed,
                "happened:",
                *happened,
                *(["VIOLATED:", *verdict] if verdict else ["invariants I1 to I9 hold"]),
            ]
        )


def run_seed(seed: int, plan: Plan = PLAN) -> Outcome:
    """Run the schedule that belongs to a seed, in a temporary folder.

    Args:
        seed: 0 or more.
        plan: The run's.
    """
    return run_schedule(random_schedule(seed), seed, plan)


def run_schedule(schedule: tuple[Fault, ...], seed: int = 0, plan: Plan = PLAN) -> Outcome:
    """Run a schedule, in a temporary folder.

    Args:
        schedule: What goes wrong; empty: nothing.
        seed: Of delays and losses.
        plan: The run's.
    """
    with tempfile.TemporaryDirectory(prefix="fedward-") as folder:
        world = World(Path(folder) / "world", seed, plan)
        try:
            for fault in schedule:
                world.arm(fault)
            history = world.run()
            return Outcome(
                seed=seed,
                schedule=schedule,
                history=history,
                violations=tuple(check(world)),
                rounds=tuple((a.attempt, tuple(f["cohort"])) for a, f in world.watch.committed()),
                spent=tuple(tuple(order[0] for order in site.sent()) for site in world.sites),
            )
        finally:
            world.close()
