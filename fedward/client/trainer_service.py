"""The trainer as a process: whatever sees a record is on this side of a Unix socket.

One task at a time, in one thread; the model stays loaded between rounds. A request is checked
against the plan's own model before memory is taken for its adapter. Out of it come vectors, means
and one of a few numbers that say why there is none; the text of an error stays in the log here.
"""

import logging
import math
import queue
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent import futures
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt

from fedward import failpoints
from fedward.attempt import Attempt
from fedward.client import trainer_pb2 as wire
from fedward.client import trainer_pb2_grpc as rpc
from fedward.client.codes import safe_repr
from fedward.client.remote_trainer import OPTIONS, PART_BYTES
from fedward.client.trainer import LocalTrainer
from fedward.client.training import TrainRequest
from fedward.errors import (
    ConfigurationError,
    DataError,
    FedwardError,
    ModelError,
    PolicyRefusal,
    PrivacyError,
    ProtocolError,
)
from fedward.plan import Plan, from_json
from fedward.private_files import check_private
from fedward.tuning.vector import layout_from_bytes

_LOG = logging.getLogger(__name__)

_KEPT = 2

SIGN_OF_LIFE = 5.0
"""Seconds between two messages of a trainer at work, at most."""

MakeTrainer = Callable[[Plan, str, Callable[[int], None]], LocalTrainer]
"""Makes the trainer of a plan over a data source, with its hook after each step."""

Admit = Callable[[Plan, str, bytes], bytes]
"""Refuses a plan over a data source (by name and the hash that was approved), or says what its
trainer depends on beside them: one made under another answer serves no more."""


class _Stopped(FedwardError):
    """The agent gave the task up, or went away."""


class _Forgotten(ProtocolError):
    """A request means an adapter that this process was not sent."""


_FAILURES: tuple[tuple[type[FedwardError], wire.Failure], ...] = (
    (_Stopped, wire.FAILURE_CANCELLED),
    (_Forgotten, wire.FAILURE_FORGOTTEN),
    (ProtocolError, wire.FAILURE_REQUEST),
    (ConfigurationError, wire.FAILURE_PLAN),
    (PolicyRefusal, wire.FAILURE_PLAN),
    (ModelError, wire.FAILURE_MODEL),
    (DataError, wire.FAILURE_DATA),
    (PrivacyError, wire.FAILURE_PRIVACY),
)


class TrainerService(rpc.TrainerServicer):
    """Answers one agent.

    Args:
        make: Makes the trainer of a plan; those of the last two are kept.
        admit: Asked for every request.
        patience: Seconds that a task waits for the one before it, which may be stopping.
    """

    def __init__(
        self, make: MakeTrainer, admit: Admit = lambda *_: b"", *, patience: float = 20.0
    ) -> None:
        self._make, self._admit = make, admit
        self._trainers: dict[tuple[Plan, str], tuple[bytes, LocalTrainer]] = {}
        self._worker = futures.ThreadPoolExecutor(1, thread_name_prefix="trainer")
        self._turn, self._patience = threading.Lock(), patience
        self._stop, self._said = threading.Event(), queue.Queue[wire.Answer | None]()
        self._activity, self._step = wire.ACTIVITY_IDLE, 0
        self._kept: tuple[bytes, bytes] | None = None

    def Prepare(
        self, request_iterator: Iterator[wire.Asked], context: grpc.ServicerContext
    ) -> Iterator[wire.Answer]:
        """See :meth:`fedward.client.training.Trainer.prepare`."""
        return self._answers(
            wire.ACTIVITY_PREPARING, partial(self._prepare, request_iterator), context
        )

    def Train(
        self, request_iterator: Iterator[wire.Asked], context: grpc.ServicerContext
    ) -> Iterator[wire.Answer]:
        """See :meth:`fedward.client.training.Trainer.train`."""
        return self._answers(
            wire.ACTIVITY_TRAINING, partial(self._train, request_iterator), context
        )

    def Evaluate(
        self, request_iterator: Iterator[wire.Asked], context: grpc.ServicerContext
    ) -> Iterator[wire.Answer]:
        """See :meth:`fedward.client.training.Trainer.evaluate`."""
        return self._answers(
            wire.ACTIVITY_EVALUATING, partial(self._evaluate, request_iterator), context
        )

    def Status(
        self, request: wire.StatusRequest, context: grpc.ServicerContext
    ) -> wire.StatusReply:
        """What it is doing."""
        return wire.StatusReply(activity=self._activity, step=self._step)

    def Cancel(
        self, request: wire.CancelRequest, context: grpc.ServicerContext
    ) -> wire.CancelReply:
        """Give up before the next step."""
        self._stop.set()
        return wire.CancelReply()

    def _answers(
        self,
        activity: wire.Activity,
        work: Callable[[], Iterator[wire.Answer]],
        context: grpc.ServicerContext,
    ) -> Iterator[wire.Answer]:
        """Do the work in the trainer's thread, and pass on what it says, or a sign of life."""
        if not self._turn.acquire(timeout=self._patience):
            yield wire.Answer(failure=wire.FAILURE_BUSY)
            return
        self._stop = stop = threading.Event()
        if not context.add_callback(stop.set):  # the agent has gone already
            stop.set()
        self._said = said = queue.Queue[wire.Answer | None]()
        self._activity, self._step = activity, 0
        running = self._worker.submit(self._run, work, said)
        while True:
            try:
                answer = said.get(timeout=SIGN_OF_LIFE)
            except queue.Empty:
                answer = wire.Answer(progress=wire.Progress(step=self._step))
            if answer is None:
                break
            yield answer
        error = running.exception()
        if error is not None:
            yield wire.Answer(failure=_failure(error))

    def _run(
        self, work: Callable[[], Iterator[wire.Answer]], said: queue.Queue[wire.Answer | None]
    ) -> None:
        try:
            for answer in work():
                said.put(answer)
        finally:
            self._activity = wire.ACTIVITY_IDLE
            self._turn.release()  # here, because the agent may no longer be listening
            said.put(None)

    def _on_step(self, step: int) -> None:
        if self._stop.is_set():
            raise _Stopped("the agent gave the task up")
        self._step = step
        self._said.put(wire.Answer(progress=wire.Progress(step=step)))

    def _prepare(self, asked: Iterator[wire.Asked]) -> Iterator[wire.Answer]:
        trainer, request = self._request(asked)
        trainer.prepare(request)
        failpoints.hit("trainer.prepared")
        yield wire.Answer(done=wire.Done())

    def _train(self, asked: Iterator[wire.Asked]) -> Iterator[wire.Answer]:
        trainer, request = self._request(asked)
        result = trainer.train(request)
        failpoints.hit("trainer.trained")
        yield from _vector(wire.TYPE_FLOAT32, result.update.astype("<f4", copy=False))
        yield from _vector(wire.TYPE_FLOAT64, result.slots.astype("<f8", copy=False))
        failpoints.hit("trainer.told")

    def _evaluate(self, asked: Iterator[wire.Asked]) -> Iterator[wire.Answer]:
        task, plan = _task(asked)
        trainer = self._trainer(plan, task)
        adapter = _adapter(asked, task, trainer.adapter_sizes(plan))
        scores = trainer.evaluate(plan, adapter, task.run)
        yield wire.Answer(
            scores=wire.Scores(loss=scores.loss, accuracy=scores.accuracy, macro_f1=scores.macro_f1)
        )

    def _trainer(self, plan: Plan, task: wire.Task) -> LocalTrainer:
        """The trainer for a task: a kept one, unless what it was made of has changed since."""
        state = self._admit(plan, task.dataset, task.source)
        before, trainer = self._trainers.pop((plan, task.dataset), (b"", None))
        if trainer is None or before != state:
            trainer = None  # its records go before the new ones come
            trainer = self._make(plan, task.dataset, self._on_step)
        self._trainers[plan, task.dataset] = state, trainer
        if len(self._trainers) > _KEPT:
            del self._trainers[next(iter(self._trainers))]
        return trainer

    def _request(self, asked: Iterator[wire.Asked]) -> tuple[LocalTrainer, TrainRequest]:
        """Read a request; its adapter comes last, when its size is known to be right."""
        task, plan = _task(asked)
        attempt = Attempt(
            run=task.run, round=task.round, session=task.session, attempt=task.attempt
        )
        layout = layout_from_bytes(task.layout)
        trainer = self._trainer(plan, task)
        (kept, self._kept), expected = (self._kept, None), trainer.adapter_sizes(plan)
        if not task.kept:
            adapter = _adapter(asked, task, expected)
        elif kept is not None and kept[0] == task.kept and len(kept[1]) in expected:
            adapter = kept[1]
        else:
            raise _Forgotten("a request means an adapter that this process does not keep")
        if task.keep:
            self._kept = task.keep, adapter
        failpoints.hit("trainer.asked")
        return trainer, TrainRequest(
            plan=plan,
            attempt=attempt,
            draw=task.draw,
            adapter=adapter,
            layout=layout,
            spent=task.spent,
            counted=task.counted if task.HasField("counted") else None,
        )


def serve(socket: Path, make: MakeTrainer, admit: Admit = lambda *_: b"") -> grpc.Server:
    """Listen on a Unix socket (mode 0600) that only its owner can reach.

    Args:
        socket: In a folder of mode 0700; a dead trainer's socket there is replaced.
        make: As in :class:`TrainerService`.
        admit: As in :class:`TrainerService`.

    Returns:
        The server, started; the caller stops it.

    Raises:
        ConfigurationError: The folder is open to others, or the path is too long for a socket.
    """
    check_private(socket.parent)
    server = grpc.server(futures.ThreadPoolExecutor(4), options=OPTIONS)
    rpc.add_TrainerServicer_to_server(TrainerService(make, admit), server)  # type: ignore[no-untyped-call]  # generated
    try:
        server.add_insecure_port(f"unix:{socket}")
    except RuntimeError as error:
        raise ConfigurationError(
            f"{socket}: cannot listen there; a socket's path has at most 107 bytes"
        ) from error
    socket.chmod(0o600)
    server.start()
    return server


def _task(asked: Iterator[wire.Asked]) -> tuple[wire.Task, Plan]:
    first = next(asked, wire.Asked())
    if first.WhichOneof("kind") != "task":
        raise ProtocolError("a request must start with its task")
    return first.task, from_json(first.task.plan)


def _adapter(asked: Iterator[wire.Asked], task: wire.Task, sizes: Collection[int]) -> bytes:
    """Read an adapter of exactly a size that the plan's model gives."""
    expected = task.adapter_bytes
    if expected not in sizes:
        model = " or ".join(map(str, sizes))
        raise ModelError(f"the task's adapter has {expected} bytes, this site's model {model}")
    data = bytearray()
    for part in asked:
        if part.WhichOneof("kind") != "adapter" or len(data) + len(part.adapter) > expected:
            raise ProtocolError("an adapter's part is none, or one too many")
        data += part.adapter
    if len(data) != expected:
        raise ProtocolError("the request ended before its adapter")
    return bytes(data)


def _vector(
    kind: wire.Type, values: npt.NDArray[np.float32] | npt.NDArray[np.float64]
) -> Iterator[wire.Answer]:
    yield wire.Answer(vector=wire.Vector(type=kind, length=len(values)))
    data = memoryview(values.tobytes())
    for part in range(math.ceil(len(data) / PART_BYTES)):
        yield wire.Answer(part=bytes(data[part * PART_BYTES : (part + 1) * PART_BYTES]))


def _failure(error: BaseException) -> wire.Failure:
    """A number for the agent; of a library's error not even the log gets the text."""
    if not isinstance(error, FedwardError):
        _LOG.warning("a library failed: %s", safe_repr(error))
        return wire.FAILURE_LIBRARY
    _LOG.warning("%s", error)
    for kind, failure in _FAILURES:
        if isinstance(error, kind):
            return failure
    return wire.FAILURE_LIBRARY
