"""One hospital of the field test: the real daemon, only its keys are fixed."""

import logging
import os
import signal
import sys
import threading
from pathlib import Path

from fedward.client.daemon import run_site
from fedward.client.remote_trainer import RemoteTrainer
from fedward.client.site_folder import SiteFolder
from fedward.client.trainer_process import TrainerProcess
from tests.field import scene


def main(root: str, hospital: str) -> None:
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {hospital} %(message)s")
    for noisy in ("httpx", "flwr"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    folder = SiteFolder.load(Path(root))
    command = [sys.executable, "-m", "tests.field.trainer", str(folder.trainer_socket), hospital]
    process = TrainerProcess(command, dict(os.environ))
    process.start()
    trainer = RemoteTrainer(folder.trainer_socket, process=process, start_seconds=600)
    run_site(folder, trainer, stop, key=scene.secret(hospital, "rounding"))
    process.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
