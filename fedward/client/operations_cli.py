"""``fedward site train-service``, ``doctor``, ``status`` and ``dry-run``: for those who run it."""

from typing import Annotated

import typer

from fedward.client.audit_cli import DEFAULT_SITE, SiteOption
from fedward.client.sandbox import confine
from fedward.client.site_folder import SiteFolder

operations_app = typer.Typer()


@operations_app.command("train-service")
def train_service(
    site: SiteOption = DEFAULT_SITE,
    child: Annotated[
        bool, typer.Option("--child", help="End with the standard input, as a child of site run.")
    ] = False,
) -> None:
    """Train for the agent, without a network, behind a socket in the site's folder.

    fedward site run starts this by itself. Run it apart, as the shipped systemd unit does, where
    the agent must not be able to read the records at all.
    """
    folder = SiteFolder.load(site)
    confine(folder.cache)
    from fedward.client.site_trainer import run_trainer  # no library before the sandbox

    run_trainer(folder, child=child)
