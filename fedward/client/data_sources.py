"""What a site trains on: named data sources in its own words, and base models by digest.

A plan names columns in its own words and a model by its digest. Where the records lie, what their
columns are called, who a patient is and in which folder a model is, only the site says; the plan's
path of the model is never used. Nothing here opens a record (:mod:`fedward.client.site_records`
does), because the agent reads these declarations too.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedward import typed_toml
from fedward.canonical import canonical_json, digest
from fedward.client.site_folder import SiteFolder
from fedward.errors import ConfigurationError, InvalidValue, ModelError
from fedward.plan import Plan
from fedward.tuning.columns import example_columns


@dataclass(frozen=True, kw_only=True)
class Columns:
    """``[columns]``: the plan's name of a column = the file's own name of it.

    These are all that a plan may read.
    """

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
        unit: The file's column that names the patient. It holds for every plan, whatever the plan's
            own unit is.
        unit_is_record: Said in place of ``unit`` where each record is protected by itself: either
            no patient has two, or the site accepts that those who do lose more.
        columns: What the file calls the plan's columns; no other is read.
    """

    path: str
    unit: str | None = None
    unit_is_record: bool = False
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        """Whom privacy protects must have been said."""
        if (self.unit is not None) == self.unit_is_record:
            allowed = "the column that names the patient, or else unit_is_record = true"
            raise InvalidValue("unit", self.unit, allowed)

    def undeclared(self, plan: Plan) -> list[str]:
        """The columns that a plan would read and that are not in ``[columns]``."""
        return [column for column in example_columns(plan) if column not in self.columns.names]

    def hash(self) -> bytes:
        """32 bytes that an approval binds: another path, unit or column asks for a new one."""
        return digest("data source", canonical_json(dataclasses.asdict(self)))


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


def add_model(folder: SiteFolder, path: Path) -> str:
    """Link a base model's folder under its digest; returns the digest.

    Raises:
        ModelError: It is not the folder of a model.
    """
    from fedward.tuning.models import fingerprint  # loads torch, which reading records does not

    found = fingerprint(path)
    link = folder.models / found
    link.unlink(missing_ok=True)
    link.symlink_to(path.resolve(), target_is_directory=True)
    return found


def model_folder(folder: SiteFolder, plan: Plan) -> Path:
    """Where this site keeps the plan's base model; loading it checks the digest again.

    Raises:
        ModelError: The plan names no digest, or there is no such model here.
    """
    name = plan.model.sha256 or ""
    path = folder.models / name
    if not re.fullmatch("[0-9a-f]{64}", name) or not path.is_dir():
        raise ModelError(
            f"the base model {name or 'without a digest'} is not in {folder.models}; add its "
            "folder with fedward site model add FOLDER"
        )
    return path
