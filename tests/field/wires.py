"""The wires of the field test: a network namespace for each machine where that is allowed.

Every hospital has one cable, to the coordinator. There is no default route, no resolver and no way
from one hospital to another, so a site that needs anything but the coordinator fails. Who is not
root becomes so in a namespace of users first. Where even that is not allowed, or where
``FIELD_WIRES=loopback`` asks for it, all run on loopback, and no cable can be pulled.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_BRIDGE = "fw0"
_TRIES = 200
_LOOPBACK = os.environ.get("FIELD_WIRES") == "loopback"


def enter_namespace(module: str) -> None:
    """Start a module again as root of a namespace of users, if only that allows networks."""
    if _LOOPBACK or "FIELD_ENTERED" in os.environ or _run("unshare", "-n", "true"):
        return
    if _run("unshare", "-Urn", "true"):
        os.environ["FIELD_ENTERED"] = "1"
        again = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "-Ur", *again])  # noqa: S606, S607  # replaces this program


class Wires:
    """Namespaces for a coordinator and its sites, until closed.

    Args:
        sites: Their names.
    """

    def __init__(self, sites: Sequence[str]) -> None:
        self._holders = dict[str, subprocess.Popen[bytes]]()
        self._ports = dict[str, str]()
        self.real = not _LOOPBACK and _run("unshare", "-n", "true")
        self.address = "10.77.0.1" if self.real else "127.0.0.1"
        """Where sites look for the coordinator."""
        self.behind = "127.0.0.1" if self.real else "127.0.0.2"
        """Where it listens, behind the relay."""
        if not self.real:
            return
        self._hold("coordinator")
        self._ip("coordinator", "link", "set", "lo", "up")
        self._ip("coordinator", "link", "add", _BRIDGE, "type", "bridge")
        self._ip("coordinator", "address", "add", f"{self.address}/24", "dev", _BRIDGE)
        self._ip("coordinator", "link", "set", _BRIDGE, "up")
        for number, site in enumerate(sites):
            self._hold(site)
            port, far = f"p{number}", str(self._holders[site].pid)
            self._ip("coordinator", "link", "add", port, "type", "veth", "peer", "name", "up0",
                     "netns", far)  # fmt: skip
            self._ip("coordinator", "link", "set", port, "master", _BRIDGE, "up")
            self._ip("coordinator", "link", "set", port, "type", "bridge_slave", "isolated", "on")
            self._ports[site] = port
            self._ip(site, "address", "add", f"{self.address_of(site)}/24", "dev", "up0")
            self._ip(site, "link", "set", "up0", "up")

    def address_of(self, site: str) -> str:
        """The address of a site."""
        return f"10.77.0.{10 + list(self._ports).index(site)}" if self.real else "127.0.0.1"

    def inside(self, machine: str) -> list[str]:
        """What to put before a command so that it runs on a machine."""
        if not self.real:
            return []
        return ["nsenter", "-t", str(self._holders[machine].pid), "-n", "--"]

    def cut(self, site: str) -> None:
        """Pull a site's cable."""
        self._ip("coordinator", "link", "set", self._ports[site], "down")

    def heal(self, site: str) -> None:
        """Put it in again."""
        self._ip("coordinator", "link", "set", self._ports[site], "up")

    def close(self) -> None:
        """Let go of all namespaces; they end with their last process."""
        for holder in self._holders.values():
            holder.kill()
            holder.wait()

    def _hold(self, machine: str) -> None:
        """A process that keeps a namespace open until this one ends."""
        command = [str(shutil.which("unshare")), "-n", "cat"]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE)
        self._holders[machine] = holder
        mine = Path("/proc/self/ns/net").stat().st_ino
        for _ in range(_TRIES):
            if Path(f"/proc/{holder.pid}/ns/net").stat().st_ino != mine:
                return
            time.sleep(0.05)
        raise AssertionError("no network namespace came about")

    def _ip(self, machine: str, *words: str) -> None:
        subprocess.run([*self.inside(machine), "ip", *words], check=True)


def _run(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False
