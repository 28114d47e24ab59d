"""What a site trains on: named data sources in its own words, and base models by digest.

A plan names columns in its own words and a model by its digest. Where the records lie, what their
columns are called and in which folder a model is, only the site says; the plan's path of the model
is never used.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedward import typed_toml
from fedward.client.site_folder import SiteFolder, check_site_name
from fedward.errors import ConfigurationError, InvalidValue, ModelError
from fedward.plan import Plan
from fedward.private_files import write_private
from fedward.tuning.records import (
    Records,
    check_column,
    find_splits,
    hold_out,
    read_records,
    read_table,
)

_HELD_OUT_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Columns:
    """``[columns]``: the plan's name of a column = the file's own name of it."""

    names: Mapping[str, Any] = field(default_factory=dict, metadata={typed_toml.REST: True})

    def __post_init__(self) -> None:
        """Check that names are text."""
        for name, own in self.names.items():
            if not isinstance(own, str) or not own:
                raise InvalidValue(name, own, "the name of a column")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """``data/NAME.toml``: one set of records.

    Args:
        path: A file, or a folder with train and test, as JSONL, CSV or Parquet.
        unit: The file's column that names the patient. It holds for every plan, also for one that
            would protect rows only; left out, the plan's own column counts.
        columns: What the file calls the plan's columns.
    """

    path: str
    unit: str | None = None
    columns: Columns = field(default_factory=Columns)


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What a look at a source found; it stays at the site.

    Args:
        rows: Rows of the training file.
        units: Patients, where the source names a unit.
        without_unit: Rows that name no patient; training leaves them out.
        columns: The file's own columns.
        held_out: Rows of a test file; None where there is none.
    """

    rows: int
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
    rows = read_table(splits["train"])
    unit = source.unit
    for column in [*source.columns.names.values(), *([unit] if unit else [])]:
        check_column(column, rows[0], splits["train"])
    owners = [row[unit] for row in rows if row[unit] not in (None, "")] if unit else []
    return SourceFacts(
        rows=len(rows),
        units=len({str(owner) for owner in owners}) if unit else None,
        without_unit=len(rows) - len(owners) if unit else 0,
        columns=tuple(rows[0]),
        held_out=len(read_table(splits["test"])) if "test" in splits else None,
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


def load_source(folder: SiteFolder, name: str) -> DataSource:
    """Read a source by name.

    Raises:
        ConfigurationError: There is none of that name, or its file is invalid.
    """
    path = folder.data / f"{name}.toml"
    if not path.exists():
        known = ", ".join(source_names(folder)) or "none"
        raise ConfigurationError(
            f"no data source {name!r}; known: {known}. Add it with fedward site data add"
        )
    return typed_toml.load(DataSource, path)


def source_names(folder: SiteFolder) -> list[str]:
    """Names of all data sources, sorted."""
    return sorted(path.stem for path in folder.data.glob("*.toml"))


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
        DataError: See :func:`fedward.tuning.records.read_records`.
    """
    local, names = _localised(source, plan)
    splits = find_splits(Path(source.path))
    train = read_records(splits["train"], local, names, show_columns=False)
    if "test" in splits:
        return train, read_records(splits["test"], local, names, show_columns=False)
    if held_out == 0:
        return train, None
    rest, apart = hold_out(train, held_out, _HELD_OUT_SEED)
    return rest, apart if apart.units else None


def _localised(source: DataSource, plan: Plan) -> tuple[Plan, dict[str, str]]:
    """The plan without what only simulations have, and the file's name of each column."""
    names = dict(source.columns.names)
    unit = plan.data.unit
    if source.unit is not None:
        unit = unit or source.unit  # a plan for rows is read for patients: that protects more
        names[unit] = source.unit
    data = dataclasses.replace(plan.data, unit=unit, site=None, split=None)
    return dataclasses.replace(plan, data=data), names


def add_model(folder: SiteFolder, path: Path) -> str:
    """Link a base model's folder under its digest; returns the digest.

    Raises:
        ModelError: It is not the folder of a model.
    """
    from fedward.tuning.models import fingerprint  # loads torch, which reading records does not

    digest = fingerprint(path)
    link = folder.models / digest
    link.unlink(missing_ok=True)
    link.symlink_to(path.resolve(), target_is_directory=True)
    return digest


def model_folder(folder: SiteFolder, plan: Plan) -> Path:
    """Where this site keeps the plan's base model; loading it checks the digest again.

    Raises:
        ModelError: The plan names no digest, or there is no such model here.
    """
    digest = plan.model.sha256 or ""
    path = folder.models / digest
    if not re.fullmatch("[0-9a-f]{64}", digest) or not path.is_dir():
        raise ModelError(
            f"the base model {digest or 'without a digest'} is not in {folder.models}; add its "
            "folder with fedward site model add FOLDER"
        )
    return path
