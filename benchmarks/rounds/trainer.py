"""The trainer process of one site, with a fixed update in place of a training.

The real service on the real socket: the adapter comes in, as always, and the update goes out.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedward.client.trainer import LocalTrainer
from fedward.client.trainer_service import serve
from fedward.client.training import TrainRequest, TrainResult
from fedward.plan import Plan
from fedward.tuning.tuned import Tuned
from fedward.tuning.vector import Vector, dimension, layout_from_bytes


class Fixed(LocalTrainer):
    """A trainer without model or records, which always has the same update.

    Args:
        start: The adapter that the run starts with.
        layout: Its tensors, as bytes.
        site: Makes the update another one than that of the other sites.
        seconds: How long it sleeps, as if it trained.
        marks: Where it says that it has begun a round; nowhere if it is left out.
    """

    def __init__(
        self, start: bytes, layout: bytes, site: int, seconds: float, marks: Path | None
    ) -> None:
        self._site, self._seconds, self._marks = site, seconds, marks
        self._tuned = Tuned(
            model=cast("PeftModel", None),
            tokenizer=cast("PreTrainedTokenizerBase", None),
            start=start,
            layout=layout_from_bytes(layout),
        )
        self._update = _update(dimension(self._tuned.layout), site)

    def tuned(self, plan: Plan) -> Tuned:
        """The first adapter and its layout; there is no model."""
        return self._tuned

    def prepare(self, request: TrainRequest) -> None:
        """Nothing to load."""

    def train(self, request: TrainRequest) -> TrainResult:
        """The fixed update."""
        if self._marks is not None:
            (self._marks / f"{self._site}-{request.attempt.round}").touch()
        time.sleep(self._seconds)
        return TrainResult(update=self._update, slots=np.zeros(0))


def _update(length: int, site: int) -> Vector:
    """Normal numbers of length 1/2 in all."""
    update = np.random.default_rng(site).standard_normal(length, dtype=np.float32)
    return update * np.float32(0.5 / np.sqrt(length))


def main(
    socket: str, start: str, layout: str, site: str, seconds: str = "0", marks: str | None = None
) -> None:
    """Serve until the agent is gone."""
    folder = None if marks is None else Path(marks)
    trainer = Fixed(
        Path(start).read_bytes(), Path(layout).read_bytes(), int(site), float(seconds), folder
    )

    def make(plan: Plan, dataset: str, on_step: Callable[[int], None]) -> LocalTrainer:
        return trainer

    server = serve(Path(socket), make)
    while os.read(0, 1024):
        pass
    server.stop(grace=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
