"""Versions out of the registry: merged into one model, or as folders that other programs load."""

import json
import shutil
import warnings
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from fedward.canonical import digest
from fedward.errors import ConfigurationError, ModelError
from fedward.private_files import hold
from fedward.server.central.loading import open_trained, starting_folder
from fedward.server.central.manifest import MANIFEST, Manifest, write_manifest
from fedward.server.registry import Registry
from fedward.server.registry_card import model_card
from fedward.server.registry_version import Origin, Version
from fedward.tuning.models import fingerprint

Form = Literal["model", "adapter", "onnx"]

_SERVED = ("lora", "qlora", "rslora", "lora+")
"""Methods whose adapter vLLM can serve."""


def merge(registry: Registry, text: str, *, keys: Collection[bytes] = ()) -> Version:
    """Put in a version that is the whole model: base and adapter in one.

    A quantised base is dequantised first, so that the result is what was trained, in float32.

    Args:
        registry: Where the version is and the new one goes.
        text: ``NAME`` or ``NAME:NUMBER``; it is verified.
        keys: Public keys that may have signed beside the registry's own.

    Raises:
        ConfigurationError: There is no such version, or it is a whole model already.
        ModelError: It does not verify, its base is not here, or its tuner cannot be merged.
    """
    version = registry.verify(text, keys=keys)
    if version.method == "full":
        raise ConfigurationError(f"{version.title} is a whole model already")
    with hold(registry.folder / "merging.lock", None):
        return _merge(registry, version, registry.folder / "merging")


def _merge(registry: Registry, version: Version, work: Path) -> Version:
    shutil.rmtree(work, ignore_errors=True)
    starting_folder(registry.path(version.title), work)
    parent = registry.parent(version.title)
    origin = Origin(
        name=version.name,
        kind=version.kind,
        stage="merge",
        method="full",
        quantize="none",
        base=version.base,
        base_sha256=version.base_sha256,
        made_from=digest("merge", parent.manifest).hex(),
        whole_sha256=fingerprint(work),
        parents=(parent,),
    )

    def fill(folder: Path) -> None:
        shutil.copytree(work, folder, dirs_exist_ok=True)
        manifest = Manifest(
            kind=version.kind,
            stage=origin.stage,
            method=origin.method,
            quantize="none",
            base=version.base,
            base_sha256=version.base_sha256,
            job=origin.made_from,
            mergeable=True,
        )
        write_manifest(folder, manifest)

    added = registry.add(origin, fill)
    shutil.rmtree(work)
    return added


def export(
    registry: Registry, text: str, form: Form, out: Path, *, keys: Collection[bytes] = ()
) -> Version:
    """Write a version into a folder of its own, with a model card.

    Args:
        registry: Where it is.
        text: ``NAME`` or ``NAME:NUMBER``; it is verified.
        form: ``model``: the whole model as safetensors, for transformers and all that reads its
            folders. ``adapter``: PEFT's folder, for vLLM. ``onnx``: the whole model as a graph.
        out: Made whole or not at all.
        keys: Public keys that may have signed beside the registry's own.

    Raises:
        ConfigurationError: ``out`` is there, there is no such version, or it cannot be had in this
            form, with the reason.
        ModelError: It does not verify, its base is not here, or its tuner cannot be merged.
    """
    if out.exists():
        raise ConfigurationError(f"{out} is there already: name another --out")
    version = registry.verify(text, keys=keys)
    partial, rank = out.with_name(out.name + ".partial"), 0
    shutil.rmtree(partial, ignore_errors=True)
    if form == "adapter":
        rank = _write_adapter(registry.path(version.title), version, partial)
    elif form == "onnx":
        _check_onnx()
        _write_onnx(registry.path(version.title), version, partial)
    else:
        _write_whole(registry.path(version.title), version, partial)
    lineage = registry.lineage(version, keys=keys)
    card = model_card(version, lineage, form=form, rank=rank)
    (partial / "README.md").write_text(card, encoding="utf-8")
    partial.replace(out)
    return version


def _write_whole(folder: Path, version: Version, out: Path) -> None:
    if version.method == "full":
        shutil.copytree(folder, out, ignore=shutil.ignore_patterns(MANIFEST))
    else:
        starting_folder(folder, out)


def _write_adapter(folder: Path, version: Version, out: Path) -> int:
    """PEFT's folder, or the reason why vLLM would not serve it; returns the highest rank."""
    if version.method not in _SERVED:
        raise _refuse(version, f"vLLM serves {', '.join(_SERVED)}, not {version.method!r}")
    if version.kind != "language":
        raise _refuse(version, f"vLLM loads no trained head, and this is a {version.kind} model")
    model, tokenizer, _ = open_trained(folder)
    if not isinstance(model, PeftModel):
        raise ModelError(f"{folder}: expected an adapter")
    (name,) = model.peft_config
    config = model.peft_config[name]
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder}: expected LoRA, got {type(config).__name__}")
    for key in ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias"):
        if vars(config)[key]:
            raise _refuse(version, f"vLLM does not apply {key} = {vars(config)[key]!r}")
    if config.bias != "none" or config.trainable_token_indices or config.target_parameters:
        raise _refuse(version, "vLLM applies LoRA's A and B on linear layers, and nothing else")
    config.base_model_name_or_path = version.base
    model.save_pretrained(str(out), save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's form; ours is filled in
    tokenizer.save_pretrained(out)
    return int(config.r)


def _refuse(version: Version, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"{version.title} cannot be exported as an adapter for vLLM: {reason}; use --format model"
    )


def _check_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"--format onnx needs {' and '.join(missing)}: pip install 'fedward[onnx]'"
        )


class _Logits(torch.nn.Module):
    """A model that takes two tensors and gives one."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401  # transformers'
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, tokens, vocabulary), or (batch, classes) of a classifier."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        logits: torch.Tensor = self.model(**given).logits
        return logits


def _write_onnx(folder: Path, version: Version, out: Path) -> None:
    whole = out.with_name(out.name + ".whole")
    shutil.rmtree(whole, ignore_errors=True)
    try:
        _write_whole(folder, version, whole)
        if version.kind == "reward":
            raise ConfigurationError(f"{version.title}: a reward model is not exported as ONNX")
        model, tokenizer, _ = open_trained(whole)
        model.set_attn_implementation("eager")
        _to_onnx(model, tokenizer, out)
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def _to_onnx(model: Any, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:  # noqa: ANN401  # theirs
    out.mkdir(parents=True)
    ids = torch.tensor([[3, 4, 5, 6], [6, 5, 4, 3]])
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's words about itself
        program = torch.onnx.export(
            _Logits(model).eval(),
            (ids, torch.ones_like(ids)),
            dynamo=True,
            dynamic_shapes=(free, free),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            verbose=False,
        )
    if program is None:
        raise ModelError("torch.onnx gave no program")
    program.save(str(out / "model.onnx"), external_data=True)
    tokenizer.save_pretrained(out)
    (out / "config.json").write_text(
        json.dumps(model.config.to_dict(), indent=2, default=str) + "\n", encoding="utf-8"
    )
