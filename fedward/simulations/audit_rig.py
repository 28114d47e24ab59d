"""What an audit trains: the plan's own model and records, or a tiny model and generated ones."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedward.errors import ConfigurationError
from fedward.plan import Model, Plan
from fedward.privacy.audit_sensitivity import Neighbours
from fedward.privacy.noise import SecureStream
from fedward.simulations.notes import vocabulary
from fedward.tuning.adapter import from_bytes, load_adapter
from fedward.tuning.models import fingerprint
from fedward.tuning.objectives import (
    Encoded,
    Example,
    collate,
    encode,
    encoded_as,
    loss_per_example,
    made_up,
)
from fedward.tuning.records import find_splits, labels_of, make_sites, read_records
from fedward.tuning.small import build_bert, build_llama, build_tokenizer
from fedward.tuning.tuned import tuned_model, with_reference
from fedward.tuning.tuners import trainable

_LENGTH = 12  # tokens of a generated record and of a canary
_LABELS = ("a", "b", "c", "d")
_MOST_UNITS = 40  # others blur the attack, and the promise holds whoever they are

Units = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Rig:
    """A model at the plan's start, and records to train it on.

    Args:
        plan: The plan, with the model that is really trained.
        subject: What is trained, for people.
        model: With its tuner.
        tokens: How many tokens the model knows.
        encoded: The records of all units.
        units: For each unit the numbers of its records.
    """

    plan: Plan
    subject: str
    model: nn.Module
    tokens: int
    encoded: Encoded
    units: Units

    def restart(self) -> None:
        """Put the model back to the plan's start."""
        load_adapter(self.model, from_bytes(tuned_model(self.plan).start))


def real_rig(plan: Plan, data: Path) -> Rig:
    """The plan's model and the training records; of several sites those of the largest.

    Raises:
        DataError: The data does not fit the plan.
        ModelError: The base model cannot be found, or is not the plan's.
    """
    records = read_records(find_splits(data)["train"], plan)
    if plan.task.objective == "classify" and not plan.task.labels:
        labels = labels_of(records, plan.data.label)
        plan = dataclasses.replace(plan, task=dataclasses.replace(plan.task, labels=labels))
    if plan.data.site is not None or plan.data.split is not None:
        records = max(make_sites(records, plan.data).values(), key=lambda site: len(site.units))
    tuned = tuned_model(plan)
    return Rig(
        plan=plan,
        subject=f"the plan's model on {len(records.units)} units of real records",
        model=tuned.model,
        tokens=len(tuned.tokenizer),
        encoded=with_reference(tuned, encode(records, tuned.tokenizer, plan)),
        units=records.units,
    )


def tiny_rig(plan: Plan, folder: Path, stream: SecureStream) -> Rig:
    """A tiny model of the plan's kind, and a few units of random records.

    Args:
        plan: Tuner, task, rounds and privacy are taken from it. Where its tuner names layers that
            neither a Llama nor a BERT has, every linear layer is tuned.
        folder: Where the model is saved.
        stream: Draws the records.
    """
    if plan.task.objective == "classify" and not plan.task.labels:
        plan = dataclasses.replace(plan, task=dataclasses.replace(plan.task, labels=_LABELS))
    plan = _with_tiny_model(plan, folder)
    tuned = tuned_model(plan)
    rounds = plan.rounds
    count = min(_MOST_UNITS, max(1, round(rounds.normaliser / rounds.sampling_rate)))
    sizes = [1 + int(n) for n in stream.integers(count, plan.privacy.records_per_unit)]
    ends = list(itertools.accumulate(sizes))
    tokens = len(tuned.tokenizer)
    padding: Any = tuned.tokenizer.pad_token_id
    return Rig(
        plan=plan,
        subject=f"a tiny {Path(plan.model.path).name} on {count} random units",
        model=tuned.model,
        tokens=tokens,
        encoded=encoded_as(plan, random_examples(plan, tokens, ends[-1], stream), padding),
        units=tuple(tuple(range(e - n, e)) for e, n in zip(ends, sizes, strict=True)),
    )


def _with_tiny_model(plan: Plan, folder: Path) -> Plan:
    """The plan over the first tiny model that its tuner fits."""
    tokenizer, labels = build_tokenizer(vocabulary(), 512), plan.task.labels
    length = max(32, min(plan.task.max_length, 4096))
    task = dataclasses.replace(plan.task, max_length=length)
    everything = {
        key: value
        for key, value in plan.tuner.arguments.items()
        if key not in {"target_modules", "layers_to_transform", "modules_to_save"}
    }
    tuners = (plan.tuner, dataclasses.replace(plan.tuner, arguments=everything))
    for tuner, build in itertools.product(tuners, (build_llama, build_bert)):
        if build is build_bert and not labels:
            continue  # an encoder sees what 'sft' learns to predict
        place = folder / build.__name__.removeprefix("build_")
        build(place, tokenizer, layers=1, max_length=length, labels=labels)
        model = Model(path=str(place), sha256=fingerprint(place), quantize=plan.model.quantize)
        small = dataclasses.replace(plan, model=model, tuner=tuner, task=task)
        try:
            tuned_model(small)
        except ConfigurationError:
            continue
        return small
    raise ConfigurationError("[tuner] fits no tiny model: audit with --data and the plan's model")


def random_examples(
    plan: Plan, tokens: int, count: int, stream: SecureStream
) -> tuple[Example, ...]:
    """Records of random tokens, with random classes where the plan classifies."""
    length = min(_LENGTH, plan.task.max_length)
    drawn = stream.integers(count * length, tokens).reshape(count, length).tolist()
    classify = plan.task.objective == "classify"
    numbers = stream.integers(count, len(plan.task.labels)).tolist() if classify else range(count)
    return tuple(
        made_up(plan, tuple(row), number) for row, number in zip(drawn, numbers, strict=True)
    )


def rig_pairs(rig: Rig, stream: SecureStream) -> Iterator[Neighbours]:
    """Neighbours on the rig's model with the plan's own loss, of records of unlike length.

    The canary is a record of random tokens, much shorter or much longer than the others, alone or
    with as many records as a unit may have.
    """
    model, padding = rig.model, rig.encoded.padding
    most = rig.plan.privacy.records_per_unit
    others = random_examples(rig.plan, rig.tokens, 4, stream)
    canaries = random_examples(rig.plan, rig.tokens, most, stream)
    sizes = sorted({1, min(most, 4)})
    for company, length, records in itertools.product((0, 4), (3, _LENGTH), sizes):
        # The others' length is what the canary's is not.
        examples = (
            *(_cut(one, _LENGTH + 3 - length) for one in others[:company]),
            *(_cut(one, length) for one in canaries[:records]),
        )
        encoded = encoded_as(rig.plan, examples, padding)

        def loss(wrapped: nn.Module, rows: Sequence[int], encoded: Encoded = encoded) -> Tensor:
            return loss_per_example(wrapped, collate(encoded, rows, "cpu"))

        yield Neighbours(
            name=f"{company} others, {records} records of {length} tokens, the plan's loss",
            model=model,
            loss=loss,
            units=tuple((number,) for number in range(company)),
            canary=tuple(range(company, len(examples))),
        )


def _cut(example: Example, length: int) -> Example:
    classify = len(example.targets) < len(example.tokens)
    return dataclasses.replace(
        example,
        tokens=example.tokens[:length],
        targets=example.targets if classify else example.targets[:length],
        rejected=example.rejected and _cut(example.rejected, length),
    )


def shake(model: nn.Module) -> None:
    """Move every trainable parameter off its start, where half of a LoRA has no gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
