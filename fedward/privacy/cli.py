"""``fedward privacy COMMAND``."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

privacy_app = typer.Typer(
    no_args_is_help=True,
    help="Plan what privacy costs, and test by attack that it is kept.",
)


@privacy_app.command()
def plan(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PLAN]",
            help="The plan (TOML); options replace its values. Left out: options say it all.",
            show_default=False,
        ),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="What noise keeps to this epsilon?", show_default=False)
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(help="What epsilon does this noise multiplier give?", show_default=False),
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Delta.", show_default=False)] = None,
    rate: Annotated[
        float | None, typer.Option(help="Sampling rate of every unit.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Local steps a round.", show_default=False)
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds that must complete.", show_default=False)
    ] = None,
    spare: Annotated[
        int | None, typer.Option(help="Rounds that may be repeated. [2]", show_default=False)
    ] = None,
    units: Annotated[
        int | None,
        typer.Option(help="Patients at a site: what a step draws there.", show_default=False),
    ] = None,
    records: Annotated[
        int | None,
        typer.Option(
            help="Cost for a patient with so many records, were each its own unit.",
            show_default=False,
        ),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            help="A site's folder: what its ledger has spent, promised and left.",
            show_default=False,
        ),
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(help="A ledger's file instead, with --key.", show_default=False),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="The key that signed --ledger.", show_default=False)
    ] = None,
    cap: Annotated[
        float | None,
        typer.Option(
            help="Lifetime epsilon of --ledger. Left out: the asked one.", show_default=False
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw epsilon over rounds and over the noise (PNG).", show_default=False),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the answer as JSON and nothing else.")
    ] = False,
) -> None:
    """Tell what noise an epsilon needs, what epsilon a noise gives, and what a site has left."""
    from fedward.plan import load_plan  # opacus, below, is heavy
    from fedward.privacy import planning
    from fedward.privacy.planning_view import render_answer, render_site, save_plot

    given = {
        "epsilon": epsilon,
        "sigma": sigma,
        "delta": delta,
        "sampling_rate": rate,
        "steps": steps,
        "rounds": rounds,
        "spare": spare,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    question = planning.ask(None if path is None else load_plan(path), asked)
    books = planning.books_at(site, ledger, key, cap=cap, question=question)
    found = planning.answer(question, units=units, records=records, books=books)
    if plot is not None:
        save_plot(found, plot)
    if json_output:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    console = Console()
    console.print(render_answer(found))
    if found.site is not None:
        console.print(render_site(found.site))
    for warning in found.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)
