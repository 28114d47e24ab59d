"""``fedward coordinator init | invite | roster | revoke``."""

import dataclasses
import datetime
import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedward.server.coordinator_folder import CoordinatorConfig, CoordinatorFolder

members_app = typer.Typer()

_HOUR = 3600
_MOST_HOURS = 24 * 14

_Folder = Annotated[
    Path,
    typer.Option("--coordinator", envvar="FEDWARD_COORDINATOR", help="The coordinator's folder."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
_Site = Annotated[str, typer.Argument(help="The site's name.", show_default=False)]
_DEFAULT = Path("coordinator")


@members_app.command()
def init(
    host: Annotated[
        str, typer.Option(help="DNS name or IP address that sites connect to.", show_default=False)
    ],
    folder: Annotated[
        Path, typer.Argument(envvar="FEDWARD_COORDINATOR", help="The folder to make.")
    ] = _DEFAULT,
    port: Annotated[int, typer.Option(help="The public port.", min=1, max=65535)] = 9443,
    json_output: _Json = False,
) -> None:
    """Make the coordinator's folder: CA, server certificate, identity key, configuration.

    Again, it changes nothing, except that a server certificate with less than 30 days left is
    renewed; sites, which pin the CA, notice nothing.
    """
    from fedward.identity import fingerprint
    from fedward.server.certificates import issue, server_expires

    made = CoordinatorFolder.create(folder, CoordinatorConfig(host=host, port=port))
    issued = issue(made, datetime.datetime.now(datetime.UTC))
    facts = {
        "folder": str(folder),
        "address": made.config().address,
        "fingerprint": fingerprint(made.identity().public_key),
        "certificate_until": server_expires(made).isoformat(),
        "certificate_issued": issued,
    }
    if json_output:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{folder}: the coordinator at {facts['address']}")
    typer.echo(f"fingerprint (sites see it when they enrol): {facts['fingerprint']}")
    typer.echo(f"TLS certificate until {server_expires(made):%Y-%m-%d}; back up ca-key.pem and key")
    typer.echo("next: fedward coordinator invite SITE, then fedward coordinator serve")


@members_app.command()
def invite(
    site: _Site,
    folder: _Folder = _DEFAULT,
    hours: Annotated[
        int, typer.Option(help="How long the token holds.", min=1, max=_MOST_HOURS)
    ] = 24,
    json_output: _Json = False,
) -> None:
    """Print a token that admits one site once; send it by a way that you trust.

    A newer token for a site makes an older one void.
    """
    from fedward.enrolment import Token
    from fedward.server.members import open_members

    found = CoordinatorFolder.load(folder)
    expires = int(time.time()) + hours * _HOUR
    with open_members(found) as members:
        secret = members.invite(site, expires=expires, now=int(time.time()))
    word = Token(
        site=site,
        address=found.config().address,
        ca=found.ca.read_text(),
        coordinator=found.identity().public_key.hex(),
        secret=secret,
        expires=expires,
    ).encode()
    if json_output:
        typer.echo(json.dumps({"site": site, "expires": expires, "token": word}, indent=2))
        return
    typer.echo(word)
    typer.echo(f"a secret, for site {site!r} alone, until {_local(expires)}", err=True)


@members_app.command()
def roster(folder: _Folder = _DEFAULT, json_output: _Json = False) -> None:
    """Every site with its fingerprint, to compare on the telephone, and open invitations."""
    from fedward.identity import fingerprint
    from fedward.server.members import open_members

    found = CoordinatorFolder.load(folder)
    with open_members(found) as members:
        sites, waiting = members.all(), members.waiting(int(time.time()))
        epoch = members.roster().epoch
    facts = [
        {
            "id": site.id,
            "name": site.name,
            "fingerprint": fingerprint(site.public_key),
            "state": "left" if site.left else "revoked" if site.revoked else "member",
        }
        for site in sites
    ]
    own = fingerprint(found.identity().public_key)
    invited = [{"name": name, "expires": expires} for name, expires in waiting]
    if json_output:
        every = {"epoch": epoch, "coordinator": own, "sites": facts, "invited": invited}
        typer.echo(json.dumps(every, indent=2))
        return
    typer.echo(f"roster of epoch {epoch}; coordinator {own}")
    table = Table("id", "site", "fingerprint", "state")
    for fact in facts:
        table.add_row(*(str(value) for value in fact.values()))
    for name, expires in waiting:
        table.add_row("", name, "", f"invited until {_local(expires)}")
    Console(width=100, highlight=False).print(table)


@members_app.command()
def revoke(site: _Site, folder: _Folder = _DEFAULT, json_output: _Json = False) -> None:
    """Put a site out of the roster for good; its keys and its number never come back.

    To let a site in again that lost its keys, revoke it and invite it anew.
    """
    from fedward.server.members import open_members

    with open_members(CoordinatorFolder.load(folder)) as members:
        members.revoke(site, int(time.time()))
        new = members.roster()
    if json_output:
        names = [dataclasses.asdict(m)["name"] for m in new.members]
        typer.echo(json.dumps({"epoch": new.epoch, "members": names}, indent=2))
        return
    typer.echo(f"{site} is out; the roster has epoch {new.epoch} and {len(new.members)} members")


def _local(seconds: int) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M %Z}"
