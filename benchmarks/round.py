"""What a whole round costs without its training: Fedward's secure one beside stock Flower's FedAvg.

Three sites and a coordinator as processes on this machine, TLS and node authentication, the same
adapter, the same certificates. In place of the training every site has a fixed update, on both
sides, so the training's time is zero and all that is left is the round:

- ours: ``coordinator serve``, resident agents with a trainer process each, the database on disk;
  task, five exchanges of secure aggregation, every check, ledger, journal and events;
- stock: SuperLink, SuperNodes and ``flwr run`` as they come: FedAvg in the clear, database in
  memory, an app process for every message (which imports numpy, but no torch);
- polling: stock with every sleep cut to 0.1 s, Fedward's shortest poll.

The three take turns; each is started for its turn and stopped after it, so none slows another. Wall
time of a round: median (least to most) over all rounds of all turns.

    python benchmarks/round.py --quick --json     # 4 MB, one turn, under 2 minutes
    python benchmarks/round.py --json             # 4 and 80 MB
"""

import fedward  # noqa: F401  # switches telemetry off before any library loads

# isort: split

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting import machine
from rounds import ours, stock
from rounds.ground import Ground, prepare

GOALS = {"stock_ratio": 1.0, "polling_ratio": 1.5}
WAYS = ("ours", "stock", "polling")

Report = dict[str, Any]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def size(ground: Ground, root: Path, megabytes: int, *, turns: int, rounds: int) -> Report:
    """All ways at one size of adapter, taking turns."""
    numbers, seconds = megabytes * 250_000, {way: list[float]() for way in WAYS}
    stages, loads = list[ours.Round](), list[float]()
    for turn in range(turns):
        for way in WAYS:
            scratch, begin = root / f"{way}-{megabytes}-{turn}", time.monotonic()
            loads.append(os.getloadavg()[0])
            if way == "ours":
                found = ours.rounds(ground, scratch, numbers=numbers, count=rounds)
                stages += found
                seconds[way] += [one["all"] for one in found]
            else:
                scratch.mkdir()
                seconds[way] += stock.rounds(
                    ground, scratch, numbers=numbers, count=rounds, fast=way == "polling"
                )
            took = time.monotonic() - begin
            print(f"  {megabytes} MB, turn {turn + 1}: {way} ({took:.0f} s in all)", flush=True)
    middle = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "seconds": {way: spread(values) for way, values in seconds.items()},
        "every_round": seconds,
        "stages": {name: statistics.median(one[name] for one in stages) for name in stages[0]},
        "stock_ratio": middle["ours"] / middle["stock"],
        "polling_ratio": middle["ours"] / middle["polling"],
        "loads": loads,
    }


def show(done: dict[str, Report]) -> None:
    """Tables of what was measured."""
    print("\n| adapter | Fedward | stock | polling | / stock | / polling |")
    print("|---|---|---|---|---|---|")
    for name, found in done.items():
        times = [
            "{median:.2f} ({least:.2f}-{most:.2f})".format(**found["seconds"][way]) for way in WAYS
        ]
        ratios = [f"{found[goal]:.2f}" for goal in GOALS]
        print("|", " | ".join([f"{name} MB", *times, *ratios]), "|")
    for name, found in done.items():
        parts = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in found["stages"].items())
        print(f"{name} MB, seconds of our round by stage: {parts}")
    print("goals:", ", ".join(f"{name} <= {goal}" for name, goal in GOALS.items()))


def main() -> None:
    """Read the options, measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 MB alone, one turn")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--sizes", nargs="+", type=int, help="adapters in MB")
    parser.add_argument("--turns", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3, help="rounds a turn")
    options = parser.parse_args()
    facts = {**machine("flwr", "cryptography", "numpy"), "load": f"{os.getloadavg()[0]:.1f}"}
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    turns = options.turns or (1 if options.quick else 3)
    done = dict[str, Report]()
    with tempfile.TemporaryDirectory(prefix="round-") as folder:
        root = Path(folder)
        ground = prepare(root)
        for megabytes in options.sizes or ([4] if options.quick else [4, 80]):
            done[str(megabytes)] = size(ground, root, megabytes, turns=turns, rounds=options.rounds)
    show(done)
    if options.json:
        ratios = {goal: {name: found[goal] for name, found in done.items()} for goal in GOALS}
        print(json.dumps({"machine": facts, "sizes": done, **ratios}))


if __name__ == "__main__":
    main()
