"""What privacy costs a training step: six ways on the same LoRA model, taking turns.

- plain: LoRA training without privacy, what everything is compared with;
- ours: Fedward's step, with draw, per-unit clip and noise from the AES stream;
- hooks, functorch, ghost: Opacus's own ways, with torch's noise;
- loop: one record a backward pass.

Every turn takes one step of each way in a new order; a way's ratio is its time over plain's in the
same turn, so that a busy machine slows both. Wall and CPU time (of all threads of the process) are
reported: median and quartiles over turns. Memory is what a step holds at most beyond weights and
optimizer states, counted exactly. One torch thread. Ways that cannot do a case say why.

    python benchmarks/dp_step.py --quick --json      # sizes xs and s, under 2 minutes
    python benchmarks/dp_step.py --json              # sizes xs, s, m with all checkpointing
    python benchmarks/dp_step.py --ways ours hooks   # besides plain
    python benchmarks/dp_step.py --device cuda --sizes 8b --checkpointing non-reentrant
"""

import fedward  # noqa: F401  # switches telemetry off before any library loads

# isort: split

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from reporting import machine
from stepping.memory import peak
from stepping.models import CHECKPOINTING, SIZES, Losses, build, records
from stepping.ways import WAYS, Step

TURNS = {"xs": 40, "s": 16, "m": 8, "8b": 12}
QUICK = {"xs": 8, "s": 4, "m": 3, "8b": 3}
GOAL = {"time": 1.05, "memory": 1.03}

Case = dict[str, Any]
"""A way's figures in one case, or ``{"refused": why}``."""


def setting(device: str) -> dict[str, str]:
    """Where the figures come from."""
    packages = ("torch", "opacus", "peft", "transformers", "bitsandbytes", "numpy")
    name = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    return machine(*packages) | {"device": name, "load": f"{os.getloadavg()[0]:.1f}"}


def timed(step: Step, device: str) -> tuple[float, float]:
    """Wall and CPU seconds of one step."""
    start, spent = time.perf_counter(), time.process_time()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - spent


def prepare(
    ways: list[str], size: str, checkpointing: str, device: str
) -> tuple[dict[str, Step], dict[str, Case]]:
    """The ways that can take two steps, and why the others cannot."""
    steps: dict[str, Step] = {}
    refused: dict[str, Case] = {}
    losses = Losses(records(SIZES[size]), device)
    for name in ways:
        try:
            step = WAYS[name](build(SIZES[size], checkpointing, device), losses, SIZES[size].batch)
            for _ in range(2):
                step()
        except (RuntimeError, ValueError, AttributeError, IndexError, KeyError) as error:
            # Opacus's hooks lose count of the layers when checkpointing calls them again.
            if name in ("plain", "ours", "loop"):
                raise
            refused[name] = {"refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        else:
            steps[name] = step
    return steps, refused


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def case(
    ways: list[str], size: str, checkpointing: str, device: str, turns: int
) -> dict[str, Case]:
    """Every way in one case: time and memory over plain's."""
    steps, found = prepare(ways, size, checkpointing, device)
    held = {name: peak(step, device) for name, step in steps.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    order = np.random.default_rng(0)
    for _ in range(turns):
        for number in order.permutation(len(steps)):
            name = list(steps)[int(number)]
            times[name].append(timed(steps[name], device))
    for name in steps:
        pairs = list(zip(times[name], times["plain"], strict=True))
        found[name] = {
            "seconds": statistics.median(wall for wall, _ in times[name]),
            "time": spread([mine[0] / plain[0] for mine, plain in pairs]),
            "cpu": spread([mine[1] / plain[1] for mine, plain in pairs]),
            "megabytes": held[name] / 1e6,
            "memory": held[name] / held["plain"],
        }
    return {name: found[name] for name in ways}


def show(name: str, found: Mapping[str, Case]) -> None:
    """One case as a table."""
    print(f"\n{name}: median (quartiles) of the ratio to plain")
    print("| way | seconds | time | CPU time | MB | memory |")
    print("|---|---|---|---|---|---|")
    for way, figures in found.items():
        if "refused" in figures:
            print(f"| {way} | cannot: {figures['refused'][:80]} | | | | |")
            continue
        time_, cpu = (
            "{median:.3f} ({low:.3f}-{high:.3f})".format(**figures[k]) for k in ("time", "cpu")
        )
        held = f"{figures['megabytes']:.1f} | {figures['memory']:.3f}"
        print(f"| {way} | {figures['seconds']:.4f} | {time_} | {cpu} | {held} |", flush=True)


def worst(cases: Mapping[str, Mapping[str, Case]], way: str, key: str) -> float | None:
    """The largest ratio of a way over all cases that it can do."""
    done = [found[way] for found in cases.values() if key in found.get(way, {})]
    values = [figures[key] if key == "memory" else figures[key]["median"] for figures in done]
    return max(values, default=None)


def main() -> None:
    """Read the options, measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="xs and s, fewer turns")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--sizes", nargs="+", choices=SIZES)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS)[1:], default=list(WAYS)[1:])
    parser.add_argument("--checkpointing", nargs="+", choices=CHECKPOINTING)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    print(", ".join(f"{name} {value}" for name, value in setting(options.device).items()))
    turns = QUICK if options.quick else TURNS
    cases: dict[str, dict[str, Case]] = {}
    for size in options.sizes or (["xs", "s"] if options.quick else ["xs", "s", "m"]):
        short = options.quick and size != "xs"
        for checkpointing in options.checkpointing or (CHECKPOINTING[: 1 if short else 3]):
            name = f"{size}, checkpointing {checkpointing}"
            ways = ["plain", *options.ways]
            cases[name] = case(ways, size, checkpointing, options.device, turns[size])
            show(name, cases[name])
    figures = {
        "time_ratio": worst(cases, "ours", "time"),
        "cpu_ratio": worst(cases, "ours", "cpu"),
        "memory_ratio": worst(cases, "ours", "memory"),
        **{f"{way}_time_ratio": worst(cases, way, "time") for way in WAYS if way != "plain"},
        **{f"{way}_memory_ratio": worst(cases, way, "memory") for way in WAYS if way != "plain"},
    }
    print("\nworst case of each:", {k: v and round(v, 3) for k, v in figures.items()})
    print(f"goals: time <= {GOAL['time']}, memory <= {GOAL['memory']}")
    if options.json:
        print(json.dumps({"machine": setting(options.device), "cases": cases, **figures}))


if __name__ == "__main__":
    main()
