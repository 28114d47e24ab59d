"""``fedward coordinator serve`` and ``fedward run …``."""

import contextlib
import datetime
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedward import typed_toml
from fedward.errors import ConfigurationError, RoundError
from fedward.plan import Plan, load_plan
from fedward.private_files import write_private
from fedward.server.coordinator_folder import CoordinatorFolder

coordinator_app = typer.Typer(no_args_is_help=True, help="The coordinator's side of a federation.")
run_app = typer.Typer(no_args_is_help=True, help="Start, watch and steer runs of a federation.")

_Folder = Annotated[
    Path,
    typer.Option("--coordinator", envvar="FEDWARD_COORDINATOR", help="The coordinator's folder."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
_Name = Annotated[str, typer.Argument(help="The run's name; fedward run list shows them.")]
_DEFAULT = Path("coordinator")


@coordinator_app.command()
def serve(folder: _Folder = _DEFAULT) -> None:
    """Answer sites and work through the runs, until interrupted.

    Starts the public port, the round engine and the control service, and starts each again if it
    dies. A killed coordinator goes on where it was when it is served again.
    """
    from fedward.server.serve import serve as serve_folder  # Flower's server is heavy
    from fedward.server.serve import stop_at_signals

    found = CoordinatorFolder.load(folder)
    logging.getLogger("fedward").setLevel(logging.INFO)
    address = found.config().address
    Console(stderr=True).print(f"serving {address}; stop with Ctrl-C", highlight=False)
    serve_folder(found, stop_at_signals())


@run_app.command()
def start(
    plan: Annotated[Path, typer.Argument(help="The plan (TOML).")],
    model: Annotated[
        Path | None, typer.Option(help="The base model's folder on this machine.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The run's name; left out: the plan's name and its hash.")
    ] = None,
    folder: _Folder = _DEFAULT,
    json_output: _Json = False,
) -> None:
    """Queue a run of a plan; the same again changes nothing.

    The plan is frozen with the digest of its base model, so that every site trains the same one.
    """
    from fedward.aggregation.rules import masked_bytes
    from fedward.server.control_client import open_control
    from fedward.server.fallback import fallback_job
    from fedward.server.gate import gate_records
    from fedward.server.registry import Registry
    from fedward.server.start import prepare_start  # loads the model
    from fedward.tuning.models import resolve_model

    frozen, adapter, layout = prepare_start(load_plan(plan), model)
    called = name or f"{frozen.name}-{frozen.hash().hex()[:8]}"
    found, base = CoordinatorFolder.load(folder), model or resolve_model(frozen.model)
    Registry(found.registry).keep_base(base, str(frozen.model.sha256))
    if frozen.fallback is not None:
        step = fallback_job(frozen, Path(frozen.fallback.job))
        write_private(found.fallback_job(frozen), typed_toml.dump(step).encode())
    if frozen.gate is not None:
        data = Path(frozen.gate.data)
        gate_records(frozen, data)  # raises unless every record fits
        write_private(found.gate_data(frozen), data.read_bytes())
    _show_asked(frozen, found)
    who = "each site that is asked" if frozen.rounds.participants else "each site"
    odd, even = masked_bytes(frozen, layout)
    Console(stderr=True).print(
        f"{who} sends {odd:,} bytes of masked words a round"
        + ("" if even == odd else f", and {even:,} in even rounds"),
        highlight=False,
    )
    if max(odd, even) >= (most := found.config().max_letter) << 20:
        raise ConfigurationError(
            f"coordinator.toml takes {most} MiB of a site: raise max_letter, and restart serve"
        )
    with open_control(found) as control:
        _show([control.start(called, frozen, adapter, layout)], json_output)


def _show_asked(plan: Plan, found: CoordinatorFolder) -> None:
    """Say how many sites a round asks, and what groups make of the set that one is hidden in.

    Raises:
        InvalidValue: There are too few sites for the plan's groups. For its participants the roster
            may still grow; a round is refused until it has.
    """
    from fedward.aggregation.groups import check_groups
    from fedward.server.members import open_members

    groups, asked, console = plan.cohort.groups, plan.rounds.participants, Console(stderr=True)
    with open_members(found) as members:
        there = len(members.roster().members)
    sites = asked or there
    if asked:
        wait = f"; it pauses until the roster has {asked}" if asked > there else ""
        text = f"each round asks {asked} of {there} sites, by a public draw{wait}"
        console.print(text, highlight=False)
    check_groups(plan.cohort, sites)
    if groups > 1:
        console.print(
            f"{sites} sites in {groups} groups of {sites // groups} or more: a site's update is "
            f"hidden among those of its group, at least {plan.cohort.minimum}, not among "
            "everybody's",
            highlight=False,
        )


@run_app.command("list")
def list_runs(folder: _Folder = _DEFAULT, json_output: _Json = False) -> None:
    """Every run with its state, oldest first."""
    from fedward.server.control_client import open_control

    with open_control(CoordinatorFolder.load(folder)) as control:
        runs = control.list()
    if json_output:
        typer.echo(json.dumps(runs, indent=2))
    else:
        _table(runs)


@run_app.command()
def show(name: _Name, folder: _Folder = _DEFAULT, json_output: _Json = False) -> None:
    """One run: its state, what it does now, who was asked or left out, what the gate refused."""
    _verb("Show", name, folder, json_output)


@run_app.command()
def pause(name: _Name, folder: _Folder = _DEFAULT, json_output: _Json = False) -> None:
    """Stop a run after the round that is open; it keeps everything."""
    _verb("Pause", name, folder, json_output)


@run_app.command()
def resume(name: _Name, folder: _Folder = _DEFAULT, json_output: _Json = False) -> None:
    """Go on with a paused run, in its place in the queue."""
    _verb("Resume", name, folder, json_output)


@run_app.command()
def abort(name: _Name, folder: _Folder = _DEFAULT, json_output: _Json = False) -> None:
    """Stop a run now and for good; committed rounds stay, and privacy spent stays spent."""
    _verb("Abort", name, folder, json_output)


@run_app.command()
def watch(name: _Name, folder: _Folder = _DEFAULT, json_output: _Json = False) -> None:
    """Follow a run from its beginning until it ends; Ctrl-C ends the watching only.

    Exit code 0: the run finished; 1: it was aborted.
    """
    from fedward.server.control_client import open_control

    with open_control(CoordinatorFolder.load(folder)) as control:
        with contextlib.suppress(KeyboardInterrupt):
            for event in control.watch(name):
                typer.echo(json.dumps(event) if json_output else _line(event))
        state = control.call("Show", name)["state"]
    if state == "aborted":
        raise RoundError(f"run {name!r} is {state}")


def _verb(verb: str, name: str, folder: Path, json_output: bool) -> None:
    from fedward.server.control_client import open_control

    with open_control(CoordinatorFolder.load(folder)) as control:
        _show([control.call(verb, name)], json_output)


def _show(runs: list[dict[str, Any]], json_output: bool) -> None:
    """One run in full."""
    (run,) = runs
    if json_output:
        typer.echo(json.dumps(run, indent=2))
        return
    grid = Table.grid(padding=(0, 2))
    for key, value in _facts(run):
        grid.add_row(key, escape(value))
    Console().print(grid)


def _facts(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "run", run["name"]
    yield "state", run["state"] + (f": {run['reason']}" if run["reason"] else "")
    if run["activity"]:
        yield "now", run["activity"]
    yield "rounds", f"{run['committed']} of {run['rounds']}"
    yield "plan", f"{run['plan']} ({run['plan_hash']})"
    if run["adapter"]:
        yield "adapter", run["adapter"]
    if run["asked"]:
        yield "asked", ", ".join(run["asked"])
    for line in run["left_out"]:
        yield "left out", line
    for line in run["refused"]:
        yield "refused", line
    changed = datetime.datetime.fromtimestamp(run["changed"], datetime.UTC)
    yield "since", f"{changed:%Y-%m-%d %H:%M:%S} UTC"


def _table(runs: list[dict[str, Any]]) -> None:
    table = Table("run", "state", "rounds", "now or why")
    for run in runs:
        rounds = f"{run['committed']} of {run['rounds']}"
        table.add_row(
            escape(run["name"]), run["state"], rounds, escape(run["activity"] or run["reason"])
        )
    Console().print(table)


def _line(event: Mapping[str, Any]) -> str:
    """One event as people read it."""
    facts = event["facts"] if isinstance(event["facts"], dict) else {}
    who = f" {event['site']}" if event["site"] else ""
    why = f" ({facts['reason']})" if "reason" in facts else ""
    if "sites" in facts:
        why = f" ({len(facts['sites'])} sites)"
    attempt = f" attempt {event['attempt']}" if event["attempt"] > 1 else ""
    return f"round {event['round']}{attempt}:{who} {event['phase']}{why}"
