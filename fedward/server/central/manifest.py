"""What stands beside a trained model, in ``fedward.json``: how to put it together again."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedward import typed_toml
from fedward.errors import ConfigurationError, ModelError

MANIFEST = "fedward.json"

PLAN, ADAPTER = "plan.json", "adapter.safetensors"
"""Beside the manifest of a federated adapter: the frozen plan, and the state that sites summed."""

BASES = "../../../../bases"
"""Where the registry keeps bases, as the folder of a version's files sees them."""

Kind = Literal["language", "reward", "classifier"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What stands beside a trained model.

    Args:
        kind: ``language`` writes, ``reward`` gives one number, ``classifier`` a class.
        stage: The stage that made it, or ``federation``.
        method: The tuner; with ``full`` the folder is the whole model.
        quantize: How the base was held in training, and is held again.
        base: Folder (relative to this one where it lies near) or hub id of the base.
        base_sha256: The base's digest.
        job: Hex digest of the job's step and its data, or of the plan.
        mergeable: Whether the adapter can be added to the base's weights.
        labels: A classifier's classes, in the order of its outputs.
    """

    kind: Kind
    stage: str
    method: str
    quantize: Literal["none", "nf4", "int8"]
    base: str
    base_sha256: str
    job: str
    mergeable: bool
    labels: tuple[str, ...] = ()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest beside the weights."""
    text = json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a trained model, or None where the folder has none.

    Raises:
        ModelError: It cannot be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        return typed_toml.parse_json(Manifest, path.read_bytes())
    except (OSError, ConfigurationError) as error:
        raise ModelError(f"{path}: not a manifest of a trained model: {error}") from error
