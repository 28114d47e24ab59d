"""The model that a command names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedward.errors import ModelError
from fedward.server.central.loading import open_trained
from fedward.server.central.manifest import Kind
from fedward.server.registry import model_folder


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model to use, in evaluation mode.

    Args:
        name: As it was named.
        folder: Where it is.
        model: transformers' or PEFT's.
        tokenizer: Its tokenizer.
        kind: What it is.
    """

    name: str
    folder: Path
    model: Any
    tokenizer: Any
    kind: Kind


def open_model(reference: str) -> Opened:
    """Load the model that a command names.

    Args:
        reference: The ``model`` folder of a job, a whole model's folder, or
            ``registry:NAME:NUMBER``.

    Raises:
        ConfigurationError: There is no such version, or no registry.
        ModelError: There is no such folder, or it cannot be loaded.
    """
    folder = model_folder(reference)
    if not folder.is_dir():
        raise ModelError(f"{reference}: no such folder; name the model folder that a job made")
    model, tokenizer, kind = open_trained(folder)
    return Opened(name=reference, folder=folder, model=model.eval(), tokenizer=tokenizer, kind=kind)
