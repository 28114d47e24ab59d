"""The command ``fedward privacy audit``; what is heavy is imported when it runs."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def audit(
    plan: Annotated[Path, typer.Argument(help="The plan (TOML).")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Put canaries among these records and train the plan's own model. "
            "Left out: a tiny model and random records."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where audit.json and audit.html go.")] = Path(
        "out/audit"
    ),
    confidence: Annotated[
        float, typer.Option(help="Probability with which each lower bound holds.")
    ] = 0.95,
    canaries: Annotated[int, typer.Option(help="Records planted in one training.", min=20)] = 400,
    releases: Annotated[int, typer.Option(help="Steps that are attacked.", min=40)] = 2000,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Rounds trained with canaries. Left out: the plan's; on a tiny model those of "
            "the first 100 steps.",
            min=1,
        ),
    ] = None,
    attacks: Annotated[
        bool,
        typer.Option(
            "--attacks",
            help="Also infer members and read words out of updates, on the demo's model and notes, "
            "with the plan's privacy and without.",
        ),
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print audit.json and nothing else.")
    ] = False,
) -> None:
    """Try by attack whether the engine keeps what a plan promises.

    Three layers: how far one unit moves a sum before noise, what an attack on single
    steps proves of epsilon, and how well canaries are found in one whole training. It
    can refute the promise, with exit code 1; it cannot prove it.
    """
    from transformers.utils.logging import disable_progress_bar  # heavy, like torch

    from fedward.simulations.audit import AuditOptions, run_audit

    disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs; ours shows the whole audit
    options = AuditOptions(
        plan=plan,
        data=data,
        out=out,
        confidence=confidence,
        canaries=canaries,
        releases=releases,
        rounds=rounds,
        attacks=attacks,
    )
    document = run_audit(options, Console(stderr=json_output, quiet=json_output))
    if json_output:
        typer.echo(json.dumps(document, indent=2))
