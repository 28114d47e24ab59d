"""Canaries in one whole training at a site, and who watches every step of it.

The observer sees what the guarantee covers: each step's noised gradient. It knows the canaries and
the model, and looks for each canary's own gradient in what was released.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fedward.client.trainer import mechanism
from fedward.errors import ConfigurationError
from fedward.privacy.accounting import epsilon
from fedward.privacy.audit_canaries import CanaryBound, Scores, judge_canaries
from fedward.privacy.engine import UnitGradients, UnitParameter
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism
from fedward.privacy.training import train_steps
from fedward.simulations.audit_rig import Rig, random_examples
from fedward.tuning.objectives import Encoded, collate, loss_per_example
from fedward.tuning.tuners import rates, trainable

_BATCH = 64
_MOST_NUMBERS = 2**28  # 1 GiB of canary gradients


def audit_training(
    rig: Rig,
    *,
    canaries: int,
    rounds: int,
    confidence: float,
    stream: SecureStream,
    noise: bool = True,
    on_step: Callable[[int, int], None] = lambda *_: None,
) -> CanaryBound:
    """Train once with canaries and tell which were there.

    Args:
        rig: Model, and the records that canaries go among.
        canaries: Units of one random record, each in with probability 1/2; at least 20.
        rounds: Rounds of the plan, each with a new optimizer as at a site.
        confidence: Probability that the bound holds.
        stream: Draws canaries, coins, units and noise.
        noise: False leaves the noise out, and nothing else: what the attack can do at best.
        on_step: Told how many steps are done, of how many.

    Raises:
        ConfigurationError: The gradients of so many canaries need more than 1 GiB.
    """
    plan, step = rig.plan, mechanism(rig.plan)
    width = sum(p.numel() for p in trainable(rig.model).values())
    if canaries * width > _MOST_NUMBERS:
        most = _MOST_NUMBERS // width
        raise ConfigurationError(
            f"{canaries} canaries with {width} trainable numbers each need more than 1 GiB: "
            f"audit with --canaries {most} or fewer, or without --data"
        )
    steps = rounds * plan.rounds.steps
    included = stream.uniform(canaries) <= 0.5
    added = random_examples(plan, rig.tokens, canaries, stream)
    first = len(rig.encoded.examples)
    encoded = dataclasses.replace(rig.encoded, examples=(*rig.encoded.examples, *added))
    units = [*rig.units, *((first + int(number),) for number in included.nonzero()[0])]
    records = list(range(first, first + canaries))
    quiet = step if noise else dataclasses.replace(step, noise_multiplier=0.0)
    rig.restart()
    found, optimizer = np.zeros(canaries), _optimizer(rig)
    for done in range(steps):
        if done % plan.rounds.steps == 0:  # a new one in every round, as at a site
            optimizer = _optimizer(rig)
        known = _canary_gradients(rig.model, encoded, records, quiet.clip)
        released = _step(rig.model, units, encoded, optimizer, quiet, stream)
        found += _look(known, released * (quiet.normaliser / quiet.clip), quiet)
        on_step(done + 1, steps)
    claim = epsilon([step.event(steps)], plan.privacy.delta) if noise else math.inf
    return judge_canaries(
        found, included, claim=claim, delta=plan.privacy.delta, confidence=confidence
    )


def _optimizer(rig: Rig) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if rig.plan.rounds.optimizer == "adamw" else torch.optim.SGD
    return kind(rates(rig.model, rig.plan), weight_decay=0.0)


def _loss(encoded: Encoded) -> Callable[..., Tensor]:
    def loss(model: nn.Module, rows: list[int]) -> Tensor:
        return loss_per_example(model, collate(encoded, rows, next(model.parameters()).device))

    return loss


def _step(
    model: nn.Module,
    units: list[tuple[int, ...]],
    encoded: Encoded,
    optimizer: torch.optim.Optimizer,
    step: Mechanism,
    stream: SecureStream,
) -> Tensor:
    """Take one step of the engine; what it released, ``(d,)`` float32."""
    released: list[Tensor] = []

    def keep(*_: object) -> None:
        gradients = [p.grad for p in trainable(model).values()]
        released.append(torch.cat([g.flatten().cpu() for g in gradients if g is not None]))

    hook = optimizer.register_step_pre_hook(keep)
    try:
        train_steps(
            model,
            units,
            _loss(encoded),
            optimizer,
            step,
            steps=1,
            stream=stream,
            physical_batch=max(_BATCH, step.records_per_unit),
        )
    finally:
        hook.remove()
    return released[0]


def _canary_gradients(
    model: nn.Module, encoded: Encoded, records: list[int], clip: float
) -> Tensor:
    """What each canary would add to the sum, in clips: ``(canaries, d)`` float32."""
    rows: list[Tensor] = []
    training = model.training
    engine = UnitGradients(model.train())
    try:
        size = _BATCH if engine.single_pass else 1
        for start in range(0, len(records), size):
            batch = records[start : start + size]
            engine.begin(len(batch))
            torch.autograd.backward(_loss(encoded)(model, batch).sum())
            engine.collect()
            found = dict(engine.rows())
            parts = [
                found[name].flatten(1) if name in found else p.new_zeros(len(batch), p.numel())
                for name, p in trainable(model).items()
            ]
            rows.append(torch.cat(parts, dim=1).cpu())
            model.zero_grad(set_to_none=True)
            for p in trainable(model).values():
                cast("UnitParameter", p).grad_sample = None
    finally:
        engine.to_standard_module()
        model.train(training)
    gradients = torch.cat(rows)
    norms = gradients.norm(dim=1, keepdim=True).clamp(min=1e-30)
    scaled: Tensor = gradients * (1 / norms).clamp(max=1 / clip)
    return scaled


def _look(known: Tensor, released: Tensor, step: Mechanism) -> Scores:
    """How much of each canary is in one release: the posterior mean of a linear model.

    The release is a sum of canaries, each there with half the sampling rate, plus noise. Looking
    for all of them together takes out what they have in common. How much noise there is, is read
    off what the canaries do not explain: an engine that adds too little is not to be trusted.
    """
    count, width = known.shape
    together, each = (known @ known.T).double(), (known @ released).double()
    one = torch.eye(count, dtype=torch.float64)
    noise = step.noise_multiplier
    if width > 2 * count:
        explained = known.T.double() @ torch.linalg.solve(together + 1e-3 * one, each)
        rest = released.double() - explained
        noise = min(noise, float(rest.norm()) / math.sqrt(width - count))
    chance = step.sampling_rate / 2
    ridge = max(noise, 0.05) ** 2 / (chance * (1 - chance))
    scores: Scores = torch.linalg.solve(together + ridge * one, each).numpy()
    return scores
