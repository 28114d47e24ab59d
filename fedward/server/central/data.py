"""The records of a job: read, checked row by row, and named as the stage wants them.

They are the coordinator's, not a patient's: an error may name a column and a row.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from datasets import Dataset

from fedward.errors import ConfigurationError, DataError
from fedward.server.central.job import REWARDED, STAGES, Stage, Step
from fedward.tuning.records import Row, check_column, read_table

COLUMNS: Mapping[Stage, Sequence[tuple[str, ...]]] = {
    "sft": [("messages",), ("prompt", "completion"), ("text",)],
    "classify": [("messages", "label"), ("prompt", "label"), ("text", "label")],
    "reward": [("prompt", "chosen", "rejected"), ("chosen", "rejected")],
    "dpo": [("prompt", "chosen", "rejected")],
    "orpo": [("prompt", "chosen", "rejected")],
    "kto": [("prompt", "completion", "label")],
    "grpo": [("prompt",)],
    "rloo": [("prompt",)],
    "ppo": [("prompt",)],
    "distill": [("prompt",)],
}
"""What a stage reads; where there are several ways, the first that the file has."""

_TRUTH = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


def read_dataset(path: Path, step: Step) -> Dataset:
    """Read one file of a step as TRL wants it.

    A column holds text, or messages as a list of {role, content}; ``label`` holds true or false,
    for ``classify`` a class's name.

    Raises:
        DataError: The file cannot be read, lacks a column, or a row holds something else.
        ConfigurationError: ``[data] columns`` names a column that the stage does not read.
    """
    names = step.data.columns
    ways = COLUMNS[step.stage]
    known = {name for way in ways for name in way}
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"[data] columns: the stage {step.stage!r} reads {', '.join(sorted(known))}, "
                f"not {name!r}"
            )
    table = read_table(path)
    if not table.rows:
        raise DataError(f"{path}: no records; expected at least one")
    own = {name: names.get(name, name) for name in known}
    way = next((way for way in ways if all(own[n] in table.columns for n in way)), ways[-1])
    wanted = {name: own[name] for name in way}
    if step.reward is not None and step.reward.column is not None:
        wanted[step.reward.column] = step.reward.column
    for column in wanted.values():
        check_column(column, table.columns, path)
    read = class_or_value if step.stage == "classify" else value_of
    return Dataset.from_list(
        [
            {name: read(row.get(column), name, place) for name, column in wanted.items()}
            for row, place in whole_rows(table.rows, path)
        ]
    )


def whole_rows(rows: Sequence[Row | None], path: Path) -> Iterator[tuple[Row, str]]:
    """Every row with the words for where it stands.

    Raises:
        DataError: One cannot be read.
    """
    for number, row in enumerate(rows, start=1):
        if row is None:
            raise DataError(f"{path}: row {number} cannot be read")
        yield row, f"{path}: row {number}"


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def columns_table() -> str:
    """Stages and their columns as Markdown: what docs/central-training.md shows."""
    lines = ["| stage | columns |\n", "| --- | --- |\n"]
    for stage in STAGES:
        ways = "; or ".join(", ".join(f"`{name}`" for name in way) for way in COLUMNS[stage])
        more = ", and `[reward] column` where it is used" if stage in REWARDED else ""
        lines.append(f"| `{stage}` | {ways}{more} |\n")
    return "".join(lines)


def value_of(value: object, column: str, where: str) -> Any:  # noqa: ANN401  # text, messages, truth
    """One field as TRL wants it: text, messages, or the truth of a ``label``.

    Raises:
        DataError: It is something else.
    """
    if column == "label":
        found = _TRUTH.get(value.lower() if isinstance(value, str) else value)
        if found is None:
            raise DataError(f"{where}: column 'label' must hold true or false")
        return found
    if not is_talk(value):
        raise DataError(
            f"{where}: column {column!r} must hold text, or a list of {{role, content}}"
        )
    if isinstance(value, str):
        return value
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def class_or_value(value: object, column: str, where: str) -> Any:  # noqa: ANN401  # as below
    """One field of a classifier's row: as :func:`value_of`, but ``label`` is a class's name.

    Raises:
        DataError: It is something else.
    """
    if column != "label":
        return value_of(value, column, where)
    if not isinstance(value, str | int):
        raise DataError(f"{where}: column 'label' must hold text or a whole number")
    return str(value)


def is_talk(value: object) -> TypeGuard[str | list[Mapping[str, str]]]:
    """Whether a field is text, or a list of ``{role, content}`` with one or more of them."""
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(map(_is_message, value))
    )


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )
