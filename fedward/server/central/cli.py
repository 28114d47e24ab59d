"""``fedward train`` and ``fedward predict``."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedward.errors import ConfigurationError

_Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def train(
    job: Annotated[Path | None, typer.Argument(help="The job (TOML).")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where models go; left out: out/NAME of the job.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the job in --out where it stopped.")
    ] = False,
    registry: Annotated[
        Path | None,
        typer.Option(
            envvar="FEDWARD_REGISTRY",
            help="Where the models are registered; left out: registry beside --out.",
        ),
    ] = None,
    search: Annotated[
        Path | None,
        typer.Option(help="A space (TOML): try many values of the job's keys, keep the best."),
    ] = None,
    tuners: Annotated[
        bool, typer.Option("--tuners", help="Show stages, tuners and what goes together.")
    ] = False,
    json_output: _Json = False,
) -> None:
    """Train centrally, on data that the coordinator may use.

    A job names a stage (sft, classify, reward, dpo, kto, orpo, grpo, rloo, ppo, distill),
    a tuner and the data. It may have several steps that start from what earlier ones made.
    A model's path may be registry:NAME:NUMBER, and what is trained ends in the registry.
    Interrupt at any time and go on with --resume, to the same weights. Start it by
    torchrun to use several GPUs.
    """
    from datasets.utils.logging import disable_progress_bar as no_bars_of_datasets
    from transformers.utils.logging import disable_progress_bar  # heavy, like torch and TRL

    from fedward.server.central.data import columns_table
    from fedward.server.central.job import load_job
    from fedward.server.central.validity import tuners_table

    if tuners:
        typer.echo(f"{columns_table()}\n{tuners_table()}", nl=False)
        return
    if job is None:
        raise ConfigurationError("name a JOB, a TOML file; --tuners shows what it may say")
    disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs; ours shows the whole job
    no_bars_of_datasets()
    for module in ("trl", "matplotlib"):
        if find_spec(module) is None:
            raise ConfigurationError(f"this needs {module}: pip install 'fedward[central]'")
    if search is not None:
        _search(job, search, out, resume=resume, json_output=json_output)
        return
    from accelerate import PartialState

    from fedward.server.central.curves import write_curves
    from fedward.server.central.running import run_job
    from fedward.server.registry import Registry

    read = load_job(job)
    console = Console(stderr=json_output, quiet=json_output)
    place = out or Path("out") / read.name
    kept = Registry(registry or place.parent / "registry")
    reports = run_job(read, place, console, resume=resume, registry=kept)
    if PartialState().is_main_process:
        write_curves(place, [step.name for step in read.steps])
    if json_output:
        typer.echo(json.dumps(reports, indent=2))
        return
    table = Table("step", "stage", "tuner", "steps", "seconds", "loss", "model", "version")
    for step in reports:
        shown = [step[key] for key in ("name", "stage", "tuner", "steps", "seconds")]
        end = [step.get(key, "") for key in ("model", "version")]
        loss = step["training_loss"]  # a merge has none
        table.add_row(*map(str, shown), "" if loss is None else f"{loss:.4f}", *end)
    console.print(table)


def _search(job: Path, space: Path, out: Path | None, *, resume: bool, json_output: bool) -> None:
    from fedward.server.central.searching import BEST, search, trials_table

    place = out or Path("out") / f"{job.stem}-search"
    console = Console(stderr=json_output, quiet=json_output)
    found = search(job, space, place, console, resume=resume)
    if json_output:
        typer.echo(json.dumps(found, indent=2))
        return
    console.print(trials_table(found))
    console.print(f"fedward train {place / BEST} trains with the best", highlight=False)


def predict(
    model: Annotated[Path, typer.Argument(help="A trained model's folder.")],
    data: Annotated[Path, typer.Option(help="Records: JSONL, CSV or Parquet.")],
    out: Annotated[Path, typer.Option(help="The file to make, as JSON lines.")],
    column: Annotated[
        str | None, typer.Option(help="What the model reads; left out: prompt, text or messages.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.", min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation.", min=1)] = 128,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last rows that were written.")
    ] = False,
    json_output: _Json = False,
) -> None:
    """Write what a trained model says of every record, in the column 'prediction'.

    A language model goes on with the text, a reward model gives a number, a classifier a label.
    """
    from transformers.utils.logging import disable_progress_bar

    from fedward.server.central.predicting import predict as run
    from fedward.server.registry import model_folder

    disable_progress_bar()  # type: ignore[no-untyped-call]  # as above
    console = Console(stderr=json_output, quiet=json_output)
    rows = run(
        model_folder(str(model)),
        data,
        out,
        console,
        column=column,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        resume=resume,
    )
    if json_output:
        typer.echo(json.dumps({"rows": rows, "out": str(out)}))
    else:
        console.print(f"{rows} rows in {out}", highlight=False)
