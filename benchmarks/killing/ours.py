"""Fedward under the schedule: ``coordinator serve``, agents with a trainer process each."""

import contextlib
import json
from functools import partial
from pathlib import Path

from rounds.ground import SITES, Ground, plan
from rounds.ours import first_adapter, start_all, start_coordinator, start_site, write_first
from rounds.processes import Processes

from fedward.server.runs import RunBook, RunState
from fedward.server.store import Phase, RunStore
from killing import ROUNDS, TRAINING_SECONDS, VICTIM, Outcome, System, play

_RUN = "kills"
_ENDS = {RunState.FINISHED, RunState.PAUSED, RunState.ABORTED}


def run(ground: Ground, scratch: Path, *, numbers: int, fault: str) -> Outcome:
    """One run with one fault.

    Args:
        ground: Coordinator and sites, new.
        scratch: A folder for logs, not used before.
        numbers: Float32 numbers of the adapter.
        fault: Which.
    """
    start, layout = first_adapter(numbers)
    marks, coordinator = scratch / "marks", ground.coordinator
    marks.mkdir(parents=True)
    files = write_first(scratch, start, layout)
    training = (str(TRAINING_SECONDS), str(marks))
    with Processes(scratch) as processes:
        start_all(processes, ground, *files, *training)
        book = RunBook(coordinator.runs)
        book.submit(_RUN, plan(ROUNDS), start, layout)
        system = System(
            processes=processes,
            site=SITES[VICTIM],
            worker="rounds.trainer",
            coordinator="coordinator",
            job="engine",
            start={
                SITES[VICTIM]: partial(
                    start_site, processes, ground, VICTIM, *files, str(VICTIM), *training
                ),
                "coordinator": partial(start_coordinator, processes, ground),
            },
            end=lambda: str(state) if (state := book.state(_RUN)) in _ENDS else "",
        )
        ended, seconds = play(system, marks, fault)
    counted, said = _told(coordinator.runs)
    return Outcome(ended=ended, seconds=seconds, counted=counted, said=said)


def _told(folder: Path) -> tuple[int, str]:
    """In how many rounds the victim counts, and what the events say beside that."""
    with contextlib.closing(RunStore(folder)) as store:
        events = store.events(_RUN)
    counted, said = 0, list[str]()
    for event in events:
        facts, attempt = json.loads(event.payload), event.attempt
        if event.phase is Phase.COMMITTED:
            counted += VICTIM in facts["cohort"]
        elif event.phase is Phase.LEFT_OUT:
            said.append(f"round {attempt.round}: {SITES[event.site]}: {facts['reason']}")
        elif event.phase is Phase.STARTED and attempt.attempt > 1:
            said.append(f"round {attempt.round}: attempt {attempt.attempt}")
    return counted, "; ".join(said)
