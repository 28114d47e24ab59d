"""Clip each unit, sum, add noise, divide by a public constant: the mechanism in one place."""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.linalg import vector_norm

from fedward.errors import InvalidValue, UncoveredParameters
from fedward.privacy.accounting import SampledGaussian
from fedward.privacy.engine import UnitParameter
from fedward.privacy.noise import SecureStream
from fedward.privacy.ranks import Ranks

Noise = list[npt.NDArray[np.float32]]
"""Standard normals for each parameter, flat."""


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The public constants of private training; none is ever derived from data.

    Args:
        sampling_rate: Probability that a step draws a unit, 0 < rate <= 1.
        normaliser: Clipped sums are divided by this, > 0, whatever was drawn.
        clip: L2 bound of one unit's gradient, 1e-6 to 1e6; ``inf`` only without noise.
        noise_multiplier: Standard deviation of the noise over ``clip``, >= 0. 0 is no privacy, for
            simulation only; sampling and normaliser stay the same.
        records_per_unit: At most so many of a unit's records count in a step, >= 1.
    """

    sampling_rate: float
    normaliser: float
    clip: float
    noise_multiplier: float
    records_per_unit: int

    def __post_init__(self) -> None:
        """Check every limit."""
        self.event(1)
        if not 0 < self.normaliser < math.inf:
            raise InvalidValue("normaliser", self.normaliser, "a number above 0")
        if not (1e-6 <= self.clip <= 1e6 or math.isinf(self.clip)):
            raise InvalidValue("clip", self.clip, "1e-6 to 1e6, so that float32 can hold the sums")
        if self.noise_multiplier > 0 and math.isinf(self.clip):
            raise InvalidValue("clip", self.clip, "a finite number, because noise is scaled by it")
        if self.records_per_unit < 1:
            raise InvalidValue("records_per_unit", self.records_per_unit, "1 or more")

    def event(self, steps: int) -> SampledGaussian:
        """What so many steps cost, for the accountant."""
        return SampledGaussian(
            noise_multiplier=self.noise_multiplier, sampling_rate=self.sampling_rate, steps=steps
        )


class UnitOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus has no types
    """An optimizer that steps along a private sum of per-unit gradients.

    After each physical batch call :meth:`clip_and_accumulate` with the rows' units; ``step`` then
    releases ``(sum of clipped + noise) / normaliser``, also when nothing was accumulated, because a
    step left out would tell that nobody was drawn.

    Args:
        optimizer: Steps on the released gradient, over exactly the trainable parameters.
        mechanism: The public constants.
        stream: Source of the noise; moves on with every step.
        ranks: The processes that share the drawn units; None where this one takes all.

    Attributes:
        clipped: Units so far whose gradient was longer than the clip.
        non_finite: Units so far whose gradient was not finite, and counted as zero.
        units: Units so far.

    Guarantees:
        One unit changes the sum before noise by at most ``clip`` in L2 (up to 1e-5 of it), and
        the noise is N(0, (noise_multiplier * clip)^2) in each coordinate, in float32 throughout.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        mechanism: Mechanism,
        stream: SecureStream,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.clip,
            expected_batch_size=mechanism.normaliser,  # pyright: ignore[reportArgumentType]  # only divided by
            loss_reduction="mean",
        )
        self._stream, self._ranks = stream, ranks
        self._thread = ThreadPoolExecutor(max_workers=1)  # starts with its first work
        self._noise: Future[Noise] | None = None
        self.clipped = self.non_finite = self.units = 0

    @property
    def _units(self) -> list[UnitParameter]:
        return cast("list[UnitParameter]", self.params)

    @property
    def accumulated_iterations(self) -> int:
        """Always 1: the public normaliser alone decides the scale."""
        return 1

    def clip_and_accumulate(self, groups: list[int] | None = None) -> None:
        """Clip the gradients in ``grad_sample`` per unit and add them to ``summed_grad``.

        Args:
            groups: For each row the number of its unit in this batch, 0 and up without gaps. All
                rows of a unit must be in one batch: the clip follows their sum. Left out, each row
                is a unit.
        """
        gradients = {
            p: _per_unit(p.grad_sample, groups) for p in self._units if p.grad_sample is not None
        }
        if not gradients:
            return
        device = next(iter(gradients)).device
        # In float64: the square of 1e-23 is 0 in float32, and a norm of 0 would not be clipped.
        parts = [vector_norm(g, dim=1, dtype=torch.float64).to(device) for g in gradients.values()]
        norms = vector_norm(torch.stack(parts), dim=0)
        finite = torch.isfinite(norms)
        longer = finite & (norms > self.max_grad_norm)
        factors = torch.where(longer, self.max_grad_norm / norms, finite.double())
        all_finite = bool(finite.all())
        for parameter, gradient in gradients.items():
            if not all_finite:  # a factor of 0 alone does not do: 0 * inf is NaN, for every unit
                gradient[~finite.to(gradient.device)] = 0.0
            total = (factors.to(gradient) @ gradient).view_as(parameter)
            before = parameter.summed_grad
            parameter.summed_grad = total if before is None else before.add_(total)
            parameter.grad_sample = None
        self.units += len(norms)
        self.non_finite += int((~finite).sum())
        self.clipped += int(longer.sum())

    def begin_noise(self) -> None:
        """Draw the next step's noise, if there is any, in a thread beside the backward passes.

        The stream must not be read by anybody else until the step.
        """
        if self.noise_multiplier > 0:  # else nobody would wait for the thread
            self._noise = self._thread.submit(self._normals)

    def _normals(self) -> Noise:
        return [self._stream.normal(p.numel()).astype(np.float32) for p in self._units]

    def add_noise(self) -> None:
        """Put the noised sums into ``grad``; the noise comes from the cryptographic stream."""
        held = [(p, p.summed_grad) for p in self._units]
        totals = [torch.zeros_like(p) if total is None else total for p, total in held]
        if self._ranks is not None:
            self._ranks.add_up(totals)
        if self.noise_multiplier > 0:
            deviation = self.noise_multiplier * self.max_grad_norm
            normals = self._normals() if self._noise is None else self._noise.result()
            for total, noise in zip(totals, normals, strict=True):
                total.add_(torch.from_numpy(noise).to(total.device).view_as(total), alpha=deviation)
            self._noise = None
        for p, total in zip(self._units, totals, strict=True):
            p.grad = total
            p.summed_grad = None

    def pre_step(self, closure: Any = None) -> bool:  # noqa: ANN401  # Opacus's signature
        """Clip what is still held, noise, scale; False for a physical batch before the last."""
        self.clip_and_accumulate()
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            return False
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        self._is_last_step_skipped = False
        return True

    def release(self) -> None:
        """Leave no gradient and no attribute on the parameters, and no thread."""
        self._thread.shutdown()
        self.zero_grad(set_to_none=True)
        for p in self._units:
            del p.grad_sample, p.summed_grad


def _per_unit(rows: Tensor, groups: list[int] | None) -> Tensor:
    """Sums of the rows of each unit, shape ``(units, numel)``."""
    flat = rows.flatten(1)
    if groups is None:
        return flat
    if len(groups) != len(flat):
        raise UncoveredParameters(f"expected the units of {len(flat)} rows, got {len(groups)}")
    if groups == list(range(len(flat))):
        return flat
    index = torch.tensor(groups, device=flat.device)
    return flat.new_zeros(max(groups) + 1, flat.shape[1]).index_add_(0, index, flat)


def check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimizer steps exactly the trainable parameters, and nothing before it does.

    Raises:
        UncoveredParameters: One is missing (its gradient would be lost) or too much (it would move
            without noise); a hook takes gradients before they are clipped; states of 8 bits.
    """
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if stepped != set(trainable):
        missing = [name for key, name in trainable.items() if key not in stepped]
        raise UncoveredParameters(
            "the optimizer must hold exactly the trainable parameters; it lacks "
            f"{missing[:3] or 'none'} and has {len(stepped - set(trainable))} others"
        )
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UncoveredParameters(
                f"{name} has a gradient hook, which would see or step along gradients that nobody "
                "has clipped; remove it (optimizers that step during backward set such hooks)"
            )
    # The class is the base of theirs with 32 bits too.
    if isinstance(optimizer, Optimizer8bit) and vars(optimizer)["args"].optim_bits == 8:
        raise UncoveredParameters(
            f"{type(optimizer).__name__} keeps its states in 8 bits, but private training is held "
            "to float32 throughout; use torch.optim's"
        )
