"""A simulation's folder: begun once, gone on with for the same plan and data, never half there."""

import json
import shutil
from pathlib import Path
from typing import Any

from fedward.errors import ConfigurationError
from fedward.plan import from_json
from fedward.private_files import write_private
from fedward.simulations.case import Case, Options


def open_folder(options: Options, case: Case) -> Path:
    """The run's folder: a new one, or the old one of the same plan and data with ``--resume``.

    Raises:
        ConfigurationError: The folder holds an unfinished run, or one of another plan or data.
    """
    folder, report = options.out / "run", options.out / "report.json"
    frozen, data = folder / "plan.json", folder / "data.sha256"
    if frozen.exists() and options.resume:
        if from_json(frozen.read_bytes()) != case.plan:
            raise ConfigurationError(
                f"{options.out} holds a run of another plan: give that plan (and data), or "
                "another --out"
            )
        if data.read_text(encoding="utf-8") != case.digest:
            raise ConfigurationError(
                f"{options.out} holds a run on other data: the files that --data names have "
                "changed since it began. Give it the same files, or another --out"
            )
        return folder
    if frozen.exists() and not report.exists():
        raise ConfigurationError(
            f"{options.out} holds an unfinished run: add --resume to go on with it, or choose "
            "another --out"
        )
    report.unlink(missing_ok=True)
    if folder.exists():
        old = options.out / "run.old"  # killed while it deletes, no half of a run is left
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old)
    folder.mkdir(parents=True, mode=0o700)
    write_atomically(data, case.digest.encode())
    write_atomically(frozen, case.plan.to_json())  # the last: with it, the folder is whole
    return folder


def read_json(path: Path) -> dict[str, Any] | None:
    """The document in a file; None if there is no file."""
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file, and its folder if need be: whole or not at all, whenever this is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private(path, data)
