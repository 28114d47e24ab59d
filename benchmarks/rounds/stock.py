"""Rounds of stock Flower: SuperLink, three SuperNodes, ``flwr run``; TLS and node authentication.

Everything as it comes: database in memory, an app process for every message. With ``fast`` no
program sleeps longer than Fedward's shortest poll, which is 0.1 s.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

from rounds.ground import SITES, TENSORS, Ground
from rounds.processes import BENCHMARKS, Processes, answers, free_port

_PROGRAMS = Path(sys.executable).parent
FLWR = str(_PROGRAMS / "flwr")
"""The command line; its programs run as ``flwr``."""

_APP = BENCHMARKS / "rounds" / "stock_app"
_IMPATIENT = {
    "PYTHONPATH": str(BENCHMARKS / "rounds" / "impatient"),
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}


def rounds(ground: Ground, scratch: Path, *, numbers: int, count: int, fast: bool) -> list[float]:
    """Seconds of each round, as the ServerApp sees them.

    Args:
        ground: Lends its certificates and node keys.
        scratch: A folder for logs, not used before.
        numbers: Float32 numbers of the adapter.
        count: Rounds.
        fast: Poll as often as Fedward.
    """
    port, out = free_port(), scratch / "times.json"
    with Processes(scratch, _IMPATIENT if fast else None) as processes:
        start_all(processes, ground, port)
        config = (
            f"rounds={count} sites={len(SITES)} tensors={TENSORS} numbers={numbers // TENSORS} "
            f'out="{out}"'
        )
        processes.run("flwr", FLWR, "run", str(_APP), "here", "--run-config", config)
        processes.wait("the rounds", out.exists)
    times = json.loads(out.read_text())
    return [after - before for before, after in pairwise(times)]


def start_all(processes: Processes, ground: Ground, port: int, *options: str) -> None:
    """Start the SuperLink, register the nodes' keys and start the SuperNodes.

    Args:
        processes: Where.
        ground: Lends its certificates and node keys.
        port: The SuperLink's.
        options: More options of the SuperLink.
    """
    start_link(processes, ground, port, *options)
    home, folder = processes.home("flwr"), ground.coordinator
    home.mkdir(parents=True)
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "here"\n[superlink.here]\n'
        f'address = "127.0.0.1:{port}"\nroot-certificates = "{folder.ca}"\n'
    )
    for site in ground.sites:
        processes.run("flwr", FLWR, "supernode", "register", str(site.fleet_public_key))
    for number in range(len(SITES)):
        start_node(processes, ground, port, number)


def start_link(processes: Processes, ground: Ground, port: int, *options: str) -> None:
    """Start the SuperLink and wait until it listens."""
    folder = ground.coordinator
    processes.start(
        "superlink",
        *(str(_PROGRAMS / "flower-superlink"), "--port", str(port)),
        *("--ssl-ca-certfile", str(folder.ca)),
        *("--ssl-certfile", str(folder.server_certificate)),
        *("--ssl-keyfile", str(folder.server_key)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *options,
    )
    processes.wait("the SuperLink", lambda: answers(port))


def start_node(processes: Processes, ground: Ground, port: int, number: int) -> None:
    """Start a site's SuperNode, which knows its number."""
    site = ground.sites[number]
    processes.start(
        f"supernode-{SITES[number]}",
        *(str(_PROGRAMS / "flower-supernode"), "--superlink", f"127.0.0.1:{port}"),
        *("--port", str(free_port()), "--root-certificates", str(ground.coordinator.ca)),
        *("--auth-supernode-private-key", str(site.fleet_key)),
        *("--node-config", f"site={number}"),
    )
