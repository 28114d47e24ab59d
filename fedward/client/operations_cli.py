"""``fedward site`` train-service, doctor, status, dry-run, pause, resume, close, forget, leave."""

import contextlib
import dataclasses
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedward.client.audit_cli import DEFAULT_SITE, JsonOption, SiteOption, who
from fedward.client.sandbox import confine
from fedward.client.site_folder import SiteFolder
from fedward.errors import ConfigurationError

operations_app = typer.Typer()

_Run = Annotated[str, typer.Argument(help="The run's name, as approvals and the journal have it.")]
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


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


@operations_app.command()
def doctor(site: SiteOption = DEFAULT_SITE, json_output: JsonOption = False) -> None:
    """Look at everything that can keep the site from training, and say what to do about it.

    It connects to the coordinator, reads the records, hashes the models and verifies the ledger; it
    changes nothing. Exit code 0: nothing failed; 1: something did.
    """
    from fedward.client.doctor import examine

    console, failed, shown = Console(highlight=False, soft_wrap=True), False, []
    for finding in examine(SiteFolder.load(site)):
        failed = failed or finding.verdict == "fail"
        shown.append(dataclasses.asdict(finding))
        if not json_output:
            colour = _COLOURS[finding.verdict]
            mark = f"[{colour}]{finding.verdict:4}[/{colour}]"
            console.print(f"{mark}  {finding.check:14}  {escape(finding.says)}")
            if finding.do:
                console.print(f"{'':22}→ {escape(finding.do)}")
    if json_output:
        typer.echo(json.dumps(shown, indent=2))
    raise typer.Exit(1 if failed else 0)


@operations_app.command()
def status(site: SiteOption = DEFAULT_SITE, json_output: JsonOption = False) -> None:
    """What the site is doing, and what its patients have spent.

    Nothing is shown as running without a sign of life in the last 20 seconds. Exit code 0: it
    runs; 1: it does not.
    """
    from fedward.client.status import site_status

    found = site_status(SiteFolder.load(site))
    if json_output:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        age = "" if found.silent_seconds is None else f", heard {found.silent_seconds:.0f} s ago"
        connected = "connected" if found.connected else "not connected"
        paused = "; paused" if found.paused else ""
        typer.echo(f"{found.site}: {found.state}{age}; {connected}{paused}")
        if found.training:
            typer.echo(f"training: step {found.step}")
        cap = "no policy" if found.max_epsilon is None else f"of {found.max_epsilon:g}"
        typer.echo(f"epsilon {found.epsilon_spent:.3f} {cap}; {found.rounds_sent} rounds sent")
        if found.disk:
            typer.echo(f"disk: {found.disk}; nothing is trained that cannot be recorded")
    raise typer.Exit(0 if found.state == "running" else 1)


@operations_app.command("dry-run")
def dry_run(
    plan: Annotated[
        str,
        typer.Argument(help="A plan's file, or the first digits of the hash of one that waits."),
    ],
    site: SiteOption = DEFAULT_SITE,
    data: Annotated[
        str | None, typer.Option(help="The data source; left out, the approval's or the only one.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Train one round of a plan on the site's data and throw it away: what would it cost?

    Says the bytes that would leave, the epsilon, the memory and the time. Nothing is sent, this
    process can open no connection, and the ledger does not change.
    """
    folder = SiteFolder.load(site)
    confine(folder.cache)
    from fedward.client.approval import dataset_of, find_plan
    from fedward.client.dry_run import dry_run as try_round

    found = find_plan(folder, plan)
    ran = try_round(folder, found, data or dataset_of(folder, found))
    if json_output:
        typer.echo(json.dumps(dataclasses.asdict(ran), indent=2))
        return
    gpu = "" if ran.gpu_memory_bytes is None else f", {ran.gpu_memory_bytes / 2**30:.2f} GiB on GPU"
    for line in (
        f"plan {ran.plan[:12]} on {ran.dataset}: one round, thrown away",
        f"would leave   {ran.bytes_out:,} bytes a round, {ran.update_bytes:,} of them the update",
        f"epsilon       {ran.epsilon_round:.3f} for a round, {ran.epsilon_run:.3f} for all "
        f"{ran.rounds}, at delta {ran.delta:g}",
        f"ledger        admits {ran.rounds_left} of {ran.rounds} rounds now",
        f"time          {ran.load_seconds:.1f} s to load, {ran.round_seconds:.1f} s a round",
        f"memory        {ran.memory_bytes / 2**30:.2f} GiB{gpu}",
        *(f"refused       {reason}" for reason in ran.refused),
    ):
        typer.echo(line)


@operations_app.command()
def pause(site: SiteOption = DEFAULT_SITE, json_output: JsonOption = False) -> None:
    """Take no new round until resumed; one in hand is finished. Again, it changes nothing.

    The site stays connected and a member; the coordinator is told refused-policy and no reason.
    """
    _set_paused(SiteFolder.load(site), True, json_output)


@operations_app.command()
def resume(site: SiteOption = DEFAULT_SITE, json_output: JsonOption = False) -> None:
    """Take rounds again after a pause. Again, it changes nothing."""
    _set_paused(SiteFolder.load(site), False, json_output)


def _set_paused(folder: SiteFolder, paused: bool, json_output: bool) -> None:
    from fedward.client.journal import journal_command
    from fedward.private_files import write_private

    if folder.paused.exists() != paused:
        journal_command(folder, "paused" if paused else "resumed", {"who": who()})
        if paused:
            write_private(folder.paused, b"")
        else:
            folder.paused.unlink()
    said = "takes no new round" if paused else "takes rounds"
    typer.echo(json.dumps({"paused": paused}) if json_output else f"{folder.root}: {said}")


@operations_app.command()
def close(run: _Run, site: SiteOption = DEFAULT_SITE, json_output: JsonOption = False) -> None:
    """End a run here: what the ledger has booked for it and not spent is free for other runs.

    Stop the daemon first. For runs that are over, or that the site leaves: it refuses to go on with
    them from then on. What was spent stays spent.
    """
    from fedward.client.journal import journal_command
    from fedward.client.policy import load_policy
    from fedward.privacy.ledger import Ledger

    folder = SiteFolder.load(site)
    policy, unknown = load_policy(folder.policy), f"the ledger knows no run {run!r}"
    if not folder.ledger.exists():
        raise ConfigurationError(unknown)
    ledger = Ledger.open(
        folder.ledger, folder.identity(), epsilon=policy.max_epsilon, delta=policy.delta
    )
    with contextlib.closing(ledger):
        if run not in ledger.runs:
            raise ConfigurationError(f"{unknown}; it knows {', '.join(ledger.runs) or 'none'}")
        journal_command(folder, "closes", {"who": who(), "run": run})
        ledger.release(run)
        free = ledger.remaining(run)
        ledger.close_run(run)
        facts = {"run": run, "spent": ledger.spent(run), "freed": free}
    words = f"{run}: closed; {facts['spent']} rounds spent, {free} free for other runs"
    typer.echo(json.dumps(facts) if json_output else words)


@operations_app.command()
def forget(
    run: _Run,
    site: SiteOption = DEFAULT_SITE,
    json_output: JsonOption = False,
) -> None:
    """Delete what the site keeps of a run for itself: personal parts, SCAFFOLD's control variate.

    For runs that are over. One that goes on begins anew with them; ledger and journal keep what was
    spent.
    """
    from fedward.client.journal import journal_command
    from fedward.client.personal import PersonalParts

    folder = SiteFolder.load(site)
    journal_command(folder, "forgets", {"who": who(), "run": run})
    files = PersonalParts(folder.personal).forget(run)
    facts = {"run": run, "files": files}
    typer.echo(json.dumps(facts) if json_output else f"{run}: {files} files deleted")


@operations_app.command()
def leave(
    site: SiteOption = DEFAULT_SITE,
    untold: Annotated[
        bool, typer.Option("--untold", help="Do not tell the coordinator: it is gone for good.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Leave the federation: tell the coordinator, and forget its roster, keys and approvals.

    Stop the daemon first. Keys, ledger, journal, policy, data and models stay: privacy that was
    spent stays spent, also if the site takes part elsewhere or comes back with a new token.
    """
    from fedward.client.enrol import leave as leave_federation
    from fedward.client.journal import journal_command

    folder = SiteFolder.load(site)
    address = folder.config().address
    journal_command(folder, "leaves", {"who": who(), "address": address, "told": not untold})
    leave_federation(folder, tell=not untold)
    journal_command(folder, "left", {"address": address})
    facts = {"left": address, "told": not untold}
    typer.echo(json.dumps(facts) if json_output else f"{folder.root}: has left {address}")
