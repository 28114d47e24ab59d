"""One site of the benchmark: the real daemon with the real trainer process behind it."""

import os
import signal
import sys
import threading
from pathlib import Path

from fedward.client.daemon import run_site
from fedward.client.remote_trainer import RemoteTrainer
from fedward.client.site_folder import SiteFolder
from fedward.client.trainer_process import TrainerProcess


def main(root: str, *for_trainer: str) -> None:
    """Answer the coordinator until SIGTERM.

    Args:
        root: The site's folder.
        for_trainer: What :mod:`rounds.trainer` is given beside its socket.
    """
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    folder = SiteFolder.load(Path(root))
    command = [sys.executable, "-m", "rounds.trainer", str(folder.trainer_socket)]
    process = TrainerProcess([*command, *for_trainer], dict(os.environ))
    process.start()
    try:
        run_site(folder, RemoteTrainer(folder.trainer_socket, process=process), stop)
    finally:
        process.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
