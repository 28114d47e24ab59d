"""What secure aggregation costs: Fedward, Flower's SecAgg+ functions and the floor, side by side.

The masked-input stage of one site with d coordinates and k neighbours, interleaved in one process:

- ours: round to the grid, add the self mask and k pair masks (32-bit words; 16 where said, and then
  the rotation that a plan with 16-bit words implies stands on its own);
- theirs: Flower's own quantize, pseudo_rand_gen, addition and modulus, on tensors of 2^18
  coordinates, as its client calls them;
- floor: k + 1 AES-256 keystreams into the cache and one pass over the memory, nothing added.

All times are CPU time of one thread, medians with least and most. Hashing, serialising and taking
the output's pages from the system come on their own. Peak memory is the resident high-water mark of
a fresh process without torch, input and output included. Whole sessions run every site for itself,
small vectors, some sites dropping out.

    python benchmarks/secure_aggregation.py --quick --json        # under 2 minutes
    python benchmarks/secure_aggregation.py --json --plot docs/secure-aggregation.svg

The second line runs everything, about a quarter of an hour on a quiet machine. Finished parts are
kept in --out and not run again, each with the load of the machine when it began and the process's
peak memory when it ended.
"""

import fedward  # noqa: F401  # switches telemetry off before any library loads

# isort: split

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from masking.flower_secaggplus import mask, remove_mask, serialise
from masking.mask_once import high_water
from masking.plot import plot
from reporting import machine

from fedward.aggregation.fixed_point import Grid, encode
from fedward.aggregation.masks import Words, apply_masks, fastest_mode, keystream
from fedward.aggregation.parameters import Limits, SessionParameters
from fedward.aggregation.rotation import rotate
from fedward.aggregation.session_memory import VolatileMemory
from fedward.aggregation.site_session import SiteSession
from fedward.aggregation.tally import Tally
from fedward.attempt import Attempt
from fedward.identity import Identity, Member, Roster
from fedward.privacy.noise import SecureStream

CHUNK = 1 << 18  # bytes
TARGET = (20_000_000, 10)

Vector = npt.NDArray[np.float32]
Report = dict[str, Any]


def setting() -> dict[str, str]:
    """Where the figures come from."""
    vaes = sys.platform == "linux" and "vaes" in Path("/proc/cpuinfo").read_text()
    aes = {"vaes": str(vaes), "aes mode": fastest_mode()}
    return machine("cryptography", "numpy", "flwr") | aes


def update_of(dimension: int) -> Vector:
    """An update whose values matter to nobody's speed."""
    return np.random.default_rng(0).standard_normal(dimension, dtype=np.float32)


def keys_of(count: int) -> list[bytes]:
    """Mask keys."""
    return [hashlib.sha256(n.to_bytes(4, "big")).digest() for n in range(count)]


def timed(work: Callable[..., Any], *arguments: object) -> tuple[float, Any]:
    """CPU seconds of a call, and what it returns."""
    start = time.process_time()
    found = work(*arguments)
    return time.process_time() - start, found


def ours(update: Vector, neighbours: int, word_bits: int = 32) -> tuple[Report, Words]:
    """One site's masked input by Fedward; seconds by part.

    Taking new pages from the system is a part of its own: on a virtual machine it can cost more
    than all the rest, or next to nothing.
    """
    grid = Grid(clip=8.0, sites=64, word_bits=word_bits)
    pages, words = timed(partial(np.full, dtype=grid.dtype), update.shape, 1)
    keys = keys_of(neighbours + 1)
    half = neighbours // 2 + 1
    rounding, _ = timed(encode, update, grid, SecureStream(), words)
    masks, _ = timed(partial(apply_masks, add=keys[:half], subtract=keys[half:]), words)
    parts = {"seconds": rounding + masks, "rounding": rounding, "masks": masks, "pages": pages}
    return parts, words


def floor(update: Vector, neighbours: int) -> float:
    """CPU seconds of the keystreams alone and one pass from the update into a vector of words."""
    keys, buffer, zeros = keys_of(neighbours + 1), bytearray(CHUNK + 15), bytes(CHUNK)
    words = np.empty(len(update), dtype=np.uint32)

    words.fill(1)

    def work() -> None:
        for key in keys:
            stream = keystream(key, 0, fastest_mode())
            for _ in range(-(-4 * len(update) // CHUNK)):
                stream.update_into(zeros, buffer)
        np.copyto(words, update.view(np.uint32))

    return timed(work)[0]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def stage(dimension: int, neighbours: int, repeats: int) -> Report:
    """Every way at one size, taking turns."""
    update = update_of(dimension)
    # Once for nothing: a virtual machine gets each page from its host on the first touch, ever.
    ours(update, 2)
    mask(update, keys_of(2))
    runs: dict[str, list[float]] = {}
    sizes: dict[str, float] = {}
    for _ in range(repeats):
        parts, words = ours(update, neighbours)
        hashing, _ = timed(hashlib.sha256, words.data)
        unmask, _ = timed(partial(apply_masks, subtract=keys_of(1)), words)
        sizes["ours_bytes"] = words.nbytes / dimension
        del words
        turning, turned = timed(rotate, update, keys_of(1)[0])
        del turned
        narrow, words = ours(update, neighbours, word_bits=16)
        sizes["ours16_bytes"] = words.nbytes / dimension
        del words
        seconds, masked = timed(mask, update, keys_of(neighbours + 1))
        packing, payload = timed(serialise, masked)
        sizes["theirs_bytes"] = sum(map(len, payload)) / dimension
        del payload
        removal, _ = timed(remove_mask, masked, keys_of(1)[0])
        del masked
        found = {
            **{f"ours_{name}": value for name, value in parts.items()},
            "ours_hash": hashing,
            "ours_unmask": unmask,
            "ours16_seconds": narrow["seconds"],
            "ours16_rotation": turning,
            "theirs_seconds": seconds,
            "theirs_packing": packing,
            "theirs_unmask": removal,
            "floor_seconds": floor(update, neighbours),
        }
        for name, value in found.items():
            runs.setdefault(name, []).append(value)
    return {**{name: spread(values) for name, values in runs.items()}, **sizes}


def peak(way: str, dimension: int, neighbours: int) -> float:
    """MB of a fresh process that masks one input (``masking/mask_once.py``)."""
    command = [sys.executable, "-m", "masking.mask_once", way, str(dimension), str(neighbours)]
    done = subprocess.run(  # noqa: S603  # our own module
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return float(done.stdout)


def session(sites: int, dimension: int) -> Report:
    """A whole session: every site checks everything, 5 % drop out after dealing shares."""
    identities = [Identity(hashlib.sha256(b"%d" % n).digest()) for n in range(sites + 1)]
    members = tuple(
        Member(id=n, name=f"site {n}", public_key=identities[n].public_key)
        for n in range(1, sites + 1)
    )
    roster = Roster(epoch=1, coordinator=identities[0].public_key, members=members)
    parameters = SessionParameters(
        attempt=Attempt(run="benchmark", round=1),
        roster_hash=roster.hash(),
        task_hash=bytes(32),
        dimension=dimension,
        grid=Grid(clip=1.0, sites=sites, word_bits=32),
        colluders=sites // 20,
        dropouts=sites // 20,
        minimum=sites * 2 // 3,
    )
    there = {
        n: SiteSession(
            identity=identities[n],
            site=n,
            roster=roster,
            limits=Limits(),
            memory=VolatileMemory(),
            expected=parameters,
        )
        for n in range(1, sites + 1)
    }
    inputs = {n: np.full(dimension, n, dtype=np.uint32) for n in there}
    tally = Tally(parameters=parameters, roster=roster)
    return exchanges(there, inputs, tally, lost=sites // 20)


def exchanges(
    there: Mapping[int, SiteSession], inputs: Mapping[int, Words], tally: Tally, lost: int
) -> Report:
    """Run the five exchanges; CPU seconds of a site and of the coordinator in each."""
    report: Report = {"sites": len(there), "site_ms": {}, "coordinator_ms": {}, "up_bytes": {}}
    expected = sum(n for n in there if n > lost) % 2**32
    begin = time.perf_counter()
    todo, vectors = dict.fromkeys(there, tally.request()), dict[int, Words]()

    def ask(name: str, site: int, message: bytes) -> bytes:
        if name == "masked":
            header, vectors[site] = there[site].masked(message, inputs[site])
            return header
        answer: bytes = getattr(there[site], name)(message)
        return answer

    def take(name: str, site: int, reply: bytes) -> None:
        if name == "masked":
            tally.add_masked(site, reply, vectors.pop(site))
        else:
            getattr(tally, f"add_{name}")(site, reply)

    for name, close in (
        ("hello", tally.close_hellos),
        ("shares", tally.close_shares),
        ("masked", tally.close_masked),
        ("consistency", tally.close_consistency),
        ("unmask", tally.result),
    ):
        if name == "masked":
            todo = {site: message for site, message in todo.items() if site > lost}
        at_sites = at_tally = 0.0
        for site, message in todo.items():
            spent, reply = timed(ask, name, site, message)
            taken, _ = timed(take, name, site, reply)
            at_sites, at_tally = at_sites + spent, at_tally + taken
            report["up_bytes"][name] = len(reply)
        closing, result = timed(close)
        report["site_ms"][name] = 1000 * at_sites / len(todo)
        report["coordinator_ms"][name] = 1000 * (at_tally + closing)
        print(f"  {len(there)} sites: {name} done after {time.perf_counter() - begin:.0f} s")
        todo = result if name != "unmask" else todo
    report["seconds"] = time.perf_counter() - begin
    report["exact"] = bool((result.words == expected).all())
    return report


def work_through(options: argparse.Namespace) -> Report:
    """Run every part that is not in the file of finished ones."""
    done: Report = {"machine": setting()}
    if not options.quick and options.out.exists():
        done = json.loads(options.out.read_text())
        if done["machine"] != setting():
            sys.exit(f"{options.out} is of another machine or version: give another --out")

    def part(name: str, work: Callable[..., Any], *arguments: object) -> None:
        known = name in done
        print(f"{name}{' (kept)' if known else ''}", flush=True)
        if known:
            return
        load = os.getloadavg()[0]
        done[name] = work(*arguments)
        done.setdefault("loads", {})[name] = round(load, 1)
        done.setdefault("process_peaks", {})[name] = round(high_water())
        if not options.quick:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(done, indent=1) + "\n")

    sizes = [1_000_000] if options.quick else [1_000_000, 20_000_000, 100_000_000]
    cells = [(d, k) for d in sizes for k in (2, 10, 50)]
    for d, k in [*cells, TARGET] if options.quick else cells:
        few = 3 if options.quick or d == 100_000_000 else 5
        part(f"stage {d} {k}", stage, d, k, few)
    for way in ("ours", "ours16", "theirs"):
        part(f"peak {way}", peak, way, *TARGET)
    for n in (100,) if options.quick else (100, 1000):
        part(f"session {n}", session, n, 1000)
    return done


def show(done: Report) -> None:
    """Tables of what was measured."""
    print("\nclient CPU seconds, median (least-most); unmask: the server's, one mask")
    print("| d | k | Fedward | 16-bit | rotation | Flower | floor | ratio | unmask | Flower's |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, found in done.items():
        if not name.startswith("stage"):
            continue
        _, d, k = name.split()
        ways = ("ours_seconds", "ours16_seconds", "ours16_rotation")
        columns = [*ways, "theirs_seconds", "floor_seconds"]
        times = [
            f"{found[c]['median']:.4f} ({found[c]['least']:.4f}-{found[c]['most']:.4f})"
            for c in columns
        ]
        ratio = found["theirs_seconds"]["median"] / found["ours_seconds"]["median"]
        unmask = [f"{found[f'{w}_unmask']['median']:.4f}" for w in ("ours", "theirs")]
        print("|", " | ".join([f"{int(d):,}", k, *times, f"{ratio:.1f}", *unmask]), "|")
    names = ("ours", "ours16", "theirs")
    target = done["stage {} {}".format(*TARGET)]
    print("bytes a parameter up:", {name: round(target[f"{name}_bytes"], 2) for name in names})
    print("peak MB at d = 20 M, k = 10:", {name: round(done[f"peak {name}"]) for name in names})
    for name, found in done.items():
        if name.startswith("session"):
            print(f"{name}: {found['seconds']:.1f} s in all, exact {found['exact']}")
            for side in ("site_ms", "coordinator_ms"):
                print(f"  {side}:", {k: round(v, 1) for k, v in found[side].items()})


def figures(done: Report) -> Report:
    """The figures that the design asks for, at d = 20 M and k = 10."""
    found = done["stage {} {}".format(*TARGET)]
    seconds = found["ours_seconds"]["median"]
    return {
        "dimension": TARGET[0],
        "neighbours": TARGET[1],
        "mask_seconds": seconds,
        "rounding_seconds": found["ours_rounding"]["median"],
        "adding_seconds": found["ours_masks"]["median"],
        "rotation_seconds": found["ours16_rotation"]["median"],
        "hash_seconds": found["ours_hash"]["median"],
        "page_seconds": found["ours_pages"]["median"],
        "flower_ratio": found["theirs_seconds"]["median"] / seconds,
        "floor_share": found["floor_seconds"]["median"] / seconds,
        "peak_mb": done["peak ours"],
        "flower_peak_mb": done["peak theirs"],
        "bytes_a_parameter": found["ours_bytes"],
        "flower_bytes_a_parameter": found["theirs_bytes"],
        "session_100_seconds": done["session 100"]["seconds"],
        "loads": done["loads"],
        "session_1000_seconds": done.get("session 1000", {}).get("seconds"),
    }


def main() -> None:
    """Read the options, measure what is missing and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes, repeats and sites")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/secure-aggregation.json"))
    parser.add_argument("--plot", type=Path, help="draw the figure of the docs, SVG or PNG")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in setting().items()), flush=True)
    done = work_through(options)
    show(done)
    if options.plot:
        plot(done, options.plot)
    if options.json:
        print(json.dumps({"machine": setting(), **figures(done)}))


if __name__ == "__main__":
    main()
