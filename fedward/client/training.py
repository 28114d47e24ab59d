"""What an agent may ask of the half of a site that sees patients, and what it gets.

The agent asks for an update and gets one flat vector; nothing else about the data comes out. Both
sides know these words; only the trainer's (:mod:`fedward.client.trainer`) loads torch.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedward.aggregation.rules import Rule
from fedward.attempt import Attempt
from fedward.plan import Plan
from fedward.tuning.vector import Layout


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What the agent asks of the trainer for one session.

    Args:
        plan: The approved plan.
        attempt: The session's attempt that the update is reserved for.
        draw: How many updates of this session have been spent before: each draws fresh noise.
        adapter: The adapter's whole state as safetensors bytes.
        layout: The trainable tensors as the coordinator sees them; must be the trainer's own.
        spent: How many updates of the run have left before, for the site's personal parts.
        counted: Under ``scaffold``: the number among those of the last that is in a committed sum.
    """

    plan: Plan
    attempt: Attempt
    draw: int
    adapter: bytes
    layout: Layout
    spent: int = 0
    counted: int | None = None

    @property
    def basis(self) -> int:
        """The number of the update, from 1, whose kept parts this one goes on from; 0: of none."""
        return self.spent if self.counted is None else self.counted

    @property
    def trained(self) -> Layout:
        """Those of them that this round trains: the order of the update."""
        return self.rule.trained

    @property
    def rule(self) -> Rule:
        """What becomes of the update."""
        return Rule(settings=self.plan.aggregation, layout=self.layout, attempt=self.attempt)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What the trainer hands to the agent; the agent masks it before anything leaves.

    Args:
        update: ``(d,)`` float32, finite: the trained parameters minus the start.
        slots: Noised metric sums, in the order of the session's slots; empty without [metrics].
    """

    update: npt.NDArray[np.float32]
    slots: npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the agent may know of an evaluation: means alone, no record's own loss.

    Args:
        loss: Mean loss.
        accuracy: Share of right classes or preferences; None for ``sft``.
        macro_f1: Mean F1 over the classes that occur; ``classify`` alone.
    """

    loss: float
    accuracy: float | None = None
    macro_f1: float | None = None


class Trainer(Protocol):
    """What an agent needs from the process that holds the data.

    Whether and how a method fails never depends on a record, with one exception that stays at the
    site: :meth:`evaluate`.
    """

    def prepare(self, request: TrainRequest) -> None:
        """Load the plan's model and compare it with the request, before anything is reserved.

        Raises:
            ModelError: The model is not the plan's or cannot be trained privately, the adapter does
                not fit it, or round 1 does not start where the plan says.
        """
        ...

    def train(self, request: TrainRequest) -> TrainResult:
        """Train as the plan says and return the update.

        Raises:
            ModelError: The model is not the plan's, or training failed.
        """
        ...

    def evaluate(self, plan: Plan, adapter: bytes, run: str) -> Scores:
        """Evaluate an adapter of a run on the site's own held-out records; stays at the site.

        Raises:
            DataError: There are none, or none fits the plan.
        """
        ...
