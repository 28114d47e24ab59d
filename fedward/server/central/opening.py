"""The model that a command names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedward.errors import ModelError
from fedward.server.central.loading import Kind, open_trained


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
        reference: The ``model`` folder of a job, or a whole model's folder.

    Raises:
        ModelError: There is no such folder, or it cannot be loaded.
    """
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        raise ModelError(f"{reference}: no such folder; name the model folder that a job made")
    model, tokenizer, kind = open_trained(folder)
    return Opened(name=reference, folder=folder, model=model.eval(), tokenizer=tokenizer, kind=kind)
