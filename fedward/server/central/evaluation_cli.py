"""``fedward evaluate``, ``fedward compare`` and ``fedward chat``."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedward.errors import ConfigurationError, InvalidValue

if TYPE_CHECKING:
    from fedward.server.central.scoring import Asked

_Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
_Data = Annotated[Path, typer.Option(help="Held-out records: JSONL, CSV or Parquet.")]
_Out = Annotated[Path | None, typer.Option(help="A folder for what was found.")]
_Map = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="NAME=OWN", help="A column's name here, and the file's own."),
]
_Unit = Annotated[
    str | None,
    typer.Option(help="A column whose rows belong together, as a patient's; left out: each row."),
]
_Reward = Annotated[
    Path | None,
    typer.Option(
        help="A job by whose reward rule (pattern or column) the model's answers are scored."
    ),
]
_Generate = Annotated[
    bool,
    typer.Option("--generate/--no-generate", help="Whether a language model answers each prompt."),
]
_BatchSize = Annotated[int, typer.Option(help="Rows at a time.", min=1)]
_Tokens = Annotated[int, typer.Option(help="Longest continuation.", min=1)]


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A trained model's folder, or registry:NAME:NUMBER.")
    ],
    data: Annotated[
        Path | None, typer.Option(help="Held-out records: JSONL, CSV or Parquet.")
    ] = None,
    out: _Out = None,
    map_: _Map = None,
    unit: _Unit = None,
    reward: _Reward = None,
    generate: _Generate = True,
    batch_size: _BatchSize = 16,
    max_new_tokens: _Tokens = 128,
    harness: Annotated[
        str | None,
        typer.Option(help="Instead of --data: a task of lm-evaluation-harness, in --tasks."),
    ] = None,
    tasks: Annotated[
        Path, typer.Option(help="A folder of such tasks; what it says is run as code.")
    ] = Path("tasks"),
    json_output: _Json = False,
) -> None:
    """Say how good a trained model is on records that it never saw, with 95 % intervals.

    What is measured follows from the model and the columns: a classifier's accuracy,
    precision, recall, F1 and confusion matrix; a reward model's preference accuracy,
    margin and rank correlation; a language model's bits per byte, perplexity and ROUGE,
    which of two answers it finds likelier, and its reward under a job's rule.
    """
    if (data is None) is (harness is None):
        raise ConfigurationError("expected --data FILE, or --harness TASK with --tasks FOLDER")
    if data is None:
        _harness(model, str(harness), tasks, out, batch_size, json_output)
        return
    asked = _asked(data, map_, unit, reward, generate, batch_size, max_new_tokens)
    from fedward.server.central.evaluating import document, evaluate_model, tables, write_evaluation
    from fedward.server.central.opening import open_model

    console = Console(stderr=json_output, quiet=json_output)
    opened = open_model(model)
    evaluation = evaluate_model(opened, asked, console)
    written = document(opened, asked, evaluation)
    if out is not None:
        write_evaluation(out, written, evaluation)
    if json_output:
        typer.echo(json.dumps(written, indent=2))
        return
    for table in tables(evaluation):
        console.print(table)
    console.print(f"{written['rows']} rows, {written['units']} units", highlight=False)
    if evaluation.scores.cut:
        console.print(f"{evaluation.scores.cut} inputs were too long for the model and were cut")


def _harness(
    model: str, task: str, folder: Path, out: Path | None, batch_size: int, json_output: bool
) -> None:
    if find_spec("lm_eval") is None:
        raise ConfigurationError("--harness needs pip install 'fedward[harness]'")
    from fedward.server.central.harness import run_harness
    from fedward.server.central.opening import open_model

    found = run_harness(open_model(model), task, folder, batch_size=batch_size)
    text = json.dumps({"model": model, **found}, indent=2)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "harness.json").write_text(text + "\n", encoding="utf-8")
    if json_output:
        typer.echo(text)
        return
    table = Table("figure", "value", "standard error", title=f"{task}, {found['rows']} rows")
    for name, each in found["figures"].items():
        table.add_row(name, f"{each['value']:.4g}", f"{each.get('error', float('nan')):.2g}")
    Console().print(table)


def compare(
    first: Annotated[
        str, typer.Argument(help="A trained model's folder, or registry:NAME:NUMBER.")
    ],
    second: Annotated[str, typer.Argument(help="Another's, of the same kind.")],
    data: _Data,
    by: Annotated[
        str | None,
        typer.Option(help="The figure that decides; left out: the first that evaluate shows."),
    ] = None,
    out: _Out = None,
    map_: _Map = None,
    unit: _Unit = None,
    reward: _Reward = None,
    generate: _Generate = True,
    batch_size: _BatchSize = 16,
    max_new_tokens: _Tokens = 128,
    json_output: _Json = False,
) -> None:
    """Say which of two models is better, by how much, or that no difference is shown.

    Both answer the same records. One figure decides: by McNemar's exact test where it is
    a share of rows, else by a paired randomisation test over units. Models that are alike
    are called different in 5 % of cases at most.
    """
    asked = _asked(data, map_, unit, reward, generate, batch_size, max_new_tokens)
    from fedward.server.central.comparing import (
        compare_models,
        comparison_document,
        comparison_table,
    )
    from fedward.server.central.opening import open_model

    console = Console(stderr=json_output, quiet=json_output)
    one, other = open_model(first), open_model(second)
    comparison = compare_models(one, other, asked, console, decides=by)
    written = comparison_document(comparison, one, other, asked)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (out / "comparison.json").write_text(text, encoding="utf-8")
    if json_output:
        typer.echo(json.dumps(written, indent=2))
        return
    console.print(comparison_table(comparison, first, second))
    console.print(written["verdict"], highlight=False)


def chat(
    model: Annotated[
        str, typer.Argument(help="A language model's folder, or registry:NAME:NUMBER.")
    ],
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    temperature: Annotated[
        float, typer.Option(help="0: always the likeliest word; more: more varied.", min=0.0)
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of varied answers, to have them again.")] = None,
) -> None:
    """Talk to a trained language model in the terminal.

    It speaks through its tokenizer's chat template; a model without one goes on with what
    you write. /reset forgets what was said, /quit leaves, Ctrl-C stops an answer.
    """
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar

    from fedward.server.central.chatting import Conversation, Manner, talk
    from fedward.server.central.opening import open_model

    disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs
    if seed is not None:
        set_seed(seed)
    manner = Manner(system=system, max_new_tokens=max_new_tokens, temperature=temperature)
    conversation = Conversation(opened=open_model(model), manner=manner)

    def read() -> str | None:
        try:
            return input("> ")
        except EOFError:
            return None

    talk(conversation, read, lambda piece: typer.echo(piece, nl=False))


def _asked(
    data: Path,
    map_: list[str] | None,
    unit: str | None,
    reward: Path | None,
    generate: bool,
    batch_size: int,
    max_new_tokens: int,
) -> "Asked":
    """The options of both commands, checked; what is heavy is imported here."""
    if find_spec("rouge_score") is None:
        raise ConfigurationError("this needs rouge-score: pip install 'fedward[central]'")
    from transformers.utils.logging import disable_progress_bar

    from fedward.server.central.job import Reward, load_job
    from fedward.server.central.scoring import Asked

    disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs; ours shows the rows
    columns = dict[str, str]()
    for pair in map_ or ():
        name, equals, own = pair.partition("=")
        if not (name and equals and own):
            raise InvalidValue("--map", pair, "NAME=OWN")
        columns[name] = own
    rule: Reward | None = None
    if reward is not None:
        rules = [step.reward for step in load_job(reward).steps if step.reward is not None]
        if not rules or rules[-1].path is not None:
            raise ConfigurationError(f"{reward}: no [reward] with a pattern or a column")
        rule = rules[-1]
        generate = True
    return Asked(
        data=data,
        columns=columns,
        unit=unit,
        reward=rule,
        generate=generate,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
