"""The trainer of a simulated site: the real service and the agent's real half, without the socket.

There is no model: the update is one fixed vector and the site's own DP noise on it, from the plan's
sigma and the stream of a real trainer, so that an update with another draw is another update.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import grpc
import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedward.client import trainer_pb2 as wire
from fedward.client import trainer_pb2_grpc as rpc
from fedward.client.remote_trainer import RemoteTrainer, _Forgotten
from fedward.client.trainer import LocalTrainer
from fedward.client.trainer_service import TrainerService
from fedward.client.training import TrainRequest, TrainResult
from fedward.errors import FedwardError, ModelError
from fedward.plan import Plan
from fedward.privacy.planned import training_event
from fedward.simulations.faults.ground import LAYOUT, START, key_of
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
            start=START,
            layout=LAYOUT,
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
    """The agent's half, whose calls reach the service in this process.

    Args:
        site: The site's number.
        died: Asked after an error: whether the trainer's process died of it.
        working: Entered while the trainer works.
    """

    def __init__(self, site: int, died: Callable[[], bool], working: Callable[[], Any]) -> None:
        self._site, self._died, self._working = site, died, working
        self._on_progress, self._service = None, self._start()

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

    def _ask(
        self,
        method: Callable[[rpc.TrainerStub], Any],
        task: wire.Task,
        adapter: bytes,
        plan: Plan,
        read: Callable[[Iterator[wire.Answer]], _T],
    ) -> _T:
        """As over the socket: a trainer that dies is started again and asked once more."""
        task.adapter_bytes = len(adapter)
        tries_left = 2
        while tries_left:
            asked = [wire.Asked(task=task)]
            if not task.kept:
                asked.append(wire.Asked(adapter=adapter))
            call = method(cast("rpc.TrainerStub", self._service))
            with self._working():
                answers = call(iter(asked), cast("grpc.ServicerContext", _Context()))
                try:
                    return read(answers)
                except _Forgotten:  # a trainer that was started again
                    if not task.kept:
                        raise
                    task.kept = b""
                    continue
                except FedwardError:
                    if not self._ended(answers):
                        raise
                finally:
                    self._ended(answers)
            tries_left -= 1
        raise ModelError("the trainer died at its task twice, perhaps for want of memory")


class _Context:
    """All that the service asks of a call: the agent stays."""

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return True
