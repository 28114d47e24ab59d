"""``fedward site journal …`` and ``ledger``: what happened at a site, and what it cost."""

import json
import os
import pwd
import re
from pathlib import Path
from typing import Annotated

import typer

from fedward.client.site_folder import SiteFolder
from fedward.errors import ConfigurationError

audit_app = typer.Typer()
journal_app = typer.Typer(no_args_is_help=True, help="What happened here, signed line by line.")
audit_app.add_typer(journal_app, name="journal")

SiteOption = Annotated[
    Path, typer.Option("--site", envvar="FEDWARD_SITE", help="The site's folder.")
]
"""The folder that every command of a site works on."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

DEFAULT_SITE = Path("site")


def who() -> str:
    """The account that gives the command, as the operating system knows it."""
    return pwd.getpwuid(os.getuid()).pw_name


@journal_app.command("show")
def show_journal(
    site: SiteOption = DEFAULT_SITE,
    last: Annotated[int, typer.Option(help="How many of the newest entries.", min=1)] = 30,
    json_output: JsonOption = False,
) -> None:
    """The newest entries, after a check of every line."""
    from fedward.client.journal import verify_journal

    folder = SiteFolder.load(site)
    entries = verify_journal(folder, folder.identity().public_key)[-last:]
    for entry in entries:
        if json_output:
            typer.echo(json.dumps(entry))
        else:
            rest = "  ".join(
                f"{key}={value}" for key, value in entry.items() if key not in ("time", "what")
            )
            typer.echo(f"{entry['time']}  {entry['what']}  {rest}".rstrip())


@journal_app.command("verify")
def verify(
    export: Annotated[
        Path | None, typer.Argument(help="An exported journal; left out: this site's own.")
    ] = None,
    site: SiteOption = DEFAULT_SITE,
    key: Annotated[
        str | None, typer.Option(help="The site's public key in hex, for an exported journal.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Check every line and signature, and that no line is missing that the ledger has seen."""
    from tempfile import TemporaryDirectory

    from fedward.client.journal import verify_export, verify_journal

    if export is None:
        folder = SiteFolder.load(site)
        entries = verify_journal(folder, folder.identity().public_key)
    else:
        if key is None or re.fullmatch("[0-9a-f]{64}", key) is None:
            raise ConfigurationError("give the site's public key with --key, 64 hex digits")
        with TemporaryDirectory(prefix="fedward-") as scratch:
            entries = verify_export(export.read_bytes(), bytes.fromhex(key), Path(scratch))
    typer.echo(json.dumps({"entries": len(entries)}) if json_output else f"{len(entries)} hold")


@journal_app.command("export")
def export(
    out: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    site: SiteOption = DEFAULT_SITE,
) -> None:
    """Write journal and ledger to one file that an auditor can check with the site's public key."""
    from fedward.client.journal import export_journal, journal_command
    from fedward.private_files import write_private

    folder = SiteFolder.load(site)
    journal_command(folder, "journal exported", {"who": who()})
    write_private(out, export_journal(folder))
    typer.echo(f"{out}: check it with fedward site journal verify {out} --key")
    typer.echo(folder.identity().public_key.hex())


@audit_app.command()
def ledger(site: SiteOption = DEFAULT_SITE, json_output: JsonOption = False) -> None:
    """What patients have spent here, over all runs, and what is left under the cap."""
    from fedward.client.policy import load_policy
    from fedward.privacy.ledger import read_books

    folder = SiteFolder.load(site)
    policy = load_policy(folder.policy)
    books = read_books(
        folder.ledger, folder.identity().public_key, epsilon=policy.max_epsilon, delta=policy.delta
    )
    facts = {
        "epsilon_spent": books.epsilon_spent(),
        "max_epsilon": policy.max_epsilon,
        "delta": policy.delta,
        "runs": {run: books.spent(run) for run in books.runs},
    }
    if json_output:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(
        f"epsilon {facts['epsilon_spent']:.3f} of {policy.max_epsilon:g} at delta {policy.delta:g}"
    )
    for run in books.runs:
        typer.echo(f"  {run}: {books.spent(run)} rounds sent, {books.remaining(run)} left")
