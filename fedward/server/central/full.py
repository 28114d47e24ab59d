"""The coordinator's full training at its smallest: every parameter, no privacy, on public data.

It prepares the base model that sites then adapt, and never sees a site's record. The loop is AdamW
with a linear warm-up and a cosine decay. The rate, the batch and the dropout of a step follow from
the seed and the step's number alone, so a training that was killed goes on from its last checkpoint
to exactly the weights that it would have reached.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedward.canonical import canonical_json, digest
from fedward.errors import ConfigurationError, InvalidValue, ModelError

Loss: TypeAlias = Callable[[nn.Module, Sequence[int]], Tensor]
"""Per-example losses, shape (B,), of the examples with these indices."""


@dataclass(frozen=True, kw_only=True)
class FullTraining:
    """How to train all parameters.

    Args:
        steps: Optimizer steps, 1 or more.
        batch_size: Examples a step, 1 or more; every example is used once before any is used again.
        learning_rate: The highest rate, > 0.
        warmup: Share of the steps in which the rate rises from zero, 0 to 1.
        weight_decay: AdamW's decoupled decay, 0 or more (Loshchilov and Hutter 2019, Algorithm 2).
        max_norm: L2 bound of a step's gradient, > 0.
        seed: Order of the examples and dropout, 0 or more.
        save_every: Steps between checkpoints, 1 or more.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_norm: float = 1.0
    seed: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        """Check every limit."""
        for key in ("steps", "batch_size", "save_every"):
            count: int = dataclasses.asdict(self)[key]
            if count < 1:
                raise InvalidValue(key, count, "1 or more")
        for key in ("learning_rate", "max_norm"):
            value: float = dataclasses.asdict(self)[key]
            if not 0 < value < math.inf:
                raise InvalidValue(key, value, "a number above 0")
        if not 0 <= self.warmup <= 1:
            raise InvalidValue("warmup", self.warmup, "0 to 1")
        if not 0 <= self.weight_decay < math.inf:
            raise InvalidValue("weight_decay", self.weight_decay, "0 or more")
        if self.seed < 0:
            raise InvalidValue("seed", self.seed, "0 or more")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0.

        >>> plan = FullTraining(steps=10, batch_size=1, learning_rate=1.0, warmup=0.2)
        >>> [round(plan.rate(step), 3) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.038]
        """
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train_full(
    model: nn.Module,
    examples: int,
    loss: Loss,
    settings: FullTraining,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train every parameter of a model in place.

    Args:
        model: Left in training mode, with its gradients dropped.
        examples: How many there are, 1 or more; ``loss`` is asked for 0 to ``examples - 1``.
        loss: The losses of some examples.
        settings: What to do.
        checkpoint: A file that is replaced atomically every ``save_every`` steps and at the end. If
            it is there, training goes on from it.
        on_step: Told the number of steps done and the last mean loss.

    Returns:
        The mean loss of every step, those before a resumption included.

    Raises:
        ModelError: The loss stopped being finite.
        ConfigurationError: There are no examples, or the checkpoint is of another training.
    """
    if examples < 1:
        raise ConfigurationError("central training needs at least one example, got none")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    identity = _identity(model, examples, settings)
    losses = list[float]()
    if checkpoint is not None and checkpoint.exists():
        losses = _load(checkpoint, model, optimizer, identity)
    model.train()
    for step in range(len(losses), settings.steps):
        losses.append(_step(model, optimizer, examples, loss, settings, step))
        done = step + 1
        if checkpoint is not None and (done % settings.save_every == 0 or done == settings.steps):
            _save(checkpoint, model, optimizer, identity, losses)
        if on_step is not None:
            on_step(done, losses[-1])
    optimizer.zero_grad(set_to_none=True)
    return losses


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: int,
    loss: Loss,
    settings: FullTraining,
    step: int,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(step)
    optimizer.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest("dropout", f"{settings.seed} {step}")[:8], "big"))
        mean = loss(model, batch_of(step, examples, settings)).mean()
        torch.autograd.backward(mean)
    value = mean.item()
    if not math.isfinite(value):
        raise ModelError(
            f"the loss of step {step + 1} is {value}: lower the learning rate "
            f"({settings.learning_rate:g}) or use a wider number format"
        )
    nn.utils.clip_grad_norm_(model.parameters(), settings.max_norm)
    optimizer.step()
    return value


def batch_of(step: int, examples: int, settings: FullTraining) -> list[int]:
    """The examples of one step: a piece of a new order of all of them in every epoch."""
    size = settings.batch_size
    positions = range(step * size, (step + 1) * size)
    epochs = {position // examples for position in positions}
    orders = {epoch: _order(settings.seed, epoch, examples) for epoch in epochs}
    return [int(orders[place // examples][place % examples]) for place in positions]


def _order(seed: int, epoch: int, examples: int) -> np.ndarray:
    uniform = np.random.Generator(np.random.PCG64((seed, epoch))).random(examples)
    return np.argsort(uniform, kind="stable")


def _identity(model: nn.Module, examples: int, settings: FullTraining) -> str:
    """What a checkpoint must have been made with: settings, data size and the model's layout.

    ``save_every`` is left out, because it changes nothing.
    """
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    fields = dataclasses.asdict(settings)
    del fields["save_every"]
    return digest("full training", canonical_json([examples, fields, shapes])).hex()


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: str,
    losses: Sequence[float],
) -> None:
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"identity": identity, "losses": json.dumps(list(losses))})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: str
) -> list[float]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != identity:
                raise ConfigurationError(
                    f"{path} is a checkpoint of another training (other settings, data or model): "
                    "remove it, or train with what it was made with"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no dict
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{path} is not a readable checkpoint: remove it") from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    losses: list[float] = json.loads(metadata["losses"])
    return losses
