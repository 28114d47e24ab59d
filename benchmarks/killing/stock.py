"""Stock Flower under the schedule: SuperLink with a database, SuperNodes, FedAvg as it comes."""

import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

from rounds.ground import SITES, TENSORS, Ground
from rounds.processes import BENCHMARKS, Processes, free_port
from rounds.stock import FLWR, start_all, start_link, start_node

from killing import ROUNDS, TRAINING_SECONDS, VICTIM, Outcome, System, play

_APP = BENCHMARKS / "killing" / "stock_app"
_ASK_SECONDS = 5.0
_FAILURES = re.compile(r"\d+ results and [1-9]\d* failures|error in reply from node \d+: [^.\n]*")


def run(ground: Ground, scratch: Path, *, numbers: int, fault: str) -> Outcome:
    """One run with one fault; see :func:`killing.ours.run`."""
    port, marks = free_port(), scratch / "marks"
    marks.mkdir(parents=True)
    database = ("--database", str(scratch / "state.db"))
    with Processes(scratch) as processes:
        start_all(processes, ground, port, *database)
        config = (
            f"rounds={ROUNDS} sites={len(SITES)} tensors={TENSORS} numbers={numbers // TENSORS} "
            f'seconds={TRAINING_SECONDS} out="{scratch}"'
        )
        processes.run("flwr", FLWR, "run", str(_APP), "here", "--run-config", config)
        site = f"supernode-{SITES[VICTIM]}"
        system = System(
            processes=processes,
            site=site,
            worker="flwr-clientapp",
            coordinator="superlink",
            job="flwr-serverapp",
            start={
                site: partial(start_node, processes, ground, port, VICTIM),
                "superlink": partial(start_link, processes, ground, port, *database),
            },
            end=_End(processes, scratch),
        )
        ended, seconds = play(system, marks, fault)
        (listed,) = _runs(processes)
        log = processes.ask("flwr", FLWR, "log", str(listed["run-id"]), "here", "--show").decode()
    rounds = (scratch / "counted").read_text().splitlines()
    counted = sum(VICTIM in json.loads(line) for line in rounds)
    details = [text for text in [listed["status-details"]] if text != "N/A"]
    said = "; ".join([*_FAILURES.findall(log), *details])
    return Outcome(ended=ended, seconds=seconds, counted=counted, said=said)


def _runs(processes: Processes) -> list[dict[str, Any]]:
    """What ``flwr list`` has; nothing while nobody listens, which it says in JSON too."""
    found = processes.ask("flwr", FLWR, "list", "here", "--format", "json")
    runs: list[dict[str, Any]] = json.loads(found or b"{}").get("runs", [])
    return runs


class _End:
    """How the run ended: the ServerApp's last word, or what ``flwr list`` says every five seconds.

    Args:
        processes: Where ``flwr`` runs.
        scratch: Where the ServerApp writes.
    """

    def __init__(self, processes: Processes, scratch: Path) -> None:
        self._processes, self._scratch, self._next = processes, scratch, 0.0

    def __call__(self) -> str:
        if (self._scratch / "finished").exists():
            return "finished"
        if time.monotonic() < self._next:
            return ""
        ends = [run["status"] for run in _runs(self._processes)]
        self._next = time.monotonic() + _ASK_SECONDS
        return next((end for end in ends if end.startswith("finished:")), "")
