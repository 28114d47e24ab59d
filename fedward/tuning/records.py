"""Records of patients: read from files, checked against the plan, grouped by whom privacy protects.

Files are streamed into memory, so that no readable copy of a note is left in a cache. Errors name
file, column and row, never what stands there.
"""

import csv
import glob
import gzip
import logging
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from datasets import Features, IterableDataset, Value
from datasets.exceptions import DatasetsError

from fedward.errors import DataError
from fedward.plan import Data, Plan
from fedward.tuning.columns import input_columns, needed_columns

_LOG = logging.getLogger(__name__)

Row = Mapping[str, Any]

_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_READING = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    csv.Error,
    zlib.error,
    DatasetsError,
)
"""What the readers below ``datasets`` raise; their messages may quote a record."""

# It writes those messages to the log as well.
logging.getLogger("datasets").setLevel(logging.CRITICAL)


@dataclass(frozen=True, kw_only=True)
class Records:
    """Rows and the units they belong to.

    Args:
        rows: The columns that the plan names, by those names.
        units: For each unit (patient) the numbers of its rows; every row is in exactly one.
    """

    rows: tuple[Row, ...]
    units: tuple[tuple[int, ...], ...]


def find_splits(path: Path) -> dict[str, Path]:
    """The files of a data set: a file is ``train``; a folder may hold train, validation and test.

    Raises:
        DataError: Nothing there, no ``train`` file, or two files for one split.
    """
    if path.is_file():
        _kind(path)
        return {"train": path}
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        split = re.split("[.-]", file.name)[0]  # also train-00000-of-00001.parquet
        if split in {"train", "validation", "test"} and _suffix(file) in _KINDS:
            if split in found:
                raise DataError(f"{path}: two files for {split}: {found[split].name}, {file.name}")
            found[split] = file
    if "train" not in found:
        raise DataError(f"{path}: expected a file train.jsonl, .csv or .parquet (also .gz)")
    return found


def read_table(
    path: Path, names: Mapping[str, str] | None = None, *, show_columns: bool = True
) -> list[Row]:
    """Every row of a file.

    Args:
        path: JSONL, CSV or Parquet; the first two also with ``.gz``.
        names: Name of a column → the file's own name of it.
        show_columns: See :func:`read_records`.

    Raises:
        DataError: The file cannot be read, is empty, or lacks a column that ``names`` gives.
    """
    rows: list[Row] = _read(path)
    if not rows:
        raise DataError(f"{path}: no records; expected at least one")
    for own in (names or {}).values():
        check_column(own, rows[0], path, show_columns=show_columns)
    if names:
        rows = [{**row, **{name: row[own] for name, own in names.items()}} for row in rows]
    return rows


def read_records(
    path: Path,
    plan: Plan,
    names: Mapping[str, str] | None = None,
    *,
    show_columns: bool = True,
) -> Records:
    """Read one file and check it against the plan's ``[data]`` and labels.

    Rows without a unit are left out, and a warning says how many.

    Args:
        path: JSONL, CSV or Parquet; the first two also with ``.gz``.
        plan: Names the columns.
        names: The plan's name of a column → the file's own name of it.
        show_columns: Whether an error may name the file's columns: where a header is missing they
            are the first record.

    Raises:
        DataError: The file cannot be read, is empty, lacks a column, or a row has no text, no site,
            a unit that is neither text nor a whole number, or a label that is not the plan's.
        ConfigurationError: The plan's template is not one.
    """
    columns, rows = needed_columns(plan), read_table(path, names, show_columns=show_columns)
    for column in columns:
        check_column(column, rows[0], path, show_columns=show_columns)
    for number, row in enumerate(rows, start=1):
        _check_row(row, number, path, plan)
    unit = plan.data.unit
    # Nobody knows whom such a row would have to be clipped together with.
    owned = [row for row in rows if unit is None or row.get(unit) not in (None, "")]
    if len(owned) < len(rows):
        _LOG.warning("%s: %d rows without %r left out", path, len(rows) - len(owned), unit)
    return group([{column: row.get(column) for column in columns} for row in owned], unit)


def group(rows: Sequence[Row], unit: str | None) -> Records:
    """Records whose units are the values of a column, or each row where there is none."""
    if unit is None:
        return Records(rows=tuple(rows), units=tuple((number,) for number in range(len(rows))))
    members: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        members.setdefault(str(row[unit]), []).append(number)
    return Records(rows=tuple(rows), units=tuple(map(tuple, members.values())))


def select(records: Records, units: Iterable[int]) -> Records:
    """The records of some units, renumbered."""
    rows: list[Row] = []
    chosen: list[tuple[int, ...]] = []
    for unit in units:
        chosen.append(tuple(range(len(rows), len(rows) + len(records.units[unit]))))
        rows += [records.rows[number] for number in records.units[unit]]
    return Records(rows=tuple(rows), units=tuple(chosen))


def merge(parts: Sequence[Records]) -> Records:
    """All records of several sites; a patient of two sites stays two units."""
    rows: list[Row] = []
    units: list[tuple[int, ...]] = []
    for part in parts:
        units += [tuple(number + len(rows) for number in unit) for unit in part.units]
        rows += part.rows
    return Records(rows=tuple(rows), units=tuple(units))


def hold_out(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    """Keep a share of the units apart, deterministically: (the rest, the share)."""
    order = np.random.default_rng(seed).permutation(len(records.units))
    cut = round(len(order) * share)
    return (
        select(records, sorted(order[cut:].tolist())),
        select(records, sorted(order[:cut].tolist())),
    )


def make_sites(records: Records, data: Data) -> dict[str, Records]:
    """Deal the units of one data set to the sites of a simulation.

    Args:
        records: All of them.
        data: Its ``site`` column, or its Dirichlet ``split``: for each value of ``split.by`` the
            sites' shares are drawn from Dirichlet(alpha) (Hsu et al. 2019, arXiv 1909.06335).

    Returns:
        Site name → records, sorted by name; a site may be empty under a very uneven split.

    Raises:
        DataError: The plan names neither.
    """
    if data.site is not None:
        rows: dict[str, list[Row]] = {}
        for row in records.rows:
            rows.setdefault(str(row[data.site]), []).append(row)
        return {name: group(rows[name], data.unit) for name in sorted(rows)}
    if data.split is None:
        raise DataError("the plan's [data] makes no sites: give site = COLUMN or split = {...}")
    split = data.split
    generator = np.random.default_rng(split.seed)
    values: dict[str, list[int]] = {}
    for number, unit in enumerate(records.units):
        values.setdefault(str(records.rows[unit[0]][split.by]), []).append(number)
    dealt: list[list[int]] = [[] for _ in range(split.sites)]
    for value in sorted(values):
        shares = generator.dirichlet(np.full(split.sites, split.alpha))
        for number, site in zip(
            values[value], generator.choice(split.sites, len(values[value]), p=shares), strict=True
        ):
            dealt[int(site)].append(number)
    width = len(str(split.sites - 1))
    return {f"site-{i:0{width}}": select(records, units) for i, units in enumerate(dealt)}


def labels_of(records: Records, column: str) -> tuple[str, ...]:
    """The distinct labels, sorted; for simulations, whose data is public to the simulator."""
    return tuple(sorted({str(row[column]) for row in records.rows}))


def check_column(column: str, row: Row, path: Path, *, show_columns: bool = True) -> None:
    """Refuse a file whose rows lack a column.

    Raises:
        DataError: With the nearest name, or all, where columns may be shown.
    """
    if column not in row and not show_columns:
        raise DataError(f"{path}: no column {column!r}")
    if column not in row:
        near = get_close_matches(column, list(row), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(row)}"
        raise DataError(f"{path}: no column {column!r}; {hint}")


def _check_row(row: Row, number: int, path: Path, plan: Plan) -> None:
    data, where = plan.data, f"{path}: row {number}"

    def check(column: str, holds: bool, expected: str) -> None:
        if not holds:
            raise DataError(f"{where}: column {column!r} must hold {expected}")

    texts = input_columns(plan)
    if plan.task.objective == "sft":
        if data.messages in texts:
            texts.remove(data.messages)
            expected = "a list of {role, content} with at least one of the assistant"
            check(data.messages, _is_conversation(row.get(data.messages)), expected)
        if data.completion is not None:
            texts.append(data.completion)
    kinds = str if data.template is None else str | int | float
    for column in texts:
        check(column, isinstance(row.get(column), kinds), "text")
    if plan.task.objective == "classify":
        label = row.get(data.label)
        check(data.label, isinstance(label, str | int), "a label: text or a whole number")
        known = not plan.task.labels or str(label) in plan.task.labels
        check(data.label, known, "one of the plan's labels")
    if data.unit is not None:
        unit = row.get(data.unit)
        check(data.unit, unit is None or isinstance(unit, str | int), "text or a whole number")
    if data.site is not None:
        check(data.site, row.get(data.site) not in (None, ""), "the name of a site")


def _is_conversation(messages: object) -> bool:
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return False
    turns = [(message.get("role"), message.get("content")) for message in messages]
    texts = all(isinstance(part, str) for turn in turns for part in turn)
    return texts and any(role == "assistant" for role, _ in turns)


def _read(path: Path) -> list[Row]:
    """Every row of a file; nothing of it stays on the disk but the file."""
    kind = _kind(path)
    # Escaped, because datasets reads a path as a pattern. load_dataset would call a counter.
    name, problem = glob.escape(str(path)), ""
    rows: list[Any] = []
    with TemporaryDirectory(prefix="fedward-") as cache:
        try:
            if kind == "csv":
                text = _text_columns(path)
                data = IterableDataset.from_csv(
                    name, features=text, keep_default_na=False, cache_dir=cache
                )
            elif kind == "json":
                data = IterableDataset.from_json(name, cache_dir=cache)
            else:
                data = IterableDataset.from_parquet(name, cache_dir=cache)
            rows = list(data)
        except StopIteration:
            pass  # what datasets makes of a file without rows
        except _READING as error:
            problem = type(error).__name__
    if problem:  # raised here, so that the error has no context that quotes a record
        raise DataError(f"{path}: not readable as {kind} ({problem})")
    return rows


def _text_columns(path: Path) -> Features:
    """A CSV's columns, all as text: guessed types would make 1 of the patient 001."""
    encoding, newline = "utf-8-sig", ""  # a byte-order mark is no part of the first name
    with (
        gzip.open(path, "rt", encoding=encoding, newline=newline)
        if path.suffix == ".gz"
        else path.open(encoding=encoding, newline=newline)
    ) as file:
        return Features({name: Value("string") for name in next(csv.reader(file))})


def _kind(path: Path) -> str:
    kind = _KINDS.get(_suffix(path))
    if kind is None:
        raise DataError(f"{path}: expected .jsonl, .json, .csv or .parquet (also .gz)")
    return kind


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix
