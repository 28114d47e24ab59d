"""The command line: ``fedward COMMAND``; each command's help is its manual."""

import json
import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.console import Console
from rich.markup import escape

from fedward import __version__, failpoints
from fedward.client.cli import site_app
from fedward.client.safe_logs import keep_records_out_of_logs
from fedward.errors import ConfigurationError, FedwardError
from fedward.privacy.cli import privacy_app
from fedward.server.central.cli import predict, train
from fedward.server.central.evaluation_cli import chat, compare, evaluate
from fedward.server.cli import coordinator_app, run_app
from fedward.server.members_cli import members_app
from fedward.server.models_cli import models_app
from fedward.simulations.audit_cli import audit

_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hospitals fine-tune one language model together: private adapters, secure sums.",
    epilog="Exit codes: 0 done, 1 the run failed, 2 wrong input, 130 interrupted.",
)
coordinator_app.add_typer(members_app)
app.add_typer(coordinator_app, name="coordinator")
app.add_typer(run_app, name="run")
app.add_typer(site_app, name="site")
app.add_typer(models_app, name="models")
app.add_typer(privacy_app, name="privacy")
privacy_app.command()(audit)
app.command()(train)
app.command()(predict)
app.command()(evaluate)
app.command()(compare)
app.command()(chat)


class Engine(StrEnum):
    """How a simulation spreads its sites."""

    INPROCESS = "inprocess"
    RAY = "ray"


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Show the version, or go on to the command."""
    if version:
        typer.echo(f"fedward {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def simulate(
    plan: Annotated[
        Path | None,
        typer.Argument(help="The plan (TOML). Left out: the built-in demo."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A file, or a folder with train and test, as JSONL, CSV or Parquet."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="The base model's folder; replaces the plan's path.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where run, report.json and report.html go.")] = Path(
        "out/simulation"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out where it stopped.")
    ] = False,
    engine: Annotated[
        Engine, typer.Option(help="Train in this process, or spread the trainers with Ray.")
    ] = Engine.INPROCESS,
    workers: Annotated[int, typer.Option(help="Trainers at a time with --engine ray.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the demo's data and adapter.", min=0)] = 0,
    registry: Annotated[
        Path | None,
        typer.Option(
            envvar="FEDWARD_REGISTRY",
            help="Where the adapter is registered; left out: registry beside --out.",
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare/--federated-only",
            help="Also train each hospital alone, centrally, and a classical baseline.",
        ),
    ] = True,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print report.json and nothing else.")
    ] = False,
    faults: Annotated[
        int | None,
        typer.Option(
            help="Instead of all that: four tiny sites on virtual time, with the faults of this "
            "seed; prints what broke, what came of it, and whether every invariant held.",
            metavar="SEED",
            min=0,
        ),
    ] = None,
) -> None:
    """Run a whole private federation on this machine and compare it with its alternatives.

    Every site trains with differential privacy; only the secure sum of updates reaches the
    coordinator. Interrupt at any time and go on with --resume.
    """
    if faults is not None:
        _show_faults(faults)
        return
    from transformers.utils.logging import disable_progress_bar  # heavy, like torch and Flower

    from fedward.simulations.case import Options
    from fedward.simulations.simulate import run_simulation

    disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs; ours shows the whole run
    console = Console(stderr=json_output, quiet=json_output)
    options = Options(
        plan=plan,
        data=data,
        model=model,
        out=out,
        resume=resume,
        ray_workers=workers if engine is Engine.RAY else 0,
        seed=seed,
        compare=compare,
        registry=registry,
    )
    report = run_simulation(options, console)
    if json_output:
        typer.echo(json.dumps(report, indent=2))


def _show_faults(seed: int) -> None:
    from fedward.simulations.faults.laboratory import run_seed

    outcome = run_seed(seed)
    typer.echo(outcome.transcript())
    if outcome.violations:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; every expected error becomes one message and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if sys.argv[1:2] == ["site"]:
        keep_records_out_of_logs()
    hook = sys.excepthook
    try:
        failpoints.arm_from(os.environ)
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # typer's own answer to Ctrl-C
            _fail("interrupted; the same command with --resume goes on from here", _INTERRUPTED)
        sys.exit(code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except ConfigurationError as error:
        _fail(str(error), 2)
    except FedwardError as error:
        _fail(str(error), 1)
    finally:
        sys.excepthook = hook  # typer puts one of its own there, which prints every message


def _fail(message: str, code: int) -> None:
    line = f"[red]error:[/red] {escape(message)}"
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)
    sys.exit(code)
