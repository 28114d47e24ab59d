"""What the registry knows of a version of a model, and the digests of its files."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedward.errors import ModelError, require
from fedward.server.central.manifest import Kind

_NAME = r"[a-z0-9][a-z0-9-]{0,127}"


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What the guarantee to the patients of a federated run is, and what the run did.

    Args:
        epsilon: At most so much at each site, all rounds and metrics together.
        delta: The guarantee's other number.
        unit: Whom it protects: the column's name, or ``record``.
        rounds: Rounds that sites completed.
        sites: Sites that were in a sum.
        minimum: Fewest sites in a sum.
        central_rounds: Rounds that the coordinator completed alone, on its own data.
    """

    epsilon: float
    delta: float
    unit: str
    rounds: int
    sites: int
    minimum: int
    central_rounds: int = 0


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The version that one started from.

    Args:
        version: ``NAME:NUMBER``.
        manifest: Hex SHA-256 of its signed manifest.
    """

    version: str
    manifest: str


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a version is and what it was made from.

    Args:
        name: Lower-case letters, digits and dashes.
        kind: What the model does.
        stage: ``federation``, a stage of central training, or ``merge``.
        method: The tuner; ``full`` for a whole model.
        quantize: How the base was held in training.
        base: The whole model below, in the words of the plan or job.
        base_sha256: Its digest.
        made_from: Hex digest of plan or job, and of the weights.
        whole_sha256: The digest by which plans name it, if it is a whole model.
        parents: The versions of the registry that it started or learned from.
        metrics: What was measured, by name.
        spent: The privacy of a federated run; None for all else, and where noise was off.
    """

    name: str
    kind: Kind
    stage: str
    method: str
    quantize: str
    base: str
    base_sha256: str
    made_from: str
    whole_sha256: str | None = None
    parents: tuple[Parent, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    spent: Spent | None = None

    def __post_init__(self) -> None:
        """Check the name, of which a folder is made."""
        holds = re.fullmatch(_NAME, self.name) is not None
        require(holds, "name", self.name, "1 to 128 of a-z, 0-9 and '-'")


@dataclass(frozen=True, kw_only=True)
class Version(Origin):
    """A version: its origin, and what the registry adds when it is put in.

    Args:
        number: 1, 2, ... of its name.
        created: ISO 8601, UTC.
        files: Path below ``model/`` to the hex SHA-256 of the file.
        signer: The public key (hex) of the registry.
    """

    number: int
    created: str
    files: Mapping[str, str] = field(hash=False)
    signer: str

    @property
    def title(self) -> str:
        """``NAME:NUMBER``."""
        return f"{self.name}:{self.number}"


def check_files(folder: Path, files: Mapping[str, str]) -> None:
    """Compare a folder with what was signed of it.

    Raises:
        ModelError: A file is changed, missing, or more than was signed.
    """
    found = digests(folder)
    for name in sorted({*files, *found}):
        if name not in found:
            raise ModelError(f"{folder / name}: the file is missing")
        if name not in files:
            raise ModelError(f"{folder / name}: the file was not there when the model was signed")
        if found[name] != files[name]:
            raise ModelError(
                f"{folder / name}: the file has changed: sha256 {found[name]}, signed was "
                f"{files[name]}"
            )


def digests(folder: Path) -> dict[str, str]:
    """Path below the folder to the hex SHA-256 of every file."""
    found = dict[str, str]()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ModelError(f"{path}: expected a plain file, not a link or a device")
        if path.is_file():
            with path.open("rb") as file:
                hashed = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.relative_to(folder).as_posix()] = hashed
    return found
