"""The trainer process of one hospital in the field test: ``python -m tests.field.trainer``.

It is the real service with the real trainer. Only its key is fixed, and it takes half a second more
for each step, so that a kill can hit the middle of a training.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fedward.client.trainer import LocalTrainer
from fedward.client.trainer_service import serve
from fedward.plan import Plan
from tests.field import scene


def main(socket: str, hospital: str) -> None:
    torch.set_num_threads(1)

    def make(plan: Plan, dataset: str, on_step: Callable[[int], None]) -> LocalTrainer:
        def slowly(step: int) -> None:
            time.sleep(0.5)
            on_step(step)

        key = scene.secret(hospital, "noise")
        return LocalTrainer(scene.records_of(hospital), key=key, on_step=slowly)

    server = serve(Path(socket), make)
    while os.read(0, 1024):  # ends with the agent, whatever becomes of it
        pass
    server.stop(grace=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
