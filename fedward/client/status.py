"""Whether a site runs and what it is doing; nothing counts as running without a fresh sign of life.

The agent's file (:mod:`fedward.client.pulse`) is believed for ``FRESH_SECONDS``, whatever stands
there: a killed process cannot take its last words back. The same facts go out as the standard gRPC
health service on the control socket and, where the site gives a port, as Prometheus text on
loopback.
"""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedward import typed_toml
from fedward.client.policy import load_policy
from fedward.client.pulse import BEAT_SECONDS, FRESH_SECONDS, Life, Pulse
from fedward.client.site_folder import SiteFolder
from fedward.errors import ConfigurationError
from fedward.privacy.ledger import read_books
from fedward.private_files import check_private, hold

LEAST_FREE_BYTES = 1 << 28
"""With less room a disk counts as full: an adapter and its records may no longer fit."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """A site as somebody who looks at it now sees it.

    Args:
        site: Its name.
        state: ``running``; ``silent`` (a process that said nothing for too long, or was killed);
            or ``stopped``.
        connected: Whether it is running and the coordinator answers.
        paused: Whether it takes no new rounds.
        training: Whether the trainer gave a sign of life just now.
        step: The step it is at; 0 outside of training.
        silent_seconds: Age of the last sign of life; None where none can be read.
        epsilon_spent: What patients have lost here, over all runs.
        max_epsilon: The policy's cap; None without a policy.
        rounds_sent: Updates that ever left.
        disk: What keeps this site from recording, and so from training; empty if nothing does.
    """

    site: str
    state: str
    connected: bool
    paused: bool
    training: bool
    step: int
    silent_seconds: float | None
    epsilon_spent: float
    max_epsilon: float | None
    rounds_sent: int
    disk: str


@contextlib.contextmanager
def signs_of_life(folder: SiteFolder) -> Iterator[Pulse]:
    """Tell of this process while it runs: the file, gRPC health, and Prometheus if configured.

    Args:
        folder: The site's.

    Raises:
        ConfigurationError: Another process runs this site, others can open the socket's folder, or
            the port is taken.
    """
    over = threading.Event()
    with contextlib.ExitStack() as stack:
        busy = f"{folder.root}: another process runs this site"
        stack.enter_context(hold(folder.root / "life.lock", busy))
        pulse = Pulse(life_file(folder))
        stack.callback(pulse.end)
        set_health = stack.enter_context(_health(folder.control_socket))
        port = folder.config().status_port
        if port:
            stack.enter_context(_metrics_server(folder, port))

        def run() -> None:
            while not over.wait(BEAT_SECONDS):
                pulse.beat()
                set_health(site_status(folder).connected)

        beating = threading.Thread(target=run, name="pulse", daemon=True)
        beating.start()
        stack.callback(beating.join)
        stack.callback(over.set)
        yield pulse


def life_file(folder: SiteFolder) -> Path:
    """Where the agent's signs of life are."""
    return folder.root / "life.json"


def site_status(folder: SiteFolder, now: float | None = None) -> Status:
    """Look at a site from outside of its agent.

    Args:
        folder: The site's.
        now: Unix time; the clock's where it is left out.

    Raises:
        ConfigurationError: Configuration or policy are invalid.
        LedgerError: The ledger does not hold.
    """
    now = time.time() if now is None else now
    life, path, torn = None, life_file(folder), False
    with contextlib.suppress(FileNotFoundError):
        data = path.read_bytes()
        torn = not data  # it is never synced: a power loss may leave nothing of it
        life = None if torn else typed_toml.parse_json(Life, data)
    age = None if life is None else max(0.0, now - life.beat)
    running = age is not None and age <= FRESH_SECONDS
    spent, cap, sent = _spent(folder)
    training = life is not None and running and now - life.progress <= FRESH_SECONDS
    return Status(
        site=folder.config().name,
        state="running" if running else "silent" if torn or age is not None else "stopped",
        connected=life is not None and running and life.connected,
        paused=folder.paused.exists(),
        training=training,
        step=life.step if life is not None and training else 0,
        silent_seconds=age,
        epsilon_spent=spent,
        max_epsilon=cap,
        rounds_sent=sent,
        disk=disk_trouble(folder),
    )


def disk_trouble(folder: SiteFolder) -> str:
    """Why a site's disk takes no more records, in words; empty if it does."""
    if not os.access(folder.root, os.W_OK):
        return f"{folder.root} cannot be written: read-only, or another account's"
    free = shutil.disk_usage(folder.root).free
    if free < LEAST_FREE_BYTES:
        return f"{free >> 20} MiB are free at {folder.root}, fewer than {LEAST_FREE_BYTES >> 20}"
    return ""


def prometheus(status: Status) -> str:
    """A status in Prometheus' text format; it has no labels, so that none can name a patient.

    >>> status = Status(site="x", state="running", connected=True, paused=False, training=False,
    ...     step=0, silent_seconds=1.0, epsilon_spent=0.5, max_epsilon=None, rounds_sent=2, disk="")
    >>> print(prometheus(status).splitlines()[2])
    fedward_site_running 1
    """
    rows = (
        ("running", "gauge", "1 while the agent gives signs of life.", status.state == "running"),
        ("connected", "gauge", "1 while the coordinator answers.", status.connected),
        ("paused", "gauge", "1 while no new round is taken.", status.paused),
        ("training", "gauge", "1 while the trainer is at a step.", status.training),
        ("step", "gauge", "The trainer's step.", status.step),
        ("epsilon_spent", "gauge", "Privacy spent over all runs.", status.epsilon_spent),
        ("epsilon_cap", "gauge", "The policy's cap.", status.max_epsilon),
        ("disk_writable", "gauge", "1 while the disk takes records.", not status.disk),
        ("rounds_sent_total", "counter", "Updates that ever left.", status.rounds_sent),
    )
    lines = [
        f"# HELP fedward_site_{name} {help_}\n# TYPE fedward_site_{name} {kind}\n"
        f"fedward_site_{name} {float(value):g}\n"
        for name, kind, help_, value in rows
        if value is not None
    ]
    return "".join(lines)


def _spent(folder: SiteFolder) -> tuple[float, float | None, int]:
    """Epsilon spent, the cap, and updates sent."""
    if not folder.policy.exists():
        return 0.0, None, 0
    policy = load_policy(folder.policy)
    if not folder.ledger.exists():
        return 0.0, policy.max_epsilon, 0
    spent, sent = _books(folder, policy.max_epsilon, policy.delta, folder.ledger.stat().st_size)
    return spent, policy.max_epsilon, sent


@lru_cache(maxsize=1)
def _books(folder: SiteFolder, epsilon: float, delta: float, size: int) -> tuple[float, int]:
    """The ledger's sums; it only ever grows, so that its size says whether they are still right."""
    books = read_books(folder.ledger, folder.identity().public_key, epsilon=epsilon, delta=delta)
    return books.epsilon_spent(), sum(books.spent(run) for run in books.runs)


@contextlib.contextmanager
def _health(path: Path) -> Iterator[Callable[[bool], None]]:
    """``grpc.health.v1`` on a Unix socket that only its owner can reach."""
    check_private(path.parent)
    servicer = health.HealthServicer()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)

    def tell(serving: bool) -> None:
        states = health_pb2.HealthCheckResponse
        servicer.set("", states.SERVING if serving else states.NOT_SERVING)

    tell(False)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise ConfigurationError(f"{path}: cannot listen there") from error
    path.chmod(0o600)
    server.start()
    try:
        yield tell
    finally:
        server.stop(None).wait()


@contextlib.contextmanager
def _metrics_server(folder: SiteFolder, port: int) -> Iterator[int]:
    """``/metrics``, ``/healthz`` and ``/readyz`` on loopback; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = site_status(folder)
            good = {
                "/metrics": True,
                "/healthz": status.state == "running",
                "/readyz": status.connected,
            }.get(self.path)
            body = prometheus(status) if self.path == "/metrics" else f"{status.state}\n"
            self.send_response(404 if good is None else 200 if good else 503)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            self.wfile.write(b"" if good is None else body.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Probes every few seconds are no news."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ConfigurationError(
            f"status_port = {port}: cannot listen on loopback ({error.strerror})"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="status", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
