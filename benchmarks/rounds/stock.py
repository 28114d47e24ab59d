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
    programs, folder = Path(sys.executable).parent, ground.coordinator
    port, out = free_port(), scratch / "times.json"
    flwr = (str(programs / "flwr"),)
    with Processes(scratch, _IMPATIENT if fast else None) as processes:
        processes.start(
            "superlink",
            *(str(programs / "flower-superlink"), "--port", str(port)),
            *("--ssl-ca-certfile", str(folder.ca)),
            *("--ssl-certfile", str(folder.server_certificate)),
            *("--ssl-keyfile", str(folder.server_key)),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        )
        processes.wait("the SuperLink", lambda: answers(port))
        home = processes.home("flwr")
        home.mkdir(parents=True)
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n[superlink.here]\n'
            f'address = "127.0.0.1:{port}"\nroot-certificates = "{folder.ca}"\n'
        )
        for site in ground.sites:
            processes.run("flwr", *flwr, "supernode", "register", str(site.fleet_public_key))
        for name, site in zip(SITES, ground.sites, strict=True):
            processes.start(
                f"supernode-{name}",
                *(str(programs / "flower-supernode"), "--superlink", f"127.0.0.1:{port}"),
                *("--port", str(free_port()), "--root-certificates", str(folder.ca)),
                *("--auth-supernode-private-key", str(site.fleet_key)),
            )
        config = (
            f"rounds={count} sites={len(SITES)} tensors={TENSORS} numbers={numbers // TENSORS} "
            f'out="{out}"'
        )
        processes.run("flwr", *flwr, "run", str(_APP), "here", "--run-config", config)
        processes.wait("the rounds", out.exists)
    times = json.loads(out.read_text())
    return [after - before for before, after in pairwise(times)]
