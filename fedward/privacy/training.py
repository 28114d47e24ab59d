"""Private training from top to bottom: draw units, clip, add noise, step."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedward.errors import InvalidValue, ModelError
from fedward.privacy.engine import UnitGradients
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism, UnitOptimizer, check_parameters
from fedward.privacy.ranks import Ranks, is_sharded

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What a training saw. Not private: it stays at the site and is never sent.

    Args:
        loss: Mean loss of the drawn records whose loss is finite; NaN if there was none.
        units: Units drawn, over all steps.
        clipped: Share of them whose gradient was longer than the clip.
        non_finite: Units whose gradient was not finite, and counted as zero. Where that is every
            unit, only noise was released.
        single_pass: Whether one backward pass served many units.
    """

    loss: float
    units: int
    clipped: float
    non_finite: int
    single_pass: bool


def train_steps(
    model: nn.Module,
    units: Sequence[Sequence[int]],
    loss: Callable[[nn.Module, Sequence[int]], Tensor],
    optimizer: torch.optim.Optimizer,
    mechanism: Mechanism,
    *,
    steps: int,
    stream: SecureStream,
    physical_batch: int = 32,
    ranks: Ranks | None = None,
    on_step: Callable[[int], None] | None = None,
) -> TrainingFacts:
    """Take DP-SGD steps (Abadi et al. 2016, arXiv 1607.00133) whose unit is a patient.

    Each step draws every unit with the sampling rate (Poisson), at most ``records_per_unit`` of its
    records without replacement, and moves along ``(sum of clipped + noise) / normaliser``, where a
    unit's gradient is the mean over its drawn records. An empty draw moves along the noise.

    Args:
        model: Trainable parameters in float32. It comes back as it was, without gradients.
        units: For each unit the numbers of its records; a record belongs to one unit.
        loss: Losses of the records with these numbers, shape ``(records,)``, row i depending on
            record i alone. All forwards it does with gradients have these rows in this order.
        optimizer: Over exactly the trainable parameters.
        mechanism: The public constants.
        steps: Steps to take, >= 1; each costs ``mechanism.event(1)``.
        stream: Source of draws and noise. It moves on; the same stream may serve the next call, a
            stream with the same key must not.
        physical_batch: Most records in one backward pass, at least ``records_per_unit``; decides
            memory, not the result.
        ranks: The processes that take this step together, each with the same units and with a
            stream of the same key at the same place. An error in one leaves the others waiting.
        on_step: Called after each step with its number from 1.

    Returns:
        Facts for the site's own eyes; with ``ranks``, about this process's part.

    Raises:
        UncoveredParameters: No clipping could bound what one unit changes.
        ModelError: The loss is not one number a record, or the processes have different streams.

    Guarantees:
        The optimizer's gradients are, together, ``mechanism.event(steps)`` for adding or removing
        one unit. Everything else the caller learns (facts, run time) is not covered.
    """
    if physical_batch < mechanism.records_per_unit:
        allowed = f"at least records_per_unit = {mechanism.records_per_unit}"
        raise InvalidValue("physical_batch", physical_batch, allowed)
    check_parameters(model, optimizer)
    engine = UnitGradients(model)
    if not engine.single_pass:
        _log.warning("%s", engine.coverage)
    if ranks is not None:
        ranks.agree(model, stream)
    private = UnitOptimizer(optimizer, mechanism=mechanism, stream=stream, ranks=ranks)
    training = model.training
    model.train()
    losses: list[float] = []
    try:
        for step in range(1, steps + 1):
            drawn = draw(units, mechanism, stream)
            losses += take_step(engine, private, drawn, loss, physical_batch, ranks)
            if on_step is not None:
                on_step(step)
    finally:
        private.release()
        engine.to_standard_module()
        model.train(training)
    return _facts(private, losses, single_pass=engine.single_pass)


def take_step(
    engine: UnitGradients,
    private: UnitOptimizer,
    drawn: Sequence[list[int]],
    loss: Callable[[nn.Module, Sequence[int]], Tensor],
    physical_batch: int,
    ranks: Ranks | None = None,
) -> list[float]:
    """One step over the drawn units, as :func:`train_steps` takes it; their records' losses."""
    device = engine.device
    if device.type != "cpu":  # on a CPU the thread would only take time from the backward passes
        private.begin_noise()
    share = drawn if ranks is None else ranks.share(drawn)
    losses: list[float] = []
    batches = list(physical_batches(share, physical_batch if engine.single_pass else 1))
    idle = 0
    if ranks is not None and is_sharded(engine.model):
        # In each pass the others wait for this process's part of the weights.
        idle = ranks.most(len(batches), device) - len(batches)
    for batch in batches:
        losses += _backward(engine, loss, batch)
        private.clip_and_accumulate(_groups(batch) if engine.single_pass else None)
    for _ in range(idle):
        _backward(engine, loss, drawn[:1])
        engine.drop()
    private.step()
    private.zero_grad(set_to_none=True)
    return losses


def draw(
    units: Sequence[Sequence[int]], mechanism: Mechanism, stream: SecureStream
) -> list[list[int]]:
    """Poisson-sample units, and for each drawn one at most ``records_per_unit`` of its records."""
    most = mechanism.records_per_unit
    # Uniforms are multiples of 2^-53 in (0, 1]: "at most" makes a rate of 1 draw everybody, and
    # no rate is exceeded.
    chosen = (stream.uniform(len(units)) <= mechanism.sampling_rate).nonzero()[0]
    drawn = []
    for unit in (units[int(number)] for number in chosen):
        if len(unit) > most:
            drawn.append([unit[int(place)] for place in stream.choose(len(unit), most)])
        elif len(unit) > 0:
            drawn.append(list(unit))
    return drawn


def physical_batches(drawn: Sequence[list[int]], most: int) -> Iterator[list[list[int]]]:
    """Cut drawn units into batches of at most ``most`` records, or one unit; none is split."""
    batch: list[list[int]] = []
    for unit in drawn:
        if batch and sum(map(len, batch)) + len(unit) > most:
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch


def _groups(batch: Sequence[Sequence[int]]) -> list[int]:
    return [number for number, unit in enumerate(batch) for _ in unit]


def _backward(
    engine: UnitGradients,
    loss: Callable[[nn.Module, Sequence[int]], Tensor],
    batch: Sequence[Sequence[int]],
) -> list[float]:
    """Leave the gradients of a batch's records, each over its unit's count, in ``grad_sample``."""
    records = [record for unit in batch for record in unit]
    engine.begin(len(records))
    losses = loss(engine.model, records)
    if losses.shape != (len(records),):
        raise ModelError(
            f"the loss must give one number a record, shape ({len(records)},), "
            f"not {tuple(losses.shape)}"
        )
    shares = [1 / len(unit) for unit in batch for _ in unit]
    torch.autograd.backward((losses * torch.tensor(shares, device=losses.device)).sum())
    engine.collect()
    return [float(value) for value in losses.detach().tolist()]


def _facts(private: UnitOptimizer, losses: list[float], *, single_pass: bool) -> TrainingFacts:
    finite = [value for value in losses if math.isfinite(value)]
    return TrainingFacts(
        loss=sum(finite) / len(finite) if finite else math.nan,
        units=private.units,
        clipped=private.clipped / max(1, private.units),
        non_finite=private.non_finite,
        single_pass=single_pass,
    )
