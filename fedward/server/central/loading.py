"""Models that a job starts from and that it leaves: a whole model, or an adapter and its base.

What a job leaves has a manifest ``fedward.json`` beside the weights, which says how to put base and
adapter together again.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedward import typed_toml
from fedward.canonical import digest
from fedward.errors import ConfigurationError, ModelError
from fedward.plan import Model
from fedward.tuning.bottleneck import put_behind
from fedward.tuning.methods import BOTTLENECKS, METHODS, without_peft_noise
from fedward.tuning.models import (
    HEADS,
    fingerprint,
    open_config,
    open_weights,
    quiet,
    resolve_model,
)

MANIFEST = "fedward.json"

Kind = Literal["language", "reward", "classifier"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What stands beside a trained model.

    Args:
        kind: ``language`` writes, ``reward`` gives one number, ``classifier`` a class.
        stage: The stage that made it.
        method: The tuner; with ``full`` the folder is the whole model.
        quantize: How the base was held in training, and is held again.
        base: Folder (relative to this one where it lies near) or hub id of the base.
        base_sha256: The base's digest.
        job: Hex digest of the job's step and its data.
        mergeable: Whether the adapter can be added to the base's weights.
    """

    kind: Kind
    stage: str
    method: str
    quantize: Literal["none", "nf4", "int8"]
    base: str
    base_sha256: str
    job: str
    mergeable: bool


def device() -> str:
    """The torch device of this process: its own GPU under torchrun, the first one, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


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


def open_base(
    folder: Path, model: Model, kind: Kind
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a whole model as it shall be trained or used.

    Args:
        folder: Weights, configuration and tokenizer.
        model: How the base is held; ``path`` is not looked at.
        kind: ``reward`` has a head with one output, new where the folder's is another.

    Raises:
        ModelError: A missing or broken file, weights that do not fit, an adapter.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder}: an adapter without {MANIFEST}: name a model that a job made")
    with quiet():
        config, tokenizer = open_config(folder)
        text = config.get_text_config()
        text.pad_token_id = tokenizer.pad_token_id
        if text.to_dict().get("quantization_config"):
            raise ModelError(f"{folder}: is quantised already; give the original")
        if kind == "language":
            return open_weights(
                AutoModelForCausalLM, folder, config, model, (), device=device()
            ), tokenizer
        heads = HEADS if kind == "reward" and config.num_labels != 1 else ()
        if kind == "reward":
            config.num_labels = 1
        return open_weights(
            AutoModelForSequenceClassification, folder, config, model, heads, device=device()
        ), tokenizer


def base_folder(folder: Path, manifest: Manifest) -> Path:
    """Where the base of an adapter is.

    Raises:
        ModelError: It is not there, or is another model than the adapter was trained on.
    """
    near = folder / manifest.base
    found = near if near.is_dir() else resolve_model(Model(path=manifest.base))
    sha256 = fingerprint(found)
    if sha256 != manifest.base_sha256:
        raise ModelError(
            f"{found}: sha256 is {sha256}, but the adapter in {folder} was trained on "
            f"{manifest.base_sha256}"
        )
    return found


def open_trained(folder: Path) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, Kind]:
    """Load a model to use it: one that a job made, or any whole model.

    Args:
        folder: The ``model`` folder of a job, or a model's. An adapter's base is held as in its
            training.

    Raises:
        ModelError: A missing or broken file, or another base than the adapter's.
    """
    manifest = read_manifest(folder)
    if manifest is not None and manifest.method != "full":
        return *_open_adapter(folder, manifest), manifest.kind
    kind: Kind = "language" if manifest is None else manifest.kind
    if manifest is None and _classifies(folder):
        kind = "classifier"
    return *open_base(folder, Model(path=str(folder)), kind), kind


def _open_adapter(
    folder: Path, manifest: Manifest, *, dequantize: bool = False
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    model = Model(path=manifest.base, quantize=manifest.quantize)
    base, tokenizer = open_base(base_folder(folder, manifest), model, manifest.kind)
    if dequantize and manifest.quantize != "none":
        base.dequantize()  # type: ignore[no-untyped-call]  # theirs
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if manifest.method in BOTTLENECKS:
            put_behind(config)
        with without_peft_noise():
            return PeftModel.from_pretrained(base, str(folder), config=config), tokenizer
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter cannot be loaded: {error}") from error


def starting_folder(path: Path, work: Path) -> Path:
    """The whole model that a job starts from: the folder itself, or base and adapter merged.

    A quantised base is dequantised first: merged into 4-bit weights, the adapter would be rounded
    with them (KL to the trained model 2.3e-2 against 4e-5).

    Args:
        path: A whole model or one that a job made.
        work: Where the merged model is put, whole or not at all; used again if it is there.

    Raises:
        ModelError: The adapter cannot be merged, or its base is not there.
    """
    manifest = read_manifest(path)
    if manifest is None or manifest.method == "full":
        return path
    if not manifest.mergeable:
        raise ModelError(
            f"{path}: an adapter of {manifest.method!r} cannot be merged into its base, so that "
            "nothing can be trained on top of it; train with "
            + ", ".join(name for name, method in METHODS.items() if method.mergeable)
        )
    if work.exists():
        return work
    model, tokenizer = _open_adapter(path, manifest, dequantize=True)
    merged = cast("Any", model).merge_and_unload()
    partial = work.with_name(work.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(work)
    return work


def identity(path: Path) -> str:
    """Hex digest of a model that a job starts from or that it made.

    Raises:
        ModelError: No weights there, or a file cannot be read.
    """
    manifest = read_manifest(path)
    if manifest is None:
        return fingerprint(path)
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{path}: no *.safetensors weights")
    return digest("trained", manifest.job.encode(), *map(_hash, weights)).hex()


def _hash(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _classifies(folder: Path) -> bool:
    config, _ = open_config(folder)
    return any("SequenceClassification" in name for name in config.architectures or ())
