"""A trained model on a file of records: batched, and resumed where it was interrupted."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from fedward.errors import ConfigurationError, DataError
from fedward.server.central.data import file_digest, is_talk, whole_rows
from fedward.server.central.inputs import Talk, closed_ids, open_ids
from fedward.server.central.loading import identity, open_trained
from fedward.server.central.manifest import Kind
from fedward.tuning.records import check_column, read_table

RESULT = "prediction"
"""The column that is added."""

_USUAL = ("prompt", "text", "messages")


def predict(
    model: Path,
    data: Path,
    out: Path,
    console: Console,
    *,
    column: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    resume: bool = False,
) -> int:
    """Write every row with what the model says of it, as JSON lines.

    A language model goes on with the row's text (greedily; messages through its chat template), a
    reward model gives a number, a classifier a label.

    Args:
        model: The ``model`` folder of a job, or a whole model.
        data: JSONL, CSV or Parquet.
        out: Made when all rows are done; before, they are in ``OUT.partial``.
        console: Where progress is shown.
        column: What the model reads; left out: prompt, text or messages, whichever is first there.
        batch_size: Rows at a time, 1 or more.
        max_new_tokens: Longest continuation, 1 or more.
        resume: Go on after the last whole batch of ``OUT.partial``.

    Returns:
        How many rows there are.

    Raises:
        ConfigurationError: ``out`` is there, or its part is of other data, model or settings.
        DataError: Records that cannot be read, or without the column.
        ModelError: A model that cannot be loaded.
    """
    table = read_table(data)
    found = column or next((name for name in _USUAL if name in table.columns), _USUAL[0])
    check_column(found, table.columns, data)
    rows = list(whole_rows(table.rows, data))
    partial, facts = out.with_name(out.name + ".partial"), out.with_name(out.name + ".from")
    settings = [file_digest(data), identity(model), found, batch_size, max_new_tokens]
    done = _done(out, partial, facts, settings, batch_size, resume=resume)
    loaded, tokenizer, kind = open_trained(model)
    loaded.eval()
    with Progress(console=console) as progress, partial.open("a", encoding="utf-8") as file:
        task = progress.add_task("predict", total=len(rows), completed=done)
        for first in range(done, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            inputs = [_input(row.get(found), tokenizer, kind, place) for row, place in batch]
            said = say(loaded, tokenizer, kind, inputs, max_new_tokens)
            for (row, _), result in zip(batch, said, strict=True):
                file.write(json.dumps({**row, RESULT: result}, ensure_ascii=False) + "\n")
            file.flush()
            progress.update(task, advance=len(batch))
    partial.replace(out)
    facts.unlink()
    return len(rows)


def _done(
    out: Path,
    partial: Path,
    facts: Path,
    settings: Sequence[Any],
    batch_size: int,
    *,
    resume: bool,
) -> int:
    """How many rows of the part are whole batches; what is after them is cut off."""
    if out.exists():
        raise ConfigurationError(f"{out} is there already: name another --out")
    if not partial.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        facts.write_text(json.dumps(settings), encoding="utf-8")
        partial.touch()
        return 0
    if not resume:
        raise ConfigurationError(f"{partial} is there: use --resume, or remove it")
    if not facts.exists() or json.loads(facts.read_bytes()) != list(settings):
        raise ConfigurationError(f"{partial} is of other data, another model or other options")
    lines = partial.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = sum(line.endswith("\n") for line in lines) // batch_size * batch_size
    partial.write_text("".join(lines[:whole]), encoding="utf-8")
    return whole


def _input(value: object, tokenizer: Any, kind: Kind, place: str) -> list[int]:  # noqa: ANN401  # theirs
    if not is_talk(value):
        raise DataError(f"{place}: expected text, or a list of {{role, content}}")
    return input_ids(value, tokenizer, kind)


def input_ids(talk: Talk, tokenizer: PreTrainedTokenizerBase, kind: Kind) -> list[int]:
    """Tokens of what a model reads: closed, but for what it goes on with or a classifier's text."""
    if kind == "language" or (kind == "classifier" and isinstance(talk, str)):
        return open_ids(talk, tokenizer)
    return closed_ids(None, talk, tokenizer)


@torch.no_grad()
def say(
    model: Any,  # noqa: ANN401  # transformers' or PEFT's
    tokenizer: Any,  # noqa: ANN401  # transformers'
    kind: Kind,
    inputs: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str | float]:
    """What a model says of some inputs: a greedy continuation, a number, or a label.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        kind: What the model is.
        inputs: Tokens, one or more each; what is longer than the model can hold is cut, for a
            language model at its beginning.
        max_new_tokens: Longest continuation, 1 or more.
    """
    language, most = kind == "language", longest(model, tokenizer)
    if language:
        cut = [ids[-max(1, most - max_new_tokens) :] for ids in inputs]
    else:
        cut = [ids[:most] for ids in inputs]
    side = "left" if language else "right"
    given = {
        key: pad_sequence(
            [torch.tensor(one) for one in rows],
            batch_first=True,
            padding_value=filler,
            padding_side=side,
        ).to(model.device)
        for key, rows, filler in (
            ("input_ids", cut, tokenizer.pad_token_id),
            ("attention_mask", [[1] * len(ids) for ids in cut], 0),
        )
    }
    if not language:
        logits = model(**given).logits.float()
        if kind == "reward":
            return [float(x) for x in logits[:, 0]]
        return [str(model.config.id2label[int(i)]) for i in logits.argmax(dim=-1)]
    made = model.generate(
        **given,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = made[:, given["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def longest(model: Any, tokenizer: Any) -> int:  # noqa: ANN401  # theirs
    """Most tokens that a model can read."""
    positions = vars(model.config.get_text_config()).get("max_position_embeddings")
    return min(int(tokenizer.model_max_length), positions or sys.maxsize)
