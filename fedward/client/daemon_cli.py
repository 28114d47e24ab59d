"""``fedward site run``."""

import logging
import os
import signal
import sys
import threading
from typing import Annotated

import typer

from fedward.client.audit_cli import DEFAULT_SITE, SiteOption
from fedward.client.sandbox import shut_off
from fedward.client.site_folder import SiteFolder

daemon_app = typer.Typer()


@daemon_app.command()
def run(
    site: SiteOption = DEFAULT_SITE,
    trainer_apart: Annotated[
        bool,
        typer.Option(
            "--trainer-apart", help="Use the train-service that runs by itself; start no child."
        ),
    ] = False,
) -> None:
    """Take part in the coordinator's runs, until interrupted; it only ever calls out.

    Connects again for ever after any loss. SIGTERM ends it after the letter in hand, a second one
    at once; a killed one goes on where its folder says.
    """
    from fedward.client.daemon import run_site  # Flower and torch are heavy
    from fedward.client.remote_trainer import site_remote_trainer
    from fedward.client.status import signs_of_life

    folder, stop = SiteFolder.load(site), threading.Event()

    def end(*_: object) -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    os.umask(0o077)
    if sys.platform == "linux":
        shut_off()
    logging.getLogger("fedward").setLevel(logging.INFO)
    logger = logging.getLogger(__name__)
    with signs_of_life(folder) as pulse:

        def told(state: str) -> None:
            logger.info("%s", state)
            pulse.connection(state)

        child = not trainer_apart
        trainer = site_remote_trainer(folder, child=child, on_progress=pulse.progress)
        try:
            run_site(folder, trainer, stop, on_state=told)
        finally:
            trainer.close()
