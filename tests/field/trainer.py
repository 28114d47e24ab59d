"""``fedward site train-service`` of one hospital of the field test: ``FOLDER HOSPITAL``.

It is the real command in its sandbox. Only the trainer's key is fixed, its noise streams are noted,
and it waits in the middle of a training where the test asks for that.
"""

import sys
from pathlib import Path
from unittest.mock import patch

from fedward import cli
from fedward.client import operations_cli
from fedward.client.sandbox import confine


def fix_trainer(root: Path, hospital: str) -> None:
    """Give the trainers of this process their key, and note every noise stream and its update."""
    from fedward.client import site_trainer
    from fedward.client.trainer import LocalTrainer
    from fedward.client.training import TrainRequest, TrainResult
    from fedward.privacy.noise import SecureStream
    from tests.field import evidence, hold, scene

    class Fixed(LocalTrainer):
        def __init__(self, records, **given):
            on_step = given.pop("on_step")

            def held(step: int) -> None:
                on_step(step)
                if step == 2:
                    hold.stay(root, hold.training(self._round))

            key = scene.secret(hospital, "noise")
            super().__init__(records, key=key, on_step=held, **given)
            self._round, self._streams = 0, list[SecureStream]()

        def _stream(self, request: TrainRequest) -> SecureStream:
            self._streams.append(super()._stream(request))
            return self._streams[-1]

        def train(self, request: TrainRequest) -> TrainResult:
            self._round = request.attempt.round
            result = super().train(request)
            evidence.mark(scene.draws_of(root), self._streams[-1]._key, result.update.tobytes())
            return result

    patch.object(site_trainer, "LocalTrainer", Fixed).start()


def main(root: str, hospital: str) -> None:
    def confine_and_fix(cache: Path) -> None:
        confine(cache)  # first of all, as the command has it
        fix_trainer(Path(root), hospital)

    patch.object(operations_cli, "confine", confine_and_fix).start()
    sys.argv = ["fedward", "site", "train-service", "--child", "--site", root]
    cli.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
