"""One unit moves what DPO and KTO release by at most the clip; what couples their records shows."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedward.plan import Data, Model, Plan, Privacy, Rounds, Task, Tuner
from fedward.privacy.audit_sensitivity import Neighbours, search
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism
from fedward.simulations.audit_rig import random_examples, shake
from fedward.tuning.objectives import (
    Encoded,
    collate,
    encoded_as,
    loss_per_example,
    preference_loss,
    referred,
    scores,
)
from fedward.tuning.small import build_llama, build_tokenizer
from fedward.tuning.tuned import tuned_model
from tests.privacy.tiny import clipped_sum, distance, released, unit_gradients

DATA = {
    "dpo": Data(prompt="prompt", chosen="chosen", rejected="rejected"),
    "kto": Data(prompt="prompt", completion="completion"),
}
RECORDS = 2

both = pytest.mark.parametrize("objective", ["dpo", "kto"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return build_llama(folder, build_tokenizer(["one two"], 300), hidden=16, layers=1, heads=2)


def plan_of(base: Any, objective: Any) -> Plan:
    return Plan(
        name="tiny",
        model=Model(path=str(base)),
        tuner=Tuner(arguments={"r": 2, "target_modules": ["q_proj", "down_proj"]}),
        task=Task(objective=objective, max_length=16, beta=0.5),
        data=DATA[objective],
        rounds=Rounds(count=1, steps=1, sampling_rate=1.0, normaliser=1.0, learning_rate=0.1),
        privacy=Privacy(records_per_unit=RECORDS),
    )


def mechanism(clip: float) -> Mechanism:
    return Mechanism(
        sampling_rate=1.0,
        normaliser=1.0,
        clip=clip,
        noise_multiplier=0.0,
        records_per_unit=RECORDS,
    )


def pairs(base: Any, objective: str, loss: Any) -> Iterator[Neighbours]:
    """Companies of several sizes, and canaries that the reference found far likelier or less."""
    plan, stream = plan_of(base, objective), SecureStream(bytes(32))
    tuned = tuned_model(plan)
    examples = random_examples(plan, len(tuned.tokenizer), 8 + RECORDS, stream)
    encoded = referred(tuned.model, encoded_as(plan, examples, 0))
    shake(tuned.model)
    for company, records, far in itertools.product((0, 1, 8), (1, RECORDS), (-60.0, 0.0, 60.0)):
        others, canary = encoded.examples[:company], encoded.examples[8 : 8 + records]
        moved = [dataclasses.replace(one, reference=one.reference + far) for one in canary]
        world = dataclasses.replace(encoded, examples=(*others, *moved))

        def call(model: nn.Module, rows: Any, world: Encoded = world) -> Tensor:
            found: Tensor = loss(model, collate(world, rows, "cpu"))
            return found

        yield Neighbours(
            name=f"{company} others, {records} records, reference moved by {far}",
            model=tuned.model,
            loss=call,
            units=tuple((number,) for number in range(company)),
            canary=tuple(range(company, company + records)),
        )


def with_a_batch_mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """KTO's own reference point: how far the batch has moved on the whole, without a gradient.

    For pairs it is not cut off at 0, as in BCO's shift of rewards (Jung et al. 2024).
    """
    found = scores(model, batch)
    lowest = None if "rejected_labels" in batch else 0.0
    point = (found - batch["reference"]).mean().clamp(min=lowest, max=1e9).detach()
    return preference_loss(found - point, batch)


@both
@pytest.mark.parametrize("clip", [0.005, 0.05, 10.0])
def test_a_unit_moves_the_sum_by_at_most_the_clip(base, objective, clip):
    found = search(pairs(base, objective, loss_per_example), mechanism(clip))
    assert found.holds, found
    assert found.clips > 1e-3


@pytest.mark.parametrize(("objective", "clip"), [("dpo", 0.1), ("kto", 0.02)])
def test_a_reference_point_of_the_batch_is_caught(base, objective, clip):
    found = search(pairs(base, objective, with_a_batch_mean), mechanism(clip))
    assert not found.holds
    assert found.pair.units, "it takes company"


@both
def test_each_records_gradient_is_its_own(base, objective):
    """The engine's rows over two forward passes of a pair equal one record at a time."""
    plan = plan_of(base, objective)
    tuned = tuned_model(plan)
    examples = random_examples(plan, len(tuned.tokenizer), 6, SecureStream(bytes(32)))
    encoded = referred(tuned.model, encoded_as(plan, examples, 0))
    shake(tuned.model)
    units = [[0], [1, 2], [3], [4, 5]]

    def loss(model: nn.Module, rows: Any) -> Tensor:
        return loss_per_example(model, collate(encoded, rows, "cpu"))

    gradients = unit_gradients(tuned.model, units, loss)
    clip = 0.5 * max(float(torch.cat([g.flatten() for g in u.values()]).norm()) for u in gradients)
    found_sum, facts = released(tuned.model, loss, mechanism(clip), units)
    assert facts.single_pass
    assert 0 < facts.clipped <= 1
    assert distance(clipped_sum(gradients, clip), found_sum) < 2e-6
