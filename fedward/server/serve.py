"""``fedward coordinator serve``: the link and the round engine as supervised processes.

``python -m fedward.server.serve PART FOLDER`` is one part; people start the whole.
"""

import datetime
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fedward.errors import ConfigurationError, FedwardError
from fedward.private_files import hold
from fedward.server.certificates import issue
from fedward.server.control_service import ControlService, Health, control_server
from fedward.server.coordinator_folder import CoordinatorFolder
from fedward.server.engine import Engine
from fedward.server.enrolment import enrolment_app
from fedward.server.fleet_api import fleet_app
from fedward.server.front import MAX_BODY, Front, Listener, front_server
from fedward.server.members import open_members
from fedward.server.superlink import LinkState, admit_nodes, open_state
from fedward.server.supervisor import Part, end_with_supervisor, supervise

_LOG = logging.getLogger(__name__)

_ROSTER_SECONDS = 2.0
_DAY_SECONDS = 86400.0
_HEALTH_SECONDS = 1.0


def serve(folder: CoordinatorFolder, stop: threading.Event) -> None:
    """Serve a coordinator until told to stop.

    Raises:
        ConfigurationError: Another process serves this folder.
    """
    busy = f"{folder.root}: another process serves it already"
    with hold(folder.root / "serve.lock", busy):
        issue(folder, datetime.datetime.now(datetime.UTC))
        environment = {"FLWR_HOME": str(folder.flower_home)}
        # -P: no code from the folder that the command happens to be given in.
        command = [sys.executable, "-P", "-m", "fedward.server.serve"]
        parts = [
            Part(name=name, command=[*command, name, str(folder.root)], environment=environment)
            for name in ("link", "engine")
        ]
        supervise(parts, stop)


def run_link(folder: CoordinatorFolder, stop: threading.Event) -> None:
    """The part that answers sites: the public port, and no other."""
    config = folder.config()
    state = open_state(folder.fleet_database)
    _admit(folder, state)
    front = Front(
        fleet_app(folder.fleet_database, MAX_BODY, config.max_letter << 20),
        enrolment_app(folder, on_change=lambda: _admit(folder, state)),
    )
    gc.freeze()  # what was imported stays: it need not be looked through again and again
    server = front_server(
        front,
        Listener(
            host=config.listen,
            port=config.port,
            certificate=folder.server_certificate,
            key=folder.server_key,
        ),
    )

    def follow() -> None:
        """Let in and shut out as the roster says; end when told to, or for a new certificate."""
        epoch, day = -1, time.monotonic()
        try:
            while not stop.wait(_ROSTER_SECONDS):
                with open_members(folder) as members:
                    now = members.roster().epoch
                if now != epoch:
                    _admit(folder, state)
                    epoch = now
                if time.monotonic() - day > _DAY_SECONDS:
                    day = time.monotonic()
                    if issue(folder, datetime.datetime.now(datetime.UTC)):
                        break
        finally:
            server.should_exit = True  # whatever happened: who follows no roster shuts nobody out

    threading.Thread(target=follow, name="roster", daemon=True).start()
    server.run()
    if not server.started:
        raise ConfigurationError(
            f"cannot listen on {config.listen}:{config.port}: is the port in use?"
        )


def _admit(folder: CoordinatorFolder, state: LinkState) -> None:
    with open_members(folder) as members:
        admit_nodes(state, {m.id: m.fleet_key for m in members.all() if not m.revoked})


def run_engine(folder: CoordinatorFolder, stop: threading.Event) -> None:
    """The part that runs runs, with the control service beside it."""
    engine = Engine(folder, stop)
    health = Health(folder, engine)
    server = control_server(
        folder.control_socket, ControlService(folder, engine, stop), health.servicer
    )

    def look() -> None:
        while not stop.is_set():
            health.look()
            stop.wait(_HEALTH_SECONDS)

    threading.Thread(target=look, name="health", daemon=True).start()
    try:
        engine.work()
    finally:
        server.stop(grace=1).wait()


def stop_at_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def main(part: str, root: str) -> int:
    """Run one part in this process; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {part} %(levelname)s %(message)s")
    for noisy in ("httpx", "uvicorn", "flwr", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.umask(0o077)
    stop = stop_at_signals()
    end_with_supervisor(stop)
    parts: dict[str, Callable[[CoordinatorFolder, threading.Event], None]] = {
        "link": run_link,
        "engine": run_engine,
    }
    try:
        parts[part](CoordinatorFolder.load(Path(root)), stop)
    except FedwardError as error:
        _LOG.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
