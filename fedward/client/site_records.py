"""The records of a site's data sources: a look at them, and what a plan trains on.

Read on the side of the trainer and by the commands of people; the agent never does.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedward import typed_toml
from fedward.canonical import Json, canonical_json, digest
from fedward.client.data_sources import DataSource
from fedward.client.site_folder import SiteFolder, check_site_name
from fedward.errors import ConfigurationError, DataError
from fedward.plan import Plan
from fedward.private_files import write_private
from fedward.tuning.records import (
    Records,
    Row,
    check_column,
    find_splits,
    read_records,
    read_table,
    select,
)

_UNIT = "unit of privacy"
"""What the unit's column is called here: no name of a plan's, so that no plan reads it as text."""


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What a look at a source found; it stays at the site.

    Args:
        rows: Rows of the training file that can be read.
        unreadable: Rows that cannot, as a torn line; training leaves them out.
        units: Patients; None where each record is a unit.
        without_unit: Rows that name no patient; training leaves them out.
        columns: The file's own columns.
        held_out: Rows of a test file; None where there is none.
    """

    rows: int
    unreadable: int
    units: int | None
    without_unit: int
    columns: tuple[str, ...]
    held_out: int | None


def look(source: DataSource) -> SourceFacts:
    """Read a source once, and count.

    Raises:
        DataError: It cannot be read, is empty, or lacks a column that the source names.
    """
    splits = find_splits(Path(source.path))
    table, unit = read_table(splits["train"]), source.unit
    rows = [row for row in table.rows if row is not None]
    if not rows:
        raise DataError(f"{splits['train']}: no records that can be read; expected at least one")
    for column in [*source.columns.names.values(), *([unit] if unit else [])]:
        check_column(column, table.columns, splits["train"])
    owners = [row.get(unit) for row in rows] if unit else []
    known = {str(owner) for owner in owners if owner not in (None, "")}
    return SourceFacts(
        rows=len(rows),
        unreadable=len(table.rows) - len(rows),
        units=len(known) if unit else None,
        without_unit=sum(owner in (None, "") for owner in owners),
        columns=table.columns,
        held_out=len(read_table(splits["test"]).rows) if "test" in splits else None,
    )


def add_source(folder: SiteFolder, name: str, source: DataSource) -> SourceFacts:
    """Look at a source and keep it under a name; a source of that name is replaced.

    Raises:
        InvalidValue: The name is not 1 to 64 letters, digits, ``.``, ``_`` or ``-``.
        DataError: See :func:`look`.
    """
    check_site_name(name)
    facts = look(source)
    write_private(folder.data / f"{name}.toml", typed_toml.dump(source).encode())
    return facts


def site_records(
    source: DataSource, plan: Plan, *, held_out: float = 0.0
) -> tuple[Records, Records | None]:
    """The records of a source as a plan needs them: for training, and kept apart.

    Args:
        source: Where they are and what the columns are called.
        plan: Names the columns.
        held_out: Share of the patients that is kept apart where there is no test file.

    Returns:
        Training and held-out records, in the plan's words; None where none are kept apart.

    Raises:
        ConfigurationError: The plan reads a column that the source does not declare.
        DataError: There is no such file, it is no file of its kind, or its header lacks a column.

    Guarantees:
        What becomes of one patient's rows does not depend on another's, and whether there is an
        error depends on nobody's: who does not fit the plan is left out, and so may all be.
    """
    local, names = _localised(source, plan)
    splits = find_splits(Path(source.path))
    read = partial(read_records, plan=local, names=names, show_columns=False, leave_out=True)
    train = read(splits["train"])
    if "test" in splits:
        return train, read(splits["test"])
    if held_out == 0:
        return train, None
    parts: tuple[list[int], list[int]] = ([], [])
    for number, unit in enumerate(train.units):
        parts[_kept_apart(train.rows[unit[0]], held_out)].append(number)
    return select(train, parts[0]), select(train, parts[1])


def _kept_apart(row: Row, share: float) -> bool:
    """Whether the unit of a row is held out: decided by its own name (or row), whoever else is."""
    name = str(row[_UNIT]).encode() if _UNIT in row else canonical_json(dict(row))
    return int.from_bytes(digest("held out", name)[:8], "big") < share * 2**64


def files_identity(source: DataSource) -> bytes:
    """32 bytes that change when a file of a source is replaced or written to.

    Of each file: name, device, inode, size, and the times of its last change of content and of
    inode; the last is the kernel's own, so that a file with its old time put back is noticed too.

    Raises:
        DataError: There is no such file.
    """
    facts: list[Json] = []
    for split, path in sorted(find_splits(Path(source.path)).items()):
        found = path.stat()
        numbers = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        facts.append([split, str(path), *numbers])
    return digest("files", canonical_json(facts))


def _localised(source: DataSource, plan: Plan) -> tuple[Plan, dict[str, str]]:
    """The plan without what only simulations have, and the file's name of each column.

    Whom privacy protects is the site's to say: a plan for rows is read for patients, too.
    """
    undeclared = source.undeclared(plan)
    if undeclared:
        raise ConfigurationError(
            f"the plan reads {', '.join(map(repr, undeclared))}, which the data source does not "
            "declare: fedward site data add with --map"
        )
    names, unit = dict(source.columns.names), None
    if source.unit is not None:
        unit, names[_UNIT] = _UNIT, source.unit
    data = dataclasses.replace(plan.data, unit=unit, site=None, split=None)
    return dataclasses.replace(plan, data=data), names
