"""Layer A of the audit: how far one unit can move what is released, before any noise.

The guarantee rests on one fact about code: whoever the others are, adding or removing one unit
moves the clipped sum by at most the clip. The search compares what the engine itself releases for
many pairs of data sets that differ in one unit. It can refute the fact, never prove it.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedward.privacy import training
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism

TOLERANCE = 1.0001
"""Most sensitivity, in clips, that rounding explains."""

_FEATURES, _CLASSES = 12, 4

Loss = Callable[[nn.Module, Sequence[int]], Tensor]
"""As for :func:`~fedward.privacy.training.train_steps`."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Two data sets that differ in one unit.

    Args:
        name: What is special about them, for people.
        model: What both train; it is never changed.
        loss: Losses of records by number.
        units: Record numbers of every unit that both have.
        canary: Record numbers of the unit that only one of them has.
    """

    name: str
    model: nn.Module
    loss: Loss
    units: tuple[tuple[int, ...], ...]
    canary: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The largest change that was found.

    Args:
        clips: Its length in clips; ``inf`` where one data set released nothing.
        pair: The neighbours that showed it; where several did, the ones with the fewest units.
        tried: How many pairs were compared.
    """

    clips: float
    pair: Neighbours
    tried: int

    @property
    def holds(self) -> bool:
        """Whether no pair passed the clip by more than rounding."""
        return self.clips <= TOLERANCE


def releases(
    pair: Neighbours,
    mechanism: Mechanism,
    *,
    canary: bool,
    steps: int = 1,
    stream: SecureStream | None = None,
) -> Tensor:
    """What the engine of a site releases for one of two neighbours, step by step.

    Args:
        pair: The neighbours.
        mechanism: The public constants.
        canary: Whether the unit that makes the difference is there.
        steps: Steps, >= 1; the model stands still.
        stream: Source of draws and noise; left out, the operating system.

    Returns:
        ``(steps, d)`` float32; a step that released nothing is a row of NaN.
    """
    parameters = [p for p in pair.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    nothing = torch.full((sum(p.numel() for p in parameters),), math.nan)
    rows: list[Tensor] = []
    released: list[Tensor] = []

    def keep(*_: object) -> None:
        released.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))

    def end(_: int) -> None:
        rows.append(released.pop() if released else nothing)

    optimizer.register_step_pre_hook(keep)
    training.train_steps(
        pair.model,
        [*pair.units, pair.canary] if canary else pair.units,
        pair.loss,
        optimizer,
        mechanism,
        steps=steps,
        stream=stream or SecureStream(),
        physical_batch=max(32, mechanism.records_per_unit),
        on_step=end,
    )
    return torch.stack(rows)


def difference(pair: Neighbours, mechanism: Mechanism) -> tuple[Tensor, Tensor]:
    """The noiseless release without the canary, and what the canary adds, when all are drawn.

    Returns:
        Both ``(d,)`` float64, in clips; NaN where nothing was released.
    """
    quiet = dataclasses.replace(mechanism, sampling_rate=1.0, noise_multiplier=0.0)
    without, with_it = (
        releases(pair, quiet, canary=canary)[0].double() * mechanism.normaliser / mechanism.clip
        for canary in (False, True)
    )
    return without, with_it - without


def search(pairs: Iterable[Neighbours], mechanism: Mechanism) -> Sensitivity:
    """Compare every pair and keep the one that differs most.

    Args:
        pairs: At least one.
        mechanism: The public constants; noise and sampling are switched off for the comparison.
    """
    found: list[tuple[float, Neighbours]] = []
    for pair in pairs:
        moved = float(difference(pair, mechanism)[1].norm())
        found.append((math.inf if math.isnan(moved) else moved, pair))
    # Rounding must not decide which pair stands for the rest: small ones are cheaper to attack.
    clips, pair = max(found, key=lambda one: (round(one[0], 3), -len(one[1].units)))
    return Sensitivity(clips=max(clips, *(c for c, _ in found)), pair=pair, tried=len(found))


class Micro(nn.Module):
    """A LoRA of rank 2 over one frozen linear layer, with a B that is not zero."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = nn.Linear(_FEATURES, _CLASSES, bias=False).requires_grad_(False)
        self.a = nn.Linear(_FEATURES, 2, bias=False)
        self.b = nn.Linear(2, _CLASSES, bias=False)
        for layer in (self.base, self.a, self.b):
            nn.init.normal_(layer.weight, std=0.3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape ``(rows, classes)``."""
        logits: Tensor = self.base(x) + self.b(self.a(x))
        return logits


def micro_loss(data: Tensor, labels: Tensor) -> Loss:
    """Cross entropy of each record, for :class:`Micro`."""

    def loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
        return cross_entropy(model(data[list(rows)]), labels[list(rows)], reduction="none")

    return loss


def micro_pairs(
    mechanism: Mechanism, loss_of: Callable[[Tensor, Tensor], Loss] = micro_loss
) -> Iterator[Neighbours]:
    """Neighbours on a micro model: how many others there are, and what the canary is like.

    Args:
        mechanism: Its clip sets the scale of the canary's gradient, its ``records_per_unit`` how
            many records the canary has.
        loss_of: Makes the loss from the features ``(records, 12)`` and classes ``(records,)`` of
            all records; record 0 belongs to no unit.
    """
    model, generator = Micro(), torch.Generator().manual_seed(1)
    sizes = sorted({1, mechanism.records_per_unit})
    kinds = ("", "another's record", "another's opposite")
    for others, scale, records, like in itertools.product(
        (0, 1, 4, 16), (0.05, 1.0, 400.0), sizes, kinds
    ):
        first = 1 + others
        data = torch.randn(first + records, _FEATURES, generator=generator)
        labels = torch.randint(_CLASSES, (len(data),), generator=generator)
        if like:
            data[first:], labels[first:] = data[first - 1], labels[first - 1]
        if like == kinds[1]:
            labels[first:] = (labels[first:] + 1) % _CLASSES
        data[first:] *= scale * mechanism.clip * (-1 if like == kinds[2] else 1)
        yield Neighbours(
            name=f"{others} others, {records} records {scale:g} times the clip"
            + (f", like {like}" if like else ""),
            model=model,
            loss=loss_of(data, labels),
            units=tuple((number,) for number in range(1, first)),
            canary=tuple(range(first, first + records)),
        )
