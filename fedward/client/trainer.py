"""The half of a site that sees patients: data, model and DP-SGD, behind one narrow interface."""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedward.canonical import digest
from fedward.client.codes import LIBRARY_ERRORS, safe_repr
from fedward.client.metric_slots import metric_slots
from fedward.client.personal import PersonalParts
from fedward.client.scaffold import Variates
from fedward.client.shared_variate import adapter_sizes
from fedward.client.step_check import check_step
from fedward.client.training import Scores, TrainRequest, TrainResult
from fedward.errors import ConfigurationError, DataError, FedwardError, ModelError
from fedward.plan import Plan
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism
from fedward.privacy.planned import training_event
from fedward.privacy.training import train_steps
from fedward.tuning.adapter import flatten, from_bytes, load_adapter
from fedward.tuning.metrics import evaluate
from fedward.tuning.objectives import Encoded, collate, encode, loss_per_example
from fedward.tuning.records import Records, merge, select
from fedward.tuning.tuned import Tuned, tuned_model, with_reference
from fedward.tuning.tuners import personal, rates, trainable, training_only

_LOG = logging.getLogger(__name__)

_UNFIT = (DataError, ConfigurationError, *LIBRARY_ERRORS)
"""What a record may provoke in templates and tokenizers."""

BeforeStep = Callable[[Sequence[Tensor]], None]

Units = Sequence[Sequence[int]]
"""For each unit the numbers of its records."""


class LocalTrainer:
    """A trainer in this process.

    Args:
        records: The site's training records. With none its updates are the noise alone, because
            whether a site answers must not depend on its patients.
        held_out: Records of other patients for the site's own evaluation.
        key: 32 secret bytes from which noise and sampling derive. Only tests and simulations fix
            it; left out, it is drawn from the operating system.
        device: A torch device, for example ``cpu`` or ``cuda``.
        physical_batch: Most records in one backward pass where the plan allows more; decides
            memory, not the update.
        model: The base model's folder, in place of the plan's path.
        on_step: Called after each step with its number from 1; what it raises ends the training.
        keep: Folder of the personal parts or control variates of plans that have some.
    """

    def __init__(
        self,
        records: Records,
        *,
        held_out: Records | None = None,
        key: bytes | None = None,
        device: str = "cpu",
        physical_batch: int = 64,
        model: Path | None = None,
        on_step: Callable[[int], None] | None = None,
        keep: Path | None = None,
    ) -> None:
        if not records.units:
            _LOG.warning("this site has no training records: its updates are noise alone")
        self._records, self._held_out = records, held_out
        self._secret, self._fixed = SecureStream(key), key is not None
        self._device, self._physical_batch = device, physical_batch
        self._model, self._on_step = model, on_step
        self._personal = PersonalParts(keep)
        self._encoded: dict[tuple[bytes, bool], tuple[Units, Encoded]] = {}

    @property
    def units(self) -> int:
        """How many patients it trains on; for the site's own eyes."""
        return len(self._records.units)

    def prepare(self, request: TrainRequest) -> None:
        """See :meth:`~fedward.client.training.Trainer.prepare`."""
        check_step(self._here(request.plan), self._device)
        tuned = self.tuned(request.plan)
        if tuned.layout != request.layout:
            raise ModelError("the task's trainable tensors are not those of this site's model")
        state = from_bytes(request.adapter)
        load_adapter(tuned.model, state)
        if request.attempt.round > 1:
            return
        for name, first in from_bytes(tuned.start).items():
            # Not bit for bit: ffa's orthonormal A may differ in its last bit between machines.
            if not torch.allclose(state[name], first, rtol=0.0, atol=1e-5):
                raise ModelError(f"round 1 does not start where the plan says: {name!r} differs")

    def train(self, request: TrainRequest) -> TrainResult:
        """See :meth:`~fedward.client.training.Trainer.train`.

        Guarantees:
            In mode ``local`` the update is (epsilon, delta)-private for one unit as the plan's
            accounting of ``count + spare`` such updates says; every constant is the plan's. In mode
            ``pooled`` it is **not private**: one unit moves it by at most
            :func:`fedward.privacy.pooled.unit_bound`, and it leaves the site only with noise.
        """
        plan = request.plan
        self.prepare(request)
        model = self.tuned(plan).model
        stream = self._stream(request)
        units, encoded = self._encode(plan, self._records, held_out=False)
        if not (units or plan.privacy.enabled):
            raise DataError("this site has no training records: expected at least one patient")
        sums, pooled = list[Tensor](), plan.mode == "pooled"
        if pooled:  # the agent adds the noise, as integers, behind the rounding
            # Not divided in float32: what underflows there would move by more than the bound.
            step = mechanism(plan, normaliser=1.0, noise_multiplier=0.0)
            before_step: BeforeStep | None = _take(sums)
        else:
            step = mechanism(plan)
            before_step = _stay_near(plan.rounds.proximal) if plan.rounds.proximal else None
        variates = None
        if plan.rounds.scaffold:
            variates = Variates(request, self._personal.before(request))
            before_step = variates.correct
        sent, own = {name for name, _ in request.trained}, personal(model, plan)
        if own:
            self._personal.put(model, self._personal.before(request))
        with training_only(model, {*sent, *own}):
            start = flatten(model, sent)
            train_model(
                model,
                units,
                encoded,
                plan,
                step,
                steps=plan.rounds.steps,
                stream=stream,
                before_step=before_step,
                physical_batch=self._physical_batch,
                on_step=self._on_step,
            )
            update = _scaled(sums, plan) if pooled else flatten(model, sent) - start
            finite = np.isfinite(update).all() and np.isfinite(flatten(model)).all()
        if not finite:
            raise ModelError("training gave numbers that are not finite: lower learning_rate")
        parts: Mapping[str, Tensor] = own if variates is None else variates.after(update)
        if parts:
            self._personal.keep(request, parts)
        return TrainResult(update=update, slots=self._slots(plan, model, stream))

    def evaluate(self, plan: Plan, adapter: bytes, run: str) -> Scores:
        """See :meth:`~fedward.client.training.Trainer.evaluate`."""
        if self._held_out is None or not self._held_out.units:
            raise DataError("this site keeps no held-out records to evaluate on")
        model = self.tuned(plan).model
        load_adapter(model, from_bytes(adapter))
        if plan.tuner.personal:
            self._personal.put(model, self._personal.newest(plan, run))
        found = evaluate(model, self._encode(plan, self._held_out, held_out=True)[1])
        return Scores(loss=found.loss, accuracy=found.accuracy, macro_f1=found.macro_f1)

    def tuned(self, plan: Plan) -> Tuned:
        """The plan's model, from where this site keeps it; loaded once.

        Raises:
            ModelError: It is not there, or not the one that the plan names.
        """
        return tuned_model(self._here(plan), self._device)

    def adapter_sizes(self, plan: Plan) -> tuple[int, ...]:
        """Bytes that an adapter of the plan may have: under ``scaffold`` also with its variate."""
        tuned = self.tuned(plan)
        return adapter_sizes(plan, tuned.start, tuned.layout)

    def _here(self, plan: Plan) -> Plan:
        """The plan with the model's folder at this site in place of its path."""
        if self._model is None:
            return plan
        model = dataclasses.replace(plan.model, path=str(self._model))
        return dataclasses.replace(plan, model=model)

    def _slots(self, plan: Plan, model: nn.Module, stream: SecureStream) -> npt.NDArray[np.float64]:
        """Noised metrics of the trained model on the held-out records, where the plan asks."""
        if self._held_out is None or plan.metrics is None:
            return metric_slots(None, [], plan, stream)
        units, encoded = self._encode(plan, self._held_out, held_out=True)
        metrics = evaluate(model, encoded) if encoded.examples else None
        return metric_slots(metrics, units, plan, stream)

    def _stream(self, request: TrainRequest) -> SecureStream:
        """The secret stream of one update: never the same for two that may both leave."""
        attempt = request.attempt
        fresh = b"" if self._fixed else os.urandom(16)
        position = f"{attempt.round}/{attempt.session}/{request.draw}"
        task = digest("update", request.plan.hash(), request.adapter)
        return self._secret.child(attempt.run, position, task, fresh)

    def _encode(self, plan: Plan, records: Records, *, held_out: bool) -> tuple[Units, Encoded]:
        """The units that fit the plan, and their tokens.

        A unit with a record that does not fit (a label that is not the plan's, messages that the
        chat template refuses) counts as if its gradient were zero: an error would tell that it is
        there, and to leave out others with it would let it change more than its own share.
        """
        key = (plan.hash(), held_out)
        if key not in self._encoded:
            tuned = self.tuned(plan)
            tokenizer, units = tuned.tokenizer, records.units
            try:
                encoded = encode(records, tokenizer, plan)
            except _UNFIT as error:
                own = isinstance(error, FedwardError)
                _LOG.warning("%s; its unit is left out", error if own else safe_repr(error))
                alone = [select(records, [unit]) for unit in range(len(records.units))]
                kept = merge([part for part in alone if _fits(part, tokenizer, plan)])
                units, encoded = kept.units, encode(kept, tokenizer, plan)
            batch = min(self._physical_batch, plan.rounds.physical_batch)
            self._encoded[key] = (units, with_reference(tuned, encoded, batch_size=batch))
        return self._encoded[key]


def mechanism(
    plan: Plan, *, normaliser: float | None = None, noise_multiplier: float | None = None
) -> Mechanism:
    """The plan's DP-SGD step, alike for everyone who reads the plan.

    Args:
        plan: Sigma is the smallest multiplier for (epsilon, delta, sampling_rate,
            (count + spare) x steps).
        normaliser: Replaces the plan's, where several sites' data are trained together.
        noise_multiplier: Replaces the plan's sigma, where the noise is not this step's.
    """
    rounds, privacy = plan.rounds, plan.privacy
    if noise_multiplier is None:
        noise_multiplier = training_event(plan).noise_multiplier
    return Mechanism(
        sampling_rate=rounds.sampling_rate,
        normaliser=rounds.normaliser if normaliser is None else normaliser,
        clip=privacy.clip if privacy.enabled else math.inf,
        noise_multiplier=noise_multiplier,
        records_per_unit=privacy.records_per_unit,
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
    before_step: BeforeStep | None = None,
    physical_batch: int = 64,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Run the plan's local optimizer for some steps over one set of units, in place.

    ``before_step`` is called with the trainable parameters when their ``grad`` is clipped, noised
    and over the normaliser, before the optimizer moves along it.

    Raises:
        ModelError: Training failed. Without privacy also if no unit had a finite gradient; with it,
            the update then is the noise alone, because whether a site answers must not depend on
            its patients.
    """
    device = next(model.parameters()).device

    def loss(wrapped: nn.Module, indices: Sequence[int]) -> Tensor:
        return loss_per_example(wrapped, collate(encoded, indices, device))

    parameters = list(trainable(model).values())
    kind = torch.optim.AdamW if plan.rounds.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(rates(model, plan), weight_decay=0.0)
    if before_step is not None:
        call = before_step
        optimizer.register_step_pre_hook(lambda *_: call(parameters))
    facts = train_steps(
        model,
        units,
        loss,
        optimizer,
        step,
        steps=steps,
        stream=stream,
        # A unit's records stay together, whatever the memory.
        physical_batch=max(
            plan.privacy.records_per_unit, min(physical_batch, plan.rounds.physical_batch)
        ),
        on_step=on_step,
    )
    if 0 < facts.units == facts.non_finite:
        problem = "no patient's gradient was finite: lower learning_rate or use a wider precision"
        if not plan.privacy.enabled:
            raise ModelError(problem)
        _LOG.warning("%s; the update is noise alone", problem)


def _stay_near(weight: float) -> BeforeStep:
    """Pulls each step towards where the first one began: after clip and noise, without data."""
    starts = list[Tensor]()

    def pull(parameters: Sequence[Tensor]) -> None:
        if not starts:
            starts.extend(parameter.detach().clone() for parameter in parameters)
        for parameter, start in zip(parameters, starts, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=weight)

    return pull


def _take(taken: list[Tensor]) -> BeforeStep:
    """Takes the sums of clipped gradients before they move anything."""

    def take(parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                taken.append(parameter.grad.detach().float().cpu().flatten())
                parameter.grad = None

    return take


def _scaled(sums: Sequence[Tensor], plan: Plan) -> npt.NDArray[np.float32]:
    """The step along sums of clipped gradients, shape ``(d,)``."""
    scale = plan.rounds.learning_rate / plan.rounds.normaliser
    update: npt.NDArray[np.float32] = torch.cat(list(sums)).double().mul(-scale).float().numpy()
    return update


def _fits(records: Records, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> bool:
    try:
        encode(records, tokenizer, plan)
    except _UNFIT:
        return False
    return True
