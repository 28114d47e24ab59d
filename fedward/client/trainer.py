"""The half of a site that sees patients: data, model and DP-SGD, behind one narrow interface.

The agent asks for an update and gets one flat vector; nothing else about the data comes out. The
trainer opens no connection, so that it can later live in a process without a network (DESIGN §3).
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedward.attempt import Attempt
from fedward.client.metric_slots import metric_slots
from fedward.errors import DataError, ModelError
from fedward.plan import Plan
from fedward.privacy.accounting import SampledGaussian, noise_multiplier
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism
from fedward.privacy.training import train_steps
from fedward.tuning.adapter import flatten, from_bytes, load_adapter
from fedward.tuning.metrics import Metrics, evaluate
from fedward.tuning.objectives import Encoded, collate, encode, loss_per_example
from fedward.tuning.records import Records
from fedward.tuning.tuned import tuned_model
from fedward.tuning.tuners import trainable
from fedward.tuning.vector import Layout

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What the agent asks of the trainer for one session.

    Args:
        plan: The approved plan.
        attempt: The session's attempt that the update is reserved for.
        draw: How many updates of this session have been spent before: each draws fresh noise.
        adapter: The adapter's whole state as safetensors bytes.
        layout: The trainable tensors as the coordinator sees them; must be the trainer's own.
    """

    plan: Plan
    attempt: Attempt
    draw: int
    adapter: bytes
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What the trainer hands to the agent; the agent masks it before anything leaves.

    Args:
        update: ``(d,)`` float32, finite: the trained parameters minus the start.
        slots: Noised metric sums, in the order of the session's slots; empty without [metrics].
    """

    update: npt.NDArray[np.float32]
    slots: npt.NDArray[np.float64]


class Trainer(Protocol):
    """What an agent needs from the process that holds the data."""

    def train(self, request: TrainRequest) -> TrainResult:
        """Train as the plan says and return the update.

        Raises:
            DataError: The site's records do not fit the plan.
            ModelError: The model is not the plan's, or training failed.
        """
        ...

    def evaluate(self, plan: Plan, adapter: bytes) -> Metrics:
        """Evaluate an adapter on the site's own held-out records; stays at the site."""
        ...


class LocalTrainer:
    """A trainer in this process.

    Args:
        records: The site's training records.
        held_out: Records of other patients for the site's own evaluation.
        key: 32 secret bytes from which noise and sampling derive. Only tests and simulations fix
            it; left out, it is drawn from the operating system.
        device: A torch device, for example ``cpu`` or ``cuda``.
        physical_batch: Most examples in memory at once; does not change the result.
    """

    def __init__(
        self,
        records: Records,
        *,
        held_out: Records | None = None,
        key: bytes | None = None,
        device: str = "cpu",
        physical_batch: int = 64,
    ) -> None:
        self._records, self._held_out = records, held_out
        self._secret = SecureStream(key)
        self._device, self._physical_batch = device, physical_batch
        self._encoded: dict[tuple[bytes, bool], Encoded] = {}

    def train(self, request: TrainRequest) -> TrainResult:
        """See :meth:`Trainer.train`.

        Guarantees:
            The update is (epsilon, delta)-private for one unit as the plan's accounting of
            ``count + spare`` such updates says; every constant is the plan's.
        """
        plan = request.plan
        tuned = tuned_model(plan, self._device)
        model = tuned.model
        if tuned.layout != request.layout:
            raise ModelError("the task's trainable tensors are not those of this site's model")
        if not self._records.units:
            raise DataError("this site has no training records: expected at least one patient")
        load_adapter(model, from_bytes(request.adapter))
        start = flatten(model)
        stream = self._secret.child(request.attempt.run, _position(request))
        train_model(
            model,
            self._records.units,
            self._encode(plan, held_out=False),
            plan,
            mechanism(plan),
            steps=plan.rounds.steps,
            stream=stream,
            physical_batch=self._physical_batch,
        )
        update = flatten(model) - start
        if not np.isfinite(update).all():
            raise ModelError("training gave numbers that are not finite: lower learning_rate")
        return TrainResult(update=update, slots=self._slots(plan, model, stream))

    def evaluate(self, plan: Plan, adapter: bytes) -> Metrics:
        """See :meth:`Trainer.evaluate`."""
        model = tuned_model(plan, self._device).model
        load_adapter(model, from_bytes(adapter))
        return evaluate(model, self._encode(plan, held_out=True))

    def _slots(self, plan: Plan, model: nn.Module, stream: SecureStream) -> npt.NDArray[np.float64]:
        """Noised metrics of the trained model on the held-out records, where the plan asks."""
        if self._held_out is None or plan.metrics is None:
            return metric_slots(None, [], plan, stream)
        metrics = evaluate(model, self._encode(plan, held_out=True))
        return metric_slots(metrics, self._held_out.units, plan, stream)

    def _encode(self, plan: Plan, *, held_out: bool) -> Encoded:
        records = self._held_out if held_out else self._records
        if records is None:
            raise DataError("this site keeps no held-out records to evaluate on")
        key = (plan.hash(), held_out)
        if key not in self._encoded:
            self._encoded[key] = encode(records, tuned_model(plan, self._device).tokenizer, plan)
        return self._encoded[key]


def mechanism(plan: Plan, *, normaliser: float | None = None) -> Mechanism:
    """The plan's DP-SGD step, alike for everyone who reads the plan.

    Args:
        plan: Sigma is the smallest multiplier for (epsilon, delta, sampling_rate,
            (count + spare) x steps).
        normaliser: Replaces the plan's, where several sites' data are trained together.
    """
    rounds, privacy = plan.rounds, plan.privacy
    return Mechanism(
        sampling_rate=rounds.sampling_rate,
        normaliser=rounds.normaliser if normaliser is None else normaliser,
        clip=privacy.clip if privacy.enabled else math.inf,
        noise_multiplier=training_event(plan).noise_multiplier,
        records_per_unit=privacy.records_per_unit,
    )


def training_event(plan: Plan) -> SampledGaussian:
    """What one round's training costs a unit at a site."""
    rounds, privacy = plan.rounds, plan.privacy
    sigma = 0.0
    if privacy.enabled:
        sigma = noise_multiplier(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sampling_rate=rounds.sampling_rate,
            steps=(rounds.count + rounds.spare) * rounds.steps,
        )
    return SampledGaussian(
        noise_multiplier=sigma, sampling_rate=rounds.sampling_rate, steps=rounds.steps
    )


def train_model(
    model: nn.Module,
    units: Sequence[Sequence[int]],
    encoded: Encoded,
    plan: Plan,
    step: Mechanism,
    *,
    steps: int,
    stream: SecureStream,
    physical_batch: int = 64,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Run the plan's local optimizer for some steps over one set of units, in place.

    Raises:
        ModelError: Training failed. With privacy not because no unit had a finite gradient: that
            depends on patients, and whether a site answers must not, so noise alone is the update.
    """
    device = next(model.parameters()).device
    taken = 0

    def count(step: int) -> None:
        nonlocal taken
        taken = step
        if on_step is not None:
            on_step(step)

    def loss(wrapped: nn.Module, indices: Sequence[int]) -> Tensor:
        return loss_per_example(wrapped, collate(encoded, indices, device))

    parameters = list(trainable(model).values())
    kind = torch.optim.AdamW if plan.rounds.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(parameters, lr=plan.rounds.learning_rate, weight_decay=0.0)
    try:
        train_steps(
            model,
            units,
            loss,
            optimizer,
            step,
            steps=steps,
            stream=stream,
            physical_batch=physical_batch,
            on_step=count,
        )
    except ModelError as error:
        if taken < steps or not plan.privacy.enabled:
            raise
        _LOG.warning("%s; the update is noise alone", error)


def _position(request: TrainRequest) -> str:
    return f"{request.attempt.round}/{request.attempt.session}/{request.draw}"
