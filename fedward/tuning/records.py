"""Records of patients: read from files, checked against the plan, grouped by whom privacy protects.

Files are read into memory, row by row: no readable copy of a note is left in a cache, and what
stands in one row never decides how another is read (a reader that guesses types from all rows would
let one patient's value change everybody's). Errors name file, column and row, never what stands
there.
"""

import csv
import gzip
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import ArrowException
from pyarrow.parquet import read_table as read_parquet

from fedward.errors import DataError
from fedward.plan import Data, Plan
from fedward.tuning.columns import answer_columns, input_columns, needed_columns

_LOG = logging.getLogger(__name__)

Row = Mapping[str, Any]

_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_READING = (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error, ArrowException)
"""What the readers raise; their messages may quote a record."""

_LONGEST_FIELD = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a file holds.

    Args:
        columns: Every column of it; of a JSON file, every key of any row.
        rows: Its rows; None in place of one that cannot be read (a torn line, a field too many).
    """

    columns: tuple[str, ...]
    rows: tuple[Row | None, ...]


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


def read_records(
    path: Path,
    plan: Plan,
    names: Mapping[str, str] | None = None,
    *,
    show_columns: bool = True,
    leave_out: bool = False,
) -> Records:
    """Read one file and check it against the plan's ``[data]`` and labels.

    Rows without a unit are left out, and a warning says how many.

    Args:
        path: JSONL, CSV or Parquet; the first two also with ``.gz``.
        plan: Names the columns.
        names: The plan's name of a column → the file's own name of it.
        show_columns: Whether an error may name the file's columns: where a header is missing they
            are the first record.
        leave_out: Leave out a unit with a row that does not fit (and a row that cannot be read)
            instead of raising an error, which would tell that it is there. No row at all is then
            no error either. A column that a table's header lacks still is.

    Raises:
        DataError: The file cannot be read, is empty, lacks a column, or a row has no text, no site,
            a unit that is neither text nor a whole number, or a label that is not the plan's.
        ConfigurationError: The plan's template is not one.

    Guarantees:
        With ``leave_out``, what becomes of a unit's rows, and whether there is an error, does not
        depend on what stands in another unit's rows, as long as the file is a JSONL, CSV or Parquet
        file at all.
    """
    table, own = read_table(path), {name: name for name in needed_columns(plan)}
    own |= {name: column for name, column in (names or {}).items() if name in own}
    if not leave_out:
        _check_rows(table, path)
    if not leave_out or _kind(path) != "json":
        for column in own.values():
            check_column(column, table.columns, path, show_columns=show_columns)
    unit, fitting, unfit, spoiled = plan.data.unit, list[Row](), 0, set[str]()
    for number, found in enumerate(table.rows, start=1):
        row = {name: (found or {}).get(column) for name, column in own.items()}
        problem = "cannot be read" if found is None else _problem(row, plan)
        if problem and not leave_out:
            raise DataError(f"{path}: row {number}: {problem}")
        if not problem:
            fitting.append(row)
            continue
        unfit += 1
        if unit is not None and isinstance(row[unit], str | int):
            spoiled.add(str(row[unit]))
    if unfit:
        _LOG.warning("%s: %d rows do not fit the plan; their patients are left out", path, unfit)
    # Nobody knows whom a row without a unit would have to be clipped together with.
    owned = [row for row in fitting if unit is None or row[unit] not in (None, "")]
    if len(owned) < len(fitting):
        _LOG.warning("%s: %d rows without %r left out", path, len(fitting) - len(owned), unit)
    return group([row for row in owned if unit is None or str(row[unit]) not in spoiled], unit)


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


def check_column(
    column: str, columns: Sequence[str], path: Path, *, show_columns: bool = True
) -> None:
    """Refuse a file that lacks a column.

    Raises:
        DataError: With the nearest name, or all, where columns may be shown.
    """
    if column not in columns and not show_columns:
        raise DataError(f"{path}: no column {column!r}")
    if column not in columns:
        near = get_close_matches(column, columns, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(columns)}"
        raise DataError(f"{path}: no column {column!r}; {hint}")


def _check_rows(table: Table, path: Path) -> None:
    if not table.rows:
        raise DataError(f"{path}: no records; expected at least one")
    if None in table.rows:
        number = table.rows.index(None) + 1
        raise DataError(f"{path}: row {number} is not readable as {_kind(path)}")


def _problem(row: Row, plan: Plan) -> str:
    """Why a row does not fit the plan, without a word of it; empty where it does."""
    data, expected = plan.data, dict[str, tuple[bool, str]]()
    for column in input_columns(plan):
        kinds = str if data.template is None else str | int | float
        expected[column] = isinstance(row[column], kinds), "text"
    if plan.task.objective == "sft" and data.messages in expected:
        talk = "a list of {role, content} with at least one of the assistant"
        expected[data.messages] = _is_conversation(row[data.messages]), talk
    for column in answer_columns(plan):
        expected[column] = isinstance(row[column], str), "text"
    if plan.task.objective == "kto":
        expected[data.label] = truth_of(row[data.label]) is not None, "true or false"
    if plan.task.objective == "classify":
        label = row[data.label]
        known = not plan.task.labels or str(label) in plan.task.labels
        expected[data.label] = known, "one of the plan's labels"
        if not isinstance(label, str | int):
            expected[data.label] = False, "a label: text or a whole number"
    if data.unit is not None:
        unit = row[data.unit]
        expected[data.unit] = unit is None or isinstance(unit, str | int), "text or a whole number"
    if data.site is not None:
        expected[data.site] = row[data.site] not in (None, ""), "the name of a site"
    wrong = (f"column {c!r} must hold {what}" for c, (holds, what) in expected.items() if not holds)
    return next(wrong, "")


def truth_of(value: object) -> bool | None:
    """What a field of true or false says, also as ``"true"``, ``1`` or ``"1"``; None for others."""
    known = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
    field = value.lower() if isinstance(value, str) else value
    return known.get(field) if isinstance(field, str | int | float) else None


def _is_conversation(messages: object) -> bool:
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return False
    turns = [(message.get("role"), message.get("content")) for message in messages]
    texts = all(isinstance(part, str) for turn in turns for part in turn)
    return texts and any(role == "assistant" for role, _ in turns)


def read_table(path: Path) -> Table:
    """Every row of a file; nothing of it stays on the disk but the file.

    Args:
        path: JSONL, CSV or Parquet; the first two also with ``.gz``.

    Raises:
        DataError: The file cannot be read as what its name says.
    """
    kind, problem = _kind(path), ""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if kind == "parquet":
                table = read_parquet(file)
                return Table(columns=tuple(table.column_names), rows=tuple(table.to_pylist()))
            if kind == "csv":
                # A byte-order mark is no part of the first name; bad bytes spoil their row alone.
                text = TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
                return _csv_table(text)
            return _json_table(file.read(), whole=_suffix(path) == ".json")
    except _READING as error:
        problem = type(error).__name__
    # Raised here, so that the error has no context that quotes a record.
    raise DataError(f"{path}: not readable as {kind} ({problem})")


def _csv_table(text: Iterable[str]) -> Table:
    """A CSV's rows, all as text: guessed types would make 1 of the patient 001."""
    csv.field_size_limit(_LONGEST_FIELD)
    reader, rows = csv.reader(text), list[Row | None]()
    columns = tuple(next(reader, ()))
    while (fields := _next_fields(reader)) is not None:
        if fields:
            whole = len(fields) == len(columns) and _is_unicode("".join(fields))
            rows.append(dict(zip(columns, fields, strict=True)) if whole else None)
    return Table(columns=columns, rows=tuple(rows))


def _next_fields(reader: Iterator[list[str]]) -> list[str] | None:
    """The next line's fields; a single odd one for a line that is none; None at the end."""
    try:
        return next(reader, None)
    except csv.Error:
        return ["\ud800"]


def _json_table(data: bytes, *, whole: bool) -> Table:
    """Rows of JSON lines, or with ``whole`` of one list of them where the file is one."""
    listed = _json_value(data) if whole else None
    if isinstance(listed, list):
        values = listed
    else:
        values = [_json_value(line) for line in data.split(b"\n") if line.strip()]
        if whole and values and not any(values):
            raise ValueError  # not even lines
    escaped = b"\\u" in data
    rows = tuple(
        value if isinstance(value, dict) and (not escaped or _is_sound(value)) else None
        for value in values
    )
    columns = dict.fromkeys(column for row in rows if row is not None for column in row)
    return Table(columns=tuple(columns), rows=rows)


def _json_value(text: bytes) -> Any:  # noqa: ANN401  # JSON
    """What JSON says; None for what is no JSON."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _is_sound(row: Row) -> bool:
    """Half a surrogate pair can be written in JSON, but no tokenizer takes it."""
    return _is_unicode(json.dumps(row, ensure_ascii=False))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(path: Path) -> str:
    kind = _KINDS.get(_suffix(path))
    if kind is None:
        raise DataError(f"{path}: expected .jsonl, .json, .csv or .parquet (also .gz)")
    return kind


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix
