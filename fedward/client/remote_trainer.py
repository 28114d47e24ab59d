"""The agent's side of the trainer: a supervised process behind a Unix socket.

A trainer that dies mid-round is started again and trains once more. Nothing of the lost update had
left it, so the reservation that the ledger holds serves the new one (DESIGN §3).
"""

import logging
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt

from fedward.aggregation.planned import METRIC_SLOTS
from fedward.client import trainer_pb2 as wire
from fedward.client import trainer_pb2_grpc as rpc
from fedward.client.approval import approved_source
from fedward.client.sandbox import offline_environment
from fedward.client.site_folder import SiteFolder
from fedward.client.trainer_process import TrainerProcess
from fedward.client.training import Scores, TrainRequest, TrainResult
from fedward.errors import ConfigurationError, DataError, FedwardError, ModelError, PrivacyError
from fedward.plan import Plan
from fedward.tuning.vector import dimension, layout_to_bytes

_LOG = logging.getLogger(__name__)

PART_BYTES = 1 << 20
"""Most bytes of an adapter or a vector in one message."""

OPTIONS = (("grpc.max_receive_message_length", 4 << 20), ("grpc.max_metadata_size", 8192))
"""Of both ends of the socket."""

_T = TypeVar("_T")

_POLL_SECONDS = 0.2
_STATUS_SECONDS = 2.0

_ERRORS: Mapping[int, tuple[type[FedwardError], str]] = {
    wire.FAILURE_PLAN: (ConfigurationError, "the plan does not fit this site's model"),
    wire.FAILURE_MODEL: (ModelError, "model, adapter or training are not as the plan asks"),
    wire.FAILURE_DATA: (DataError, "this site has no records that the plan can use"),
    wire.FAILURE_PRIVACY: (PrivacyError, "the privacy guarantee could not be kept"),
    wire.FAILURE_LIBRARY: (ModelError, "a library failed while it trained"),
    wire.FAILURE_BUSY: (ModelError, "it is still at another task"),
    wire.FAILURE_CANCELLED: (ModelError, "it was told to stop"),
    wire.FAILURE_REQUEST: (ModelError, "it could not read the request"),
}

_LOST = {grpc.StatusCode.DEADLINE_EXCEEDED: "it took longer than the plan's deadline"}


class TrainerDied(ModelError):
    """The trainer's process ended over a request."""


class _Forgotten(ModelError):
    """The trainer was started anew, and has not the adapter that the request means."""

    def __init__(self) -> None:
        super().__init__("the trainer has not the adapter that it was sent")


class RemoteTrainer:
    """The :class:`~fedward.client.training.Trainer` of another process.

    Args:
        socket: The trainer's Unix socket.
        process: The child that listens there; None where something else supervises it.
        source: Name and hash of the data source that a plan is trained on; left out, the trainer
            has but one.
        on_progress: Called with the step at every sign of life of a trainer at work.
        start_seconds: How long a trainer may take until it listens.

    Guarantees:
        What comes back is what the plan says: a float32 vector as long as the layout, the plan's
        number of metric slots, all finite. Nothing larger is taken into memory.
    """

    def __init__(
        self,
        socket: Path,
        *,
        process: TrainerProcess | None = None,
        source: Callable[[Plan], tuple[str, bytes]] = lambda _: ("", b""),
        on_progress: Callable[[int], None] | None = None,
        start_seconds: float = 300.0,
    ) -> None:
        self._address, self._process, self._source = f"unix:{socket}", process, source
        self._on_progress, self._start_seconds = on_progress, start_seconds
        self._kept: tuple[bytes, bytes] | None = None  # by the trainer: a name and its adapter

    def prepare(self, request: TrainRequest) -> None:
        """See :meth:`fedward.client.training.Trainer.prepare`."""

        def read(answers: Iterator[wire.Answer]) -> None:
            self._next(answers, "done")

        task = _task(request)
        self._kept, task.keep = None, secrets.token_bytes(16)
        self._ask(lambda stub: stub.Prepare, task, request.adapter, request.plan, read)
        self._kept = task.keep, request.adapter

    def train(self, request: TrainRequest) -> TrainResult:
        """See :meth:`fedward.client.training.Trainer.train`."""
        slots = 0 if request.plan.metrics is None else len(METRIC_SLOTS)
        length = dimension(request.trained)

        def read(answers: Iterator[wire.Answer]) -> TrainResult:
            update = self._vector(answers, wire.TYPE_FLOAT32, length, np.dtype("<f4"))
            return TrainResult(
                update=update.astype(np.float32, copy=False),
                slots=self._vector(answers, wire.TYPE_FLOAT64, slots, np.dtype("<f8")),
            )

        task, kept, self._kept = _task(request), self._kept, None
        if kept is not None and kept[1] is request.adapter:
            task.kept = kept[0]  # it is there already
        return self._ask(lambda stub: stub.Train, task, request.adapter, request.plan, read)

    def evaluate(self, plan: Plan, adapter: bytes, run: str) -> Scores:
        """See :meth:`fedward.client.training.Trainer.evaluate`."""

        def read(answers: Iterator[wire.Answer]) -> Scores:
            scores = self._next(answers, "scores").scores
            return Scores(
                loss=scores.loss,
                accuracy=scores.accuracy if scores.HasField("accuracy") else None,
                macro_f1=scores.macro_f1 if scores.HasField("macro_f1") else None,
            )

        task = wire.Task(plan=plan.to_json(), run=run)
        return self._ask(lambda stub: stub.Evaluate, task, adapter, plan, read)

    def cancel(self) -> None:
        """Tell the trainer to give up its task; nothing happens where none listens."""
        with suppress(grpc.RpcError), grpc.insecure_channel(self._address) as channel:
            rpc.TrainerStub(channel).Cancel(wire.CancelRequest(), timeout=_STATUS_SECONDS)  # type: ignore[no-untyped-call]  # generated

    def close(self) -> None:
        """Give up and end the child, if there is one."""
        self.cancel()
        if self._process is not None:
            self._process.stop()

    def _ask(
        self,
        method: Callable[[rpc.TrainerStub], Any],
        task: wire.Task,
        adapter: bytes,
        plan: Plan,
        read: Callable[[Iterator[wire.Answer]], _T],
    ) -> _T:
        """One request and its answer, once more if the trainer dies over it."""
        task.adapter_bytes = len(adapter)
        task.dataset, task.source = self._source(plan)
        tries_left = 2
        while tries_left:
            try:
                # Longer than a stage may take, no update is of any use.
                return self._call(method, _asked(task, adapter), plan.rounds.deadline_seconds, read)
            except _Forgotten:
                if not task.kept:  # it was sent this time
                    raise
                task.kept = b""
                continue
            except TrainerDied:
                tries_left -= 1
            if tries_left:
                _LOG.warning(
                    "the trainer died at its task; it is started again and tries once more"
                )
        raise ModelError(
            "the trainer died at its task twice, perhaps for want of memory: see its log"
        )

    def _call(
        self,
        method: Callable[[rpc.TrainerStub], Any],
        asked: Iterator[wire.Asked],
        seconds: float,
        read: Callable[[Iterator[wire.Answer]], _T],
    ) -> _T:
        """One call over the socket, of a trainer that is started if it is not there.

        Raises:
            TrainerDied: It did not live to the end of its answer.
            ModelError: It took longer, or its answer is not the one that was due.
        """
        self._wait()
        with grpc.insecure_channel(self._address, options=OPTIONS) as channel:
            stub = rpc.TrainerStub(channel)  # type: ignore[no-untyped-call]  # generated
            answers = method(stub)(asked, timeout=seconds)
            try:
                return read(answers)
            except grpc.RpcError:
                code: grpc.StatusCode = answers.code()
        if self._process is not None:
            self._process.kill()  # dead, or of no more use
        if code != grpc.StatusCode.UNAVAILABLE:
            raise ModelError(f"the trainer gave no result: {_LOST.get(code, code.name)}")
        raise TrainerDied("the trainer died at its task")

    def _wait(self) -> None:
        """Wait until the trainer listens, after starting it if that is this process's duty."""
        if self._process is not None:
            self._process.start()
        end = time.monotonic() + self._start_seconds
        while not self._listens():
            if self._process is not None and self._process.pid is None:
                self._process.kill()
                raise ModelError("the trainer ended as it started: its log says why")
            if time.monotonic() > end:
                if self._process is not None:
                    self._process.kill()
                raise ModelError(
                    f"no trainer answers at {self._address} after {self._start_seconds:g} s: see "
                    "whether it runs, and its log"
                )
            time.sleep(_POLL_SECONDS)

    def _listens(self) -> bool:
        try:
            with grpc.insecure_channel(self._address, options=OPTIONS) as channel:
                stub = rpc.TrainerStub(channel)  # type: ignore[no-untyped-call]  # generated
                stub.Status(wire.StatusRequest(), timeout=_STATUS_SECONDS)
        except grpc.RpcError:
            return False
        return True

    def _next(self, answers: Iterator[wire.Answer], expected: str) -> wire.Answer:
        """The next answer that is no progress."""
        for answer in answers:
            kind = answer.WhichOneof("kind")
            if kind == "progress":
                if self._on_progress is not None:
                    self._on_progress(answer.progress.step)
                continue
            if kind == "failure":
                if answer.failure == wire.FAILURE_FORGOTTEN:
                    raise _Forgotten
                error, text = _ERRORS.get(answer.failure, (ModelError, "for no known reason"))
                raise error(f"the trainer gave no result: {text}; its log says more")
            if kind != expected:
                break
            return answer
        raise ModelError(f"the trainer's answer is not the {expected} that was due")

    def _vector(
        self, answers: Iterator[wire.Answer], kind: wire.Type, length: int, dtype: np.dtype[Any]
    ) -> npt.NDArray[Any]:
        announced = self._next(answers, "vector").vector
        if (announced.type, announced.length) != (kind, length):
            raise ModelError(
                f"the trainer announces {announced.length} numbers of type {announced.type}, but "
                f"the plan gives {length} of type {kind}"
            )
        data, filled = np.empty(length * dtype.itemsize, dtype=np.uint8), 0
        while filled < len(data):
            part = np.frombuffer(self._next(answers, "part").part, dtype=np.uint8)
            if not 0 < len(part) <= len(data) - filled:
                raise ModelError("the trainer's vector is longer than it announced")
            data[filled : filled + len(part)] = part
            filled += len(part)
        vector = data.view(dtype)
        if not np.isfinite(vector).all():
            raise ModelError("the trainer's vector has numbers that are not finite")
        return vector


def _task(request: TrainRequest) -> wire.Task:
    attempt = request.attempt
    return wire.Task(
        plan=request.plan.to_json(),
        run=attempt.run,
        round=attempt.round,
        session=attempt.session,
        attempt=attempt.attempt,
        draw=request.draw,
        layout=layout_to_bytes(request.layout),
        spent=request.spent,
        counted=request.counted,
    )


def _asked(task: wire.Task, adapter: bytes) -> Iterator[wire.Asked]:
    yield wire.Asked(task=task)
    for start in range(0, 0 if task.kept else len(adapter), PART_BYTES):
        yield wire.Asked(adapter=adapter[start : start + PART_BYTES])


def site_remote_trainer(
    folder: SiteFolder, *, child: bool, on_progress: Callable[[int], None] | None = None
) -> RemoteTrainer:
    """The trainer of a site's folder.

    Args:
        folder: The site's.
        child: Start it as a child of this process; otherwise something else runs ``fedward site
            train-service``.
        on_progress: As in :class:`RemoteTrainer`.
    """
    process = None
    if child:
        # -I: no code from the working folder or the environment.
        command = [sys.executable, "-I", "-m", "fedward", "site", "train-service", "--child"]
        command += ["--site", str(folder.root.resolve())]
        process = TrainerProcess(command, offline_environment(folder.cache))
    return RemoteTrainer(
        folder.trainer_socket,
        process=process,
        source=lambda plan: approved_source(folder, plan),
        on_progress=on_progress,
    )
