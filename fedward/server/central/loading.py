"""Models that a job starts from and that it leaves: a whole model, or an adapter and its base."""

import hashlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedward.canonical import digest
from fedward.errors import FedwardError, ModelError
from fedward.plan import Model, Plan, from_json
from fedward.server.central.manifest import (
    ADAPTER,
    BASES,
    MANIFEST,
    PLAN,
    Kind,
    Manifest,
    read_manifest,
)
from fedward.tuning.adapter import from_bytes, load_adapter
from fedward.tuning.bottleneck import put_behind
from fedward.tuning.methods import BOTTLENECKS, METHODS, without_peft_noise
from fedward.tuning.models import (
    HEADS,
    fingerprint,
    load_base,
    open_config,
    open_weights,
    quiet,
    resolve_model,
)
from fedward.tuning.tuners import attach


def device() -> str:
    """The torch device of this process: its own GPU under torchrun, the first one, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def open_base(
    folder: Path, model: Model, kind: Kind, labels: Collection[str] = ()
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a whole model as it shall be trained or used.

    Args:
        folder: Weights, configuration and tokenizer.
        model: How the base is held; ``path`` is not looked at.
        kind: ``reward`` has a head with one output, new where the folder's is another.
        labels: The classes of a ``classifier``, whose head is new where the folder's does not know
            them all; without any it is the folder's.

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
        if kind == "reward":
            new = config.num_labels != 1
            config.num_labels = 1
        else:
            new = not set(labels) <= set((config.id2label or {}).values())
            if new:
                config.id2label = dict(enumerate(labels))
                config.label2id = {label: number for number, label in enumerate(labels)}
        return open_weights(
            AutoModelForSequenceClassification,
            folder,
            config,
            model,
            HEADS if new else (),
            device=device(),
        ), tokenizer


def base_folder(folder: Path, manifest: Manifest) -> Path:
    """Where the base of an adapter is.

    Raises:
        ModelError: It is not there, or is another model than the adapter was trained on.
    """
    near = folder / manifest.base
    if manifest.base.startswith(BASES) and not near.is_dir():
        raise ModelError(
            f"{folder}: its base, sha256 {manifest.base_sha256}, is not where it was: name its "
            "folder with --base, of fedward models merge or export"
        )
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
    model = Model(path=str(base_folder(folder, manifest)), quantize=manifest.quantize)
    plan = _plan(folder)
    base, tokenizer = (
        open_base(Path(model.path), model, manifest.kind, manifest.labels)
        if plan is None
        else load_base(model, plan.task, device=device())
    )
    if dequantize and manifest.quantize != "none":
        base.dequantize()  # type: ignore[no-untyped-call]  # theirs
    try:
        if plan is not None:
            tuned = attach(base, plan)
            load_adapter(tuned, from_bytes((folder / ADAPTER).read_bytes()))
            return tuned, tokenizer
        config = PeftConfig.from_pretrained(str(folder))
        if manifest.method in BOTTLENECKS:
            put_behind(config)
        with without_peft_noise():
            return PeftModel.from_pretrained(base, str(folder), config=config), tokenizer
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter cannot be loaded: {error}") from error


def _plan(folder: Path) -> Plan | None:
    """The plan of a federated adapter; None beside one that a job made.

    Raises:
        ModelError: It is none.
    """
    path = folder / PLAN
    if not path.exists():
        return None
    try:
        return from_json(path.read_bytes())
    except (OSError, FedwardError) as error:
        raise ModelError(f"{path}: not a frozen plan: {error}") from error


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
