"""``fedward site …``: membership, data and models, policy and approval."""

import dataclasses
import json
import sys
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedward.client.audit_cli import DEFAULT_SITE, JsonOption, SiteOption, audit_app, who
from fedward.client.daemon_cli import daemon_app
from fedward.client.operations_cli import operations_app
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.errors import ConfigurationError

if TYPE_CHECKING:
    from fedward.identity import Roster
    from fedward.plan import Plan

site_app = typer.Typer(no_args_is_help=True, help="A hospital's side of a federation.")
data_app = typer.Typer(no_args_is_help=True, help="The records that the site trains on.")
model_app = typer.Typer(no_args_is_help=True, help="Base models, by their digests.")
policy_app = typer.Typer(no_args_is_help=True, help="The site's own limits.")
site_app.add_typer(data_app, name="data")
site_app.add_typer(model_app, name="model")
site_app.add_typer(policy_app, name="policy")
site_app.add_typer(audit_app)
site_app.add_typer(daemon_app)
site_app.add_typer(operations_app)

_PlanArgument = Annotated[
    str,
    typer.Argument(
        metavar="PLAN",
        help="A plan's file, or the first digits of the hash of one that waits.",
        show_default=False,
    ),
]


@site_app.command()
def init(
    name: Annotated[str, typer.Option(help="The site's name in the roster.", show_default=False)],
    folder: Annotated[
        Path, typer.Argument(envvar="FEDWARD_SITE", help="The folder to make.")
    ] = DEFAULT_SITE,
    json_output: JsonOption = False,
) -> None:
    """Make the site's folder and its keys, which never leave it. Again, it changes nothing."""
    from fedward.identity import fingerprint
    from fedward.private_files import write_private

    made = SiteFolder.create(folder, SiteConfig(name=name))
    example = files("fedward.client").joinpath("policy.example.toml").read_bytes()
    write_private(made.root / "policy.example.toml", example)
    own = fingerprint(made.identity().public_key)
    if json_output:
        typer.echo(json.dumps({"folder": str(folder), "name": name, "fingerprint": own}, indent=2))
        return
    typer.echo(f"{folder}: site {name!r}, fingerprint {own}")
    typer.echo("next: fedward site enrol TOKEN, and a policy.toml (see policy.example.toml)")


@site_app.command()
def enrol(
    word: Annotated[
        str,
        typer.Argument(
            metavar="TOKEN",
            help="The token; - asks for it, or reads standard input (< FILE).",
        ),
    ] = "-",
    site: SiteOption = DEFAULT_SITE,
    json_output: JsonOption = False,
) -> None:
    """Become a member with a token of the coordinator's, and pin its roster.

    The token admits whoever has it first. As an argument, others on this machine see
    it while the command runs, and the shell remembers it: left out, it is asked for.

    Compare both fingerprints with the coordinator on the telephone before you go on.
    """
    from fedward.client.enrol import enrol as enrol_site
    from fedward.client.journal import journal_command
    from fedward.identity import fingerprint

    folder = SiteFolder.load(site)
    journal_command(folder, "enrols", {"who": who()})
    if word == "-":
        asked = sys.stdin.isatty()
        word = typer.prompt("token", hide_input=True) if asked else sys.stdin.read()
    roster = enrol_site(folder, word)
    own, theirs = (fingerprint(key) for key in (folder.identity().public_key, roster.coordinator))
    journal_command(folder, "enrolled", {"coordinator": theirs, "epoch": roster.epoch})
    if json_output:
        facts = {"epoch": roster.epoch, "site": own, "coordinator": theirs}
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"enrolled with {folder.config().address}; on the telephone compare")
    typer.echo(f"  this site    {own}")
    typer.echo(f"  coordinator  {theirs}")


@site_app.command()
def roster(
    site: SiteOption = DEFAULT_SITE,
    fetch: Annotated[bool, typer.Option("--fetch", help="Ask for a newer one first.")] = False,
    approve: Annotated[bool, typer.Option("--approve", help="Pin the one that waits.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Who takes part: the pinned roster, and a newer one that waits for approval."""
    from fedward.client import enrol as membership
    from fedward.client.journal import journal_command
    from fedward.client.policy import load_policy

    folder = SiteFolder.load(site)
    if fetch:
        automatic = folder.policy.exists() and load_policy(folder.policy).automatic_roster
        membership.offer_roster(folder, membership.fetch_roster(folder), automatic=automatic)
    if approve:
        waiting = membership.waiting_roster(folder)
        epoch = None if waiting is None else waiting.epoch
        journal_command(folder, "roster approved", {"who": who(), "epoch": epoch})
        membership.approve_roster(folder)
    pinned, waiting = membership.pinned_roster(folder), membership.waiting_roster(folder)
    if json_output:
        facts = {
            "pinned": _roster_facts(pinned),
            "waiting": None if waiting is None else _roster_facts(waiting),
        }
        typer.echo(json.dumps(facts, indent=2))
        return
    _show_roster(pinned, "pinned")
    if waiting is not None:
        _show_roster(waiting, "waiting: approve it with --approve")


@data_app.command("add")
def add_data(
    name: Annotated[str, typer.Argument(help="What to call it.", show_default=False)],
    path: Annotated[
        Path,
        typer.Argument(
            help="A file, or a folder with train and test: JSONL, CSV, Parquet.", show_default=False
        ),
    ],
    site: SiteOption = DEFAULT_SITE,
    map_: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="PLAN=OWN",
            help="A column that plans may read: their name and the file's, or one for both.",
        ),
    ] = None,
    unit: Annotated[
        str | None, typer.Option(help="The file's column that names the patient.")
    ] = None,
    unit_is_record: Annotated[
        bool,
        typer.Option("--unit-is-record", help="Protect each row by itself, not each patient."),
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Name a set of records, after a look at its columns and a count.

    Whom privacy protects has to be said: --unit, or else --unit-is-record. A plan
    reads no column but those of --map.
    """
    from fedward.client.data_sources import Columns, DataSource
    from fedward.client.journal import journal_command
    from fedward.client.site_records import add_source

    folder, names = SiteFolder.load(site), dict[str, str]()
    for text in map_ or ():
        plan_name, equals, own = text.partition("=")
        names[plan_name] = own if equals else plan_name
        if not (plan_name and names[plan_name]):
            raise ConfigurationError(f"--map {text}: expected PLAN=OWN, like --map text=note")
    if (unit is not None) == unit_is_record:
        raise ConfigurationError(
            "say whom privacy protects: --unit COLUMN, the column that names the patient, or else "
            "--unit-is-record, where no patient has two rows or rows alone are to be protected"
        )
    source = DataSource(
        path=str(path.resolve()),
        unit=unit,
        unit_is_record=unit_is_record,
        columns=Columns(names=names),
    )
    facts = add_source(folder, name, source)
    said = {"who": who(), "name": name, "source": source.hash().hex()}
    journal_command(folder, "data added", said)
    if json_output:
        typer.echo(json.dumps({"name": name, **dataclasses.asdict(facts)}, indent=2))
        return
    held_out = "" if facts.held_out is None else f", {facts.held_out} in its test file"
    typer.echo(f"{name}: {facts.rows} rows{held_out}; columns {', '.join(facts.columns)}")
    if facts.units is None:
        typer.echo("each row is protected by itself: the policy has to allow it with units")
    else:
        typer.echo(f"{facts.units} patients; {facts.without_unit} rows name none and are left out")
    if facts.unreadable:
        typer.echo(f"{facts.unreadable} rows cannot be read and are left out")
    if not names:
        typer.echo("no --map: no plan may read a column of it")
    typer.echo(f'next: datasets = ["{name}"] in policy.toml')


@data_app.command("list")
def list_data(site: SiteOption = DEFAULT_SITE, json_output: JsonOption = False) -> None:
    """Every data source."""
    from fedward.client.data_sources import load_source, source_names

    folder = SiteFolder.load(site)
    found = {name: load_source(folder, name) for name in source_names(folder)}
    if json_output:
        facts = {name: dataclasses.asdict(source) for name, source in found.items()}
        typer.echo(json.dumps(facts, indent=2))
        return
    for name, source in found.items():
        names = ", ".join(f"{plan}={own}" for plan, own in source.columns.names.items())
        typer.echo(f"{name}: {source.path}; unit {source.unit or 'each row'}; {names}")


@model_app.command("add")
def add_model(
    path: Annotated[Path, typer.Argument(help="The model's folder.", show_default=False)],
    site: SiteOption = DEFAULT_SITE,
    json_output: JsonOption = False,
) -> None:
    """Make a base model's folder known by its digest; the plan's path is never used here."""
    from fedward.client import data_sources
    from fedward.client.journal import journal_command

    folder = SiteFolder.load(site)
    digest = data_sources.add_model(folder, path)
    journal_command(folder, "model added", {"who": who(), "model": digest})
    if json_output:
        typer.echo(json.dumps({"model": digest}, indent=2))
        return
    typer.echo(f'{digest}\nnext: models = ["{digest}"] in policy.toml')


@policy_app.command("sign")
def sign_plan(
    plan: _PlanArgument,
    key: Annotated[
        Path, typer.Option(help="The signer's secret key; made on first use.", show_default=False)
    ],
    site: SiteOption = DEFAULT_SITE,
    json_output: JsonOption = False,
) -> None:
    """Sign a plan as one of a policy's signers, for example as a data-use board.

    First line: the signature, for approve --signature. Second: the public key, for signers.
    """
    from fedward.client.approval import find_plan, plan_signature
    from fedward.identity import Identity

    identity = Identity.load_or_create(key)
    signature = identity.sign(*plan_signature(find_plan(SiteFolder.load(site), plan))).hex()
    public_key = identity.public_key.hex()
    if json_output:
        typer.echo(json.dumps({"signature": signature, "public_key": public_key}, indent=2))
        return
    typer.echo(f"{signature}\n{public_key}")


@policy_app.command("check")
def check_policy(
    plan: _PlanArgument, site: SiteOption = DEFAULT_SITE, json_output: JsonOption = False
) -> None:
    """Say whether the policy allows a plan, with every reason against it; approves nothing.

    Exit code 0: allowed, once it is approved; 1: refused.
    """
    from fedward.client.approval import find_plan, source_reasons
    from fedward.client.policy import load_policy
    from fedward.errors import PolicyRefusal

    folder = SiteFolder.load(site)
    policy, found = load_policy(folder.policy), find_plan(folder, plan)
    reasons = list(policy.reasons(found))
    if len(policy.datasets) == 1:
        reasons += source_reasons(folder, found, policy, policy.datasets[0])
    if json_output:
        facts = {"plan": found.hash().hex(), "allowed": not reasons, "reasons": reasons}
        typer.echo(json.dumps(facts, indent=2))
        raise typer.Exit(1 if reasons else 0)
    if reasons:
        raise PolicyRefusal(reasons)
    typer.echo(f"plan {found.hash().hex()[:12]} ({found.name}) is within the policy")
    if not policy.automatic:
        typer.echo("it needs approval: fedward site approve")


@site_app.command()
def approve(
    plan: Annotated[
        str | None,
        typer.Argument(help="A plan's file or the first digits of its hash; none: list them."),
    ] = None,
    site: SiteOption = DEFAULT_SITE,
    data: Annotated[str | None, typer.Option(help="The data source to train on.")] = None,
    signature: Annotated[
        Path | None, typer.Option(help="File with a signer's signature over the plan, in hex.")
    ] = None,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take an approval back.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Approve a plan, exactly as it is, for the model, policy and data of today.

    A plan that came from the coordinator and waits is named by the first digits of its hash.
    """
    from fedward.client import approval
    from fedward.client.journal import journal_command

    folder = SiteFolder.load(site)
    if plan is None:
        _show_waiting(approval.waiting_plans(folder), json_output)
        return
    if withdraw:
        journal_command(folder, "approval withdrawn", {"who": who(), "plan": plan})
        approval.withdraw(folder, plan)
        typer.echo(json.dumps({"withdrawn": plan}) if json_output else f"{plan} is withdrawn")
        return
    made = approval.approve(
        folder,
        approval.find_plan(folder, plan),
        who=who(),
        now=datetime.now().astimezone(),
        dataset=data,
        signature=None if signature is None else _hex_file(signature),
    )
    if json_output:
        typer.echo(json.dumps(dataclasses.asdict(made), indent=2))
        return
    typer.echo(f"plan {made.plan[:12]} is approved for data {made.dataset!r} by {made.who}")


def _show_waiting(plans: "list[Plan]", json_output: bool) -> None:
    if json_output:
        typer.echo(json.dumps([json.loads(plan.to_json()) for plan in plans], indent=2))
    for plan in () if json_output else plans:
        typer.echo(f"{plan.hash().hex()[:12]}  {plan.name}  epsilon {plan.privacy.epsilon:g}")
    if not plans and not json_output:
        typer.echo("no plan waits for approval")


def _roster_facts(roster: "Roster") -> dict[str, object]:
    from fedward.identity import fingerprint

    sites = [
        {"id": m.id, "name": m.name, "fingerprint": fingerprint(m.public_key)}
        for m in roster.members
    ]
    return {
        "epoch": roster.epoch,
        "coordinator": fingerprint(roster.coordinator),
        "sites": sites,
    }


def _show_roster(roster: "Roster", title: str) -> None:
    from fedward.identity import fingerprint

    typer.echo(f"{title}: epoch {roster.epoch}, coordinator {fingerprint(roster.coordinator)}")
    table = Table("id", "site", "fingerprint")
    for member in roster.members:
        table.add_row(str(member.id), member.name, fingerprint(member.public_key))
    Console(width=100, highlight=False).print(table)


def _hex_file(path: Path) -> bytes:
    try:
        return bytes.fromhex(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: expected a signature in hex") from error
