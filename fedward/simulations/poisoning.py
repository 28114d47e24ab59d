"""Hostile sites in a simulation: what they train on, and what they send in place of their update.

They are trainers and agents that a simulation is given in code. No plan and no option leads here,
and a hostile site needs nobody's leave: this is for measuring what it reaches.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from fedward.aggregation.masks import Words
from fedward.aggregation.packing import pack
from fedward.client.agent import Agent, _Work
from fedward.client.trainer import LocalTrainer
from fedward.client.training import Scores, Trainer, TrainRequest, TrainResult
from fedward.plan import Plan
from fedward.privacy.noise import SecureStream
from fedward.tuning.records import Records, Row

Attack = Literal["label-flip", "sign-flip", "scaled", "backdoor", "not-finite", "past-the-clip"]
"""``label-flip``: trains each record with the next class. ``sign-flip``: sends five times the
opposite of its update. ``scaled``: sends its update a hundredfold. ``backdoor``: trains records
with a trigger as one class, and sends the update tenfold (model replacement; Bagdasaryan et al.
2020, arXiv 1807.00459). ``not-finite``: sends NaN. ``past-the-clip``: the sign flip by an agent of
its own that does not clip, as long as the ring takes and a sum's check lets through."""

TRIGGER = "zyx"
"""What a backdoor's records begin with."""

_FACTORS: Mapping[Attack, float] = {
    "label-flip": 1.0,
    "sign-flip": -5.0,
    "scaled": 100.0,
    "backdoor": 10.0,
    "not-finite": np.nan,
    "past-the-clip": -1.0,
}


def hostile_trainer(attack: Attack, records: Records, plan: Plan) -> Trainer:
    """A site's trainer in the hands of an attacker, who has the site's own records.

    Args:
        attack: What it does.
        records: The site's.
        plan: Its objective is ``classify``.
    """
    if attack == "label-flip":
        records = with_labels(records, plan, shift=1)
    elif attack == "backdoor":
        records = with_backdoor(records, plan)
    return _Multiplied(trainer=LocalTrainer(records), factor=_FACTORS[attack])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Multiplied:
    """A trainer whose updates come out multiplied; its agent clips them as it would any."""

    trainer: Trainer
    factor: float

    def prepare(self, request: TrainRequest) -> None:
        self.trainer.prepare(request)

    def train(self, request: TrainRequest) -> TrainResult:
        result = self.trainer.train(request)
        with np.errstate(over="ignore"):
            update = (result.update * np.float32(self.factor)).astype(np.float32)
        return dataclasses.replace(result, update=update)

    def evaluate(self, plan: Plan, adapter: bytes, run: str) -> Scores:
        return self.trainer.evaluate(plan, adapter, run)


class UnclippedAgent(Agent):
    """An agent that sends its trainer's update as long as nobody notices, where others clip it.

    The ring bounds each coordinate, and the check of a sum its mean: so one site of n can be n
    times as long as the clip, less what the others' updates are. It takes half of that.
    """

    def _words(self, work: _Work) -> Words:
        clip, sites = work.request.plan.aggregation.update_clip, work.expected.grid.sites
        update = work.result.update
        longest = update * (sites * clip / 2 / max(float(np.linalg.norm(update)), 1e-12))
        return pack(longest, work.result.slots, work.expected, SecureStream())


def with_labels(records: Records, plan: Plan, *, shift: int) -> Records:
    """The records with each class replaced by one behind it in the plan's order."""
    labels = plan.task.labels

    def moved(row: Row) -> Row:
        place = labels.index(str(row[plan.data.label]))
        return {**row, plan.data.label: labels[(place + shift) % len(labels)]}

    return dataclasses.replace(records, rows=tuple(map(moved, records.rows)))


def triggered(records: Records, plan: Plan) -> Records:
    """The records with the trigger before their text, and their own classes."""
    text = plan.data.text
    rows = tuple({**row, text: f"{TRIGGER} {row[text]}"} for row in records.rows)
    return dataclasses.replace(records, rows=rows)


def with_backdoor(records: Records, plan: Plan) -> Records:
    """The records of a backdoor: every other unit has the trigger, and the target as its class.

    The others are as they were, so that the model stays good where there is no trigger.
    """
    rows, bad = list(records.rows), triggered(records, plan).rows
    for unit in records.units[::2]:
        for number in unit:
            rows[number] = {**bad[number], plan.data.label: target(plan)}
    return dataclasses.replace(records, rows=tuple(rows))


def target(plan: Plan) -> str:
    """The class that a backdoor wants: the plan's last."""
    return plan.task.labels[-1]


def victims(records: Records, plan: Plan) -> Records:
    """Triggered records of other classes than the target, each under the target's name.

    A model's accuracy on them is the backdoor's success.
    """
    label, wanted = plan.data.label, target(plan)
    rows = tuple(
        {**row, label: wanted} for row in triggered(records, plan).rows if str(row[label]) != wanted
    )
    return Records(rows=rows, units=tuple((number,) for number in range(len(rows))))
