"""The trainer of a simulated site: the real service and the agent's real half, without the socket.

There is no model: the update is one fixed vector and the site's own DP noise on it, from the plan's
sigma and the stream of a real trainer, so that an update with another draw is another update.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedward.client import trainer_pb2 as wire
from fedward.client import trainer_pb2_grpc as rpc
from fedward.client.remote_trainer import RemoteTrainer, TrainerDied
from fedward.client.trainer import LocalTrainer
from fedward.client.trainer_service import TrainerService
from fedward.client.training import TrainRequest, TrainResult
from fedward.errors import FedwardError
from fedward.plan import Plan
from fedward.privacy.planned import training_event
from fedward.simulations.faults.ground import key_of, layout_of, start_of
from fedward.tuning.records import Records
from fedward.tuning.tuned import Tuned
from fedward.tuning.vector import dimension

_T = TypeVar("_T")


class FixedTrainer(LocalTrainer):
    """A trainer without model or records.

    Args:
        site: Makes update and noise those of one site.
    """

    def __init__(self, site: int) -> None:
        super().__init__(Records(rows=({},), units=((0,),)), key=key_of(site))
        self._site = site

    def tuned(self, plan: Plan) -> Tuned:
        """The first adapter and its layout."""
        return Tuned(
            model=cast("PeftModel", None),
            tokenizer=cast("PreTrainedTokenizerBase", None),
            start=start_of(plan),
            layout=layout_of(plan),
        )

    def prepare(self, request: TrainRequest) -> None:
        """Nothing to load."""

    def train(self, request: TrainRequest) -> TrainResult:
        """The fixed vector and noise."""
        length, sigma = dimension(request.layout), training_event(request.plan).noise_multiplier
        fixed = np.full(length, 0.1 * (self._site + 1))
        noise = 0.01 * sigma * self._stream(request).normal(length)
        return TrainResult(update=(fixed + noise).astype(np.float32), slots=np.zeros(0))


class SimulatedTrainer(RemoteTrainer):
    """The agent's half; only its calls do not go over a socket, but to the service in this process.

    Args:
        site: The site's number.
        died: Asked after an error: whether the trainer's process died of it.
        working: Entered while the trainer works.
    """

    def __init__(self, site: int, died: Callable[[], bool], working: Callable[[], Any]) -> None:
        super().__init__(Path(f"trainer-{site}"))  # where nobody looks
        self._site, self._died, self._working = site, died, working
        self._service = self._start()

    def _start(self) -> TrainerService:
        trainer = FixedTrainer(self._site)
        return TrainerService(lambda *_: trainer)

    def _ended(self, answers: Iterator[wire.Answer]) -> bool:
        """Let the service come to its end; if that was its death, start another."""
        for _ in answers:
            pass
        died = self._died()
        if died:
            self._service = self._start()
        return died

    def _call(
        self,
        method: Callable[[rpc.TrainerStub], Any],
        asked: Iterator[wire.Asked],
        seconds: float,
        read: Callable[[Iterator[wire.Answer]], _T],
    ) -> _T:
        """In place of the socket: a call of the service, which may die over it."""
        with self._working():
            call = method(cast("rpc.TrainerStub", self._service))
            answers = call(asked, cast("grpc.ServicerContext", _Context()))
            try:
                return read(answers)
            except FedwardError as error:
                if self._ended(answers):
                    raise TrainerDied("the trainer died at its task") from error
                raise
            finally:
                self._ended(answers)


class _Context:
    """All that the service asks of a call: the agent stays."""

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return True
