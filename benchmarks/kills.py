"""Kill -9 in the middle of a run: what becomes of it, Fedward's and stock Flower's.

Three sites and a coordinator as processes on this machine, TLS and node authentication, the same
certificates and the same schedule: four rounds, a training that sleeps for two seconds, and one
fault in the middle of the second training of one site. Whatever dies is started again, as systemd
would: a site's daemon after 2 s, a coordinator after 4 s.

- ours: ``coordinator serve``, resident agents with a trainer process each, secure aggregation
  among all three (fewer are no cohort: each round needs every site);
- stock: SuperLink with a database file, SuperNodes, ``flwr run``, FedAvg with its own defaults (two
  sites are enough for a round).

They take turns. For each: did the run end, after how many seconds from the first training, in how
many of the four rounds the struck site's work is, and what the coordinator says of it.

    python benchmarks/kills.py --quick --json     # the coordinator's death alone, under 2 minutes
    python benchmarks/kills.py --json             # every fault, three times
"""

import fedward  # noqa: F401  # switches telemetry off before any library loads

# isort: split

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from killing import FAULTS, ROUNDS, Outcome, ours, stock
from reporting import machine
from rounds.ground import prepare

SYSTEMS = {"ours": ours.run, "stock": stock.run}
_NUMBERS = 250_000
"""Of the adapter: 1 MB."""


def play(root: Path, faults: Sequence[str], turns: int) -> dict[str, dict[str, list[Outcome]]]:
    """Every fault on both systems, taking turns; by fault and system."""
    found = {fault: {name: list[Outcome]() for name in SYSTEMS} for fault in faults}
    for turn in range(turns):
        for fault in faults:
            for name, run in SYSTEMS.items():
                place = root / f"{fault}-{turn}-{name}"
                outcome = run(prepare(place), place / "run", numbers=_NUMBERS, fault=fault)
                found[fault][name].append(outcome)
                load = os.getloadavg()[0]
                print(f"  {fault}, {name}: {outcome} (load {load:.1f})", flush=True)
    return found


def show(found: dict[str, dict[str, list[Outcome]]]) -> None:
    """A table of what was seen."""
    print("\n| killed | system | the run | seconds | rounds with the site's work | it says |")
    print("|---|---|---|---|---|---|")
    for fault, systems in found.items():
        for name, outcomes in systems.items():
            seconds = [outcome.seconds for outcome in outcomes]
            spread = f"{statistics.median(seconds):.0f} ({min(seconds):.0f}-{max(seconds):.0f})"
            ends, said = ({getattr(o, what) for o in outcomes} for what in ("ended", "said"))
            counted = ", ".join(f"{outcome.counted} of {ROUNDS}" for outcome in outcomes)
            cells = [FAULTS[fault], name, " / ".join(sorted(ends)), spread, counted]
            print("|", " | ".join([*cells, " / ".join(sorted(said)) or "nothing"]), "|")


def main() -> None:
    """Read the options, let everything happen and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one fault, one turn")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=None)
    parser.add_argument("--turns", type=int, default=None)
    options = parser.parse_args()
    facts = {**machine("flwr", "cryptography", "numpy"), "load": f"{os.getloadavg()[0]:.1f}"}
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    faults = options.faults or (["coordinator"] if options.quick else list(FAULTS))
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        found = play(Path(folder), faults, options.turns or (1 if options.quick else 3))
    show(found)
    if options.json:
        done: dict[str, Any] = {
            fault: {name: [dataclasses.asdict(o) for o in seen] for name, seen in systems.items()}
            for fault, systems in found.items()
        }
        print(json.dumps({"machine": facts, "faults": done}))


if __name__ == "__main__":
    main()
