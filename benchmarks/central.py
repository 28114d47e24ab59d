"""What ``fedward train`` costs beside a plain TRL script: the same model, rows and steps.

Both sides read the same files and leave a model and a checkpoint; their losses must agree, or there
is no figure.

- Time: in one process, turn about in a new order each turn, from the files to the saved model. A
  ratio is ours over TRL's in the same turn, so that a busy machine slows both; wall and CPU time.
- Memory: the largest resident size of a process of its own, interpreter and libraries included.
  The processes take turns too; their whole time, with all imports, is shown beside.

One torch thread.

    python benchmarks/central.py --quick --json      # sft, dpo and reward, two minutes
    python benchmarks/central.py --json              # kto, grpo and full training too
"""

import fedward  # noqa: F401  # switches telemetry off before any library loads

# isort: split

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.utils.logging import disable_progress_bar
from reporting import machine
from training.sides import SIDES
from training.work import CASES, prepare

GOAL = 1.02
QUICK = ("sft", "dpo", "reward")

Figures = dict[str, Any]


def timed(side: str, case: str, work: Path, steps: int) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and loss of one training in this process."""
    with tempfile.TemporaryDirectory(dir=work) as out:
        gc.collect()
        start, spent = time.perf_counter(), time.process_time()
        loss = SIDES[side](CASES[case], work, Path(out), steps)
        return time.perf_counter() - start, time.process_time() - spent, loss


def alone(side: str, case: str, work: Path, steps: int) -> tuple[float, float]:
    """Wall seconds of a process that does one training, and its largest resident size in MB."""
    command = [sys.executable, __file__, "--alone", side, case, str(work), str(steps)]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603  # ours
    return time.perf_counter() - start, float(done.stdout.split()[-1])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def measure(case: str, work: Path, steps: int, turns: int, processes: int) -> Figures:
    """One case: time and memory of both sides."""
    order = np.random.default_rng(0)
    for side in SIDES:
        timed(side, case, work, 2)
    times: dict[str, list[tuple[float, float, float]]] = {side: [] for side in SIDES}
    held: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for turn in range(max(turns, processes)):
        for number in order.permutation(2):
            side = list(SIDES)[int(number)]
            if turn < turns:
                times[side].append(timed(side, case, work, steps))
            if turn < processes:
                held[side].append(alone(side, case, work, steps))
    losses = {side: times[side][0][2] for side in SIDES}
    if abs(losses["ours"] - losses["trl"]) > 1e-5 * abs(losses["trl"]):
        raise SystemExit(f"{case}: the sides did other work: their losses are {losses}")
    turned = list(zip(times["ours"], times["trl"], strict=True))
    beside = list(zip(held["ours"], held["trl"], strict=True))
    return {
        "loss": losses["ours"],
        "seconds": {side: statistics.median(t[0] for t in times[side]) for side in SIDES},
        "cpu_seconds": {side: statistics.median(t[1] for t in times[side]) for side in SIDES},
        "time": spread([one[0] / two[0] for one, two in turned]),
        "cpu": spread([one[1] / two[1] for one, two in turned]),
        "megabytes": {side: statistics.median(h[1] for h in held[side]) for side in SIDES},
        "memory": statistics.median(one[1] / two[1] for one, two in beside),
        "process_seconds": {side: statistics.median(h[0] for h in held[side]) for side in SIDES},
    }


def show(case: str, found: Figures) -> None:
    """One case as a row."""
    time_, cpu = ("{median:.3f} ({low:.3f}-{high:.3f})".format(**found[k]) for k in ("time", "cpu"))
    each = (
        f"{found[key]['ours']:.{digits}f}, {found[key]['trl']:.{digits}f}"
        for key, digits in (
            ("seconds", 2),
            ("cpu_seconds", 2),
            ("megabytes", 0),
            ("process_seconds", 1),
        )
    )
    wall, spent, megabytes, whole = each
    cells = [case, wall, time_, spent, cpu, megabytes, f"{found['memory']:.3f}", whole]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Read the options, measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="sft, dpo and reward; fewer turns")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--turns", type=int, help="trainings of each side in this process")
    parser.add_argument("--processes", type=int, help="trainings of each side in their own")
    parser.add_argument("--steps", type=int, help="optimizer steps of a training")
    parser.add_argument("--alone", nargs=4, metavar=("SIDE", "CASE", "FOLDER", "STEPS"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    warnings.filterwarnings("ignore")
    if options.alone:
        side, case, folder, steps = options.alone
        timed(side, case, Path(folder), int(steps))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)  # KiB on Linux
        return
    facts = machine("torch", "trl", "peft", "transformers", "accelerate")
    facts["load"] = f"{os.getloadavg()[0]:.1f}"
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    turns = options.turns or (3 if options.quick else 12)
    processes = options.processes or (1 if options.quick else 5)
    steps = options.steps or (20 if options.quick else 60)
    cases: dict[str, Figures] = {}
    print(f"\n{turns} turns, {processes} processes a side, {steps} steps; pairs: ours, TRL")
    print("| case | seconds | time | CPU seconds | CPU time | MB | memory | seconds of a process |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for case in options.cases or (QUICK if options.quick else CASES):
            cases[case] = measure(case, Path(folder), steps, turns, processes)
            show(case, cases[case])
    figures = {
        "trl_ratio": max(found["time"]["median"] for found in cases.values()),
        "trl_cpu_ratio": max(found["cpu"]["median"] for found in cases.values()),
        "trl_memory_ratio": max(found["memory"] for found in cases.values()),
    }
    print("\nworst case of each:", {key: round(value, 3) for key, value in figures.items()})
    print(f"goal: time and memory <= {GOAL}")
    if options.json:
        print(json.dumps({"machine": facts, "cases": cases, **figures}))


if __name__ == "__main__":
    main()
