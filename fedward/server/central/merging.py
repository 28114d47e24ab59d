"""Several adapters of one base made into one, by PEFT.

An adapter that learned the new task and one that knows the old give one that can do both.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fedward.errors import ConfigurationError, ModelError
from fedward.server.central.job import Merge
from fedward.server.central.loading import base_folder, open_trained
from fedward.server.central.manifest import Manifest, read_manifest, write_manifest
from fedward.tuning.methods import without_peft_noise

MERGED = ("lora", "qlora", "rslora", "lora+")
"""Tuners whose adapters can be made into one."""


def merge_adapters(merge: Merge, models: list[Path], folder: Path, job: str) -> None:
    """Write the merged adapter, whole or not at all.

    Args:
        merge: How.
        models: Folders of trained adapters, in the order of ``merge.models``.
        folder: Replaced.
        job: Hex digest of all that decides the result.

    Raises:
        ConfigurationError: PEFT refuses it, as ranks that differ under ``linear``.
        ModelError: A model that is no LoRA adapter, or not of the first one's base.
    """
    manifests = [_manifest(model) for model in models]
    first = manifests[0]
    for model, manifest in zip(models, manifests, strict=True):
        if (manifest.base_sha256, manifest.quantize) != (first.base_sha256, first.quantize):
            raise ModelError(f"{model}: expected an adapter of the same base as {models[0]}'s")
    base = base_of(models[0])
    adapter: Any
    names = ["default", *(f"other{number}" for number in range(1, len(models)))]
    with without_peft_noise(), torch.random.fork_rng():
        adapter, tokenizer, _ = open_trained(models[0])
        torch.manual_seed(merge.seed)  # DARE draws which entries it drops
        try:
            for name, model in zip(names[1:], models[1:], strict=True):
                adapter.load_adapter(str(model), name)
            adapter.add_weighted_adapter(
                names,
                list(merge.weights or [1 / len(models)] * len(models)),
                "merged",
                combination_type=merge.how,
                svd_rank=merge.rank,
                density=merge.density,
            )
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"[[merges]] {merge.name}: PEFT refuses it: {error}"
            ) from error
    partial = folder.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    adapter.save_pretrained(partial / "all", selected_adapters=["merged"])
    shutil.move(partial / "all" / "merged", partial / "model")
    tokenizer.save_pretrained(partial / "model")
    near = base.is_relative_to(folder.parents[1])
    write_manifest(
        partial / "model",
        Manifest(
            kind=first.kind,
            stage=first.stage,
            method="lora",
            quantize=first.quantize,
            base=os.path.relpath(base, folder) if near else first.base,
            base_sha256=first.base_sha256,
            job=job,
            mergeable=True,
        ),
    )
    shutil.rmtree(folder, ignore_errors=True)
    (partial / "model").replace(folder)
    shutil.rmtree(partial)


def base_of(model: Path) -> Path:
    """Where the base of an adapter is.

    Raises:
        ModelError: It is no LoRA adapter, or its base is not there.
    """
    return base_folder(model, _manifest(model))


def _manifest(model: Path) -> Manifest:
    manifest = read_manifest(model)
    if manifest is None or manifest.method not in MERGED or manifest.kind != "language":
        raise ModelError(
            f"{model}: expected a language model's adapter that a job made with one of "
            f"{', '.join(MERGED)}"
        )
    return manifest
