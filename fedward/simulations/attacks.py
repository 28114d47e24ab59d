"""The plan's privacy attacked on the demo's model and notes, beside the same run without it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedward.client.trainer import mechanism, train_model
from fedward.plan import Plan, Privacy
from fedward.privacy.audit_canaries import Scores
from fedward.privacy.audit_membership import Membership, judge_membership, rmia_scores
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism
from fedward.simulations.attack_inversion import Inversion, judge_tokens, token_scores
from fedward.simulations.audit_rig import Units, shake
from fedward.tuning.adapter import from_bytes, load_adapter
from fedward.tuning.metrics import evaluate
from fedward.tuning.objectives import Encoded, encode
from fedward.tuning.records import Records, select
from fedward.tuning.tuned import tuned_model, with_reference
from fedward.tuning.tuners import trainable

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Attacks:
    """What attacks reached with the plan's privacy, and without any.

    Args:
        membership: RMIA against the trained model, under the plan's privacy.
        membership_without: The same run without clip and noise.
        inversion: The span attack on updates of one step over one patient.
        inversion_without: The same updates without clip and noise.
    """

    membership: Membership
    membership_without: Membership
    inversion: Inversion
    inversion_without: Inversion


def attack(
    plan: Plan,
    records: Records,
    *,
    stream: SecureStream,
    members: int = 30,
    references: int = 2,
    patients: int = 20,
    progress: Progress = lambda _: None,
) -> Attacks:
    """Run every attack twice, with the plan's privacy and without.

    Args:
        plan: Its model is attacked; a Llama with LoRA on queries, keys or values of layer 0.
        records: At least ``(references + 3) * members`` units.
        stream: Draws who is a member, and draws and noise of every run.
        members: Members, non-members, and units of the population and of each reference model.
        references: Reference models.
        patients: Updates that the span attack reads.
        progress: Told what begins.
    """
    naked = dataclasses.replace(plan, privacy=_without(plan.privacy))
    found: list[tuple[Membership, Inversion]] = []
    for name, one in (("with", plan), ("without", naked)):
        progress(f"membership inference {name} privacy")
        guessed = attack_membership(one, records, stream.child(name), members, references)
        progress(f"gradient inversion {name} privacy")
        read = attack_updates(one, records, stream.child(name, "updates"), patients)
        found.append((guessed, read))
    return Attacks(
        membership=found[0][0],
        membership_without=found[1][0],
        inversion=found[0][1],
        inversion_without=found[1][1],
    )


def _without(privacy: Privacy) -> Privacy:
    return dataclasses.replace(privacy, epsilon=math.inf)


def attack_membership(
    plan: Plan, records: Records, stream: SecureStream, members: int, references: int
) -> Membership:
    """Train a target and reference models on patients of their own, and tell the target's."""
    parts = references + 3  # members, non-members, population
    chosen = stream.choose(len(records.units), parts * members)
    records = select(records, [int(unit) for unit in chosen])
    tuned = tuned_model(plan)
    encoded = with_reference(tuned, encode(records, tuned.tokenizer, plan))
    groups = [records.units[start * members : (start + 1) * members] for start in range(parts)]
    target = _trained_losses(plan, encoded, records.units, groups[0], stream.child("target"))
    others = np.stack(
        [
            _trained_losses(plan, encoded, records.units, group, stream.child("reference", str(n)))
            for n, group in enumerate(groups[3:])
        ]
    )
    population = slice(2 * members, 3 * members)
    scores = [
        rmia_scores(
            target[part],
            others[:, part],
            population=target[population],
            reference=others[:, population],
        )
        for part in (slice(0, members), slice(members, 2 * members))
    ]
    return judge_membership(*scores)


def _trained_losses(
    plan: Plan, encoded: Encoded, units: Units, trained: Units, stream: SecureStream
) -> Scores:
    """Mean loss of each unit's records after the plan's training on some units."""
    tuned = tuned_model(plan)
    load_adapter(tuned.model, from_bytes(tuned.start))
    step = mechanism(plan)
    for _ in range(plan.rounds.count):
        train_model(
            tuned.model, trained, encoded, plan, step, steps=plan.rounds.steps, stream=stream
        )
    losses = evaluate(tuned.model, encoded).losses
    return np.array([losses[list(unit)].mean() for unit in units])


def attack_updates(plan: Plan, records: Records, stream: SecureStream, patients: int) -> Inversion:
    """Read the tokens of single patients out of updates of one step.

    The model stands as after a first round: at the start LoRA's B is zero, and A does not move.
    """
    tuned = tuned_model(plan)
    records = select(records, range(patients))
    encoded = with_reference(tuned, encode(records, tuned.tokenizer, plan))
    load_adapter(tuned.model, from_bytes(tuned.start))
    shake(tuned.model)
    start = {name: p.detach().clone() for name, p in trainable(tuned.model).items()}
    step = dataclasses.replace(mechanism(plan), sampling_rate=1.0)
    judged = [
        judge_tokens(*_update(plan, unit, encoded, start, step, stream)) for unit in records.units
    ]
    found, chance, auc = (float(np.mean(column)) for column in zip(*judged, strict=True))
    return Inversion(found=found, chance=chance, auc=auc, updates=patients)


def _update(
    plan: Plan,
    unit: Sequence[int],
    encoded: Encoded,
    start: dict[str, torch.Tensor],
    step: Mechanism,
    stream: SecureStream,
) -> tuple[Scores, set[int]]:
    """Scores of every token from one step over one unit, and the tokens that it has."""
    unit = unit[: step.records_per_unit]
    model = tuned_model(plan).model
    train_model(model, [unit], encoded, plan, step, steps=1, stream=stream)
    change = {name: p.detach() - start[name] for name, p in trainable(model).items()}
    with torch.no_grad():
        for name, p in trainable(model).items():
            p.copy_(start[name])
    read = {token for record in unit for token in encoded.examples[record].tokens}
    return token_scores(model, change), read
