"""A trainer behind a socket is the trainer of this process, bit for bit, and may die."""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import numpy as np
import pytest

from fedward.attempt import Attempt
from fedward.client import remote_trainer
from fedward.client import trainer_pb2 as wire
from fedward.client import trainer_pb2_grpc as rpc
from fedward.client.remote_trainer import RemoteTrainer
from fedward.client.trainer import LocalTrainer
from fedward.client.trainer_process import TrainerProcess
from fedward.client.trainer_service import serve
from fedward.client.training import TrainRequest, TrainResult
from fedward.errors import ConfigurationError, DataError, ModelError
from fedward.plan import Metrics, Plan
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import replace_vector
from tests.simulations import tiny


def request(plan: Plan, number: int = 1) -> TrainRequest:
    tuned = tuned_model(plan)
    return TrainRequest(
        plan=plan,
        attempt=Attempt(run="r", round=number),
        draw=0,
        adapter=tuned.start,
        layout=tuned.layout,
    )


def local(on_step: Callable[[int], None] | None = None) -> LocalTrainer:
    return LocalTrainer(
        tiny.make_records("a", 4),
        held_out=tiny.make_records("b", 3),
        key=tiny.key("a"),
        on_step=on_step,
    )


@pytest.fixture
def socket(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir(mode=0o700)
    return folder / "t.sock"


@pytest.fixture
def remote(socket):
    """The trainer of :func:`local` behind a socket."""
    server = serve(socket, lambda plan, dataset, on_step: local(on_step))
    yield RemoteTrainer(socket, start_seconds=5)
    server.stop(None).wait()


def test_an_update_crosses_the_socket_bit_for_bit(base, remote):
    plan = tiny.make_plan(
        base, rounds=tiny.make_rounds(steps=3), metrics=Metrics(epsilon=1.0, loss_bound=4.0)
    )
    for number in (1, 2):
        here, there = local(), remote
        here.prepare(request(plan, number))
        there.prepare(request(plan, number))
        mine, theirs = here.train(request(plan, number)), there.train(request(plan, number))
        assert mine.update.tobytes() == theirs.update.tobytes()
        assert mine.slots.tobytes() == theirs.slots.tobytes()
        assert (theirs.update.dtype, theirs.slots.dtype) == (np.float32, np.float64)
        assert len(theirs.slots) == 3
    adapter = tuned_model(plan).start
    assert here.evaluate(plan, adapter, "r") == there.evaluate(plan, adapter, "r")


@pytest.fixture
def sent(monkeypatch):
    """How many parts of an adapter each request had."""
    counts, asked = list[int](), remote_trainer._asked

    def count(task: wire.Task, adapter: bytes) -> Iterator[wire.Asked]:
        counts.append(0)
        for part in asked(task, adapter):
            counts[-1] += part.WhichOneof("kind") == "adapter"
            yield part

    monkeypatch.setattr(remote_trainer, "_asked", count)
    return counts


def test_an_adapter_that_was_prepared_is_not_sent_again(base, remote, sent):
    plan = tiny.make_plan(base)
    expected = local().train(request(plan)).update.tobytes()
    remote.prepare(request(plan))
    assert remote.train(request(plan)).update.tobytes() == expected
    assert sent == [1, 0]
    remote.train(request(plan))  # the trainer has given it back
    remote.prepare(request(plan))
    changed = request(plan, 2)
    other = replace_vector(changed.adapter, changed.layout, np.zeros(len(expected) // 4, "f4"))
    remote.train(dataclasses.replace(changed, adapter=other))
    assert sent == [1, 0, 1, 1, 1]


def test_a_trainer_that_was_started_anew_gets_the_adapter_again(base, socket, sent):
    plan, remote = tiny.make_plan(base), RemoteTrainer(socket, start_seconds=5)
    expected = local().train(request(plan)).update.tobytes()
    found = list[TrainResult | None]()
    for step in (remote.prepare, remote.train):
        server = serve(socket, lambda plan, dataset, on_step: local(on_step))
        found.append(step(request(plan)))
        server.stop(None).wait()
    assert found[1] is not None
    assert found[1].update.tobytes() == expected
    # Asked by name alone, if the connection to the new one is there at the first try.
    assert sent in ([1, 0, 1], [1, 1, 1])


def test_a_vector_of_many_parts_arrives_whole(base, remote, monkeypatch):
    monkeypatch.setattr("fedward.client.trainer_service.PART_BYTES", 100)
    monkeypatch.setattr("fedward.client.remote_trainer.PART_BYTES", 100)
    plan = tiny.make_plan(base)
    found = remote.train(request(plan)).update
    assert found.nbytes > 1000
    assert found.tobytes() == local().train(request(plan)).update.tobytes()


def test_progress_is_told(base, socket, remote):
    plan, steps = tiny.make_plan(base, rounds=tiny.make_rounds(steps=3)), list[int]()
    RemoteTrainer(socket, on_progress=steps.append).train(request(plan))
    assert [step for step in dict.fromkeys(steps) if step] == [1, 2, 3]


def test_errors_keep_their_kind_and_lose_their_text(base, socket):
    plan, error = tiny.make_plan(base), list[Exception]()

    def fails(plan: Plan, dataset: str, on_step: Callable[[int], None]) -> LocalTrainer:
        raise error[0]

    server = serve(socket, fails)
    remote = RemoteTrainer(socket)
    for raised, seen in (
        (DataError("CANARY"), DataError),
        (ModelError("CANARY"), ModelError),
        (ConfigurationError("CANARY"), ConfigurationError),
        (ZeroDivisionError("CANARY"), ModelError),
    ):
        error[:] = [raised]
        with pytest.raises(seen, match="its log says more") as caught:
            remote.train(request(plan))
        assert "CANARY" not in str(caught.value)
    server.stop(None).wait()


class Odd(rpc.TrainerServicer):
    """A trainer's socket with somebody else behind it."""

    answers: tuple[wire.Answer, ...] = ()

    def Train(
        self, request_iterator: Iterator[wire.Asked], context: grpc.ServicerContext
    ) -> Iterator[wire.Answer]:
        yield from self.answers

    def Status(
        self, request: wire.StatusRequest, context: grpc.ServicerContext
    ) -> wire.StatusReply:
        return wire.StatusReply()


def vector(kind: wire.Type, length: int) -> wire.Answer:
    return wire.Answer(vector=wire.Vector(type=kind, length=length))


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ([], "that was due"),
        ([wire.Answer()], "that was due"),
        ([wire.Answer(done=wire.Done())], "not the vector"),
        ([vector(wire.TYPE_FLOAT32, 1 << 40)], "announces 1099511627776"),
        ([vector(wire.TYPE_FLOAT64, 384)], "of type 2"),
        ([vector(wire.TYPE_FLOAT32, 384)], "not the part"),
        ([vector(wire.TYPE_FLOAT32, 384), wire.Answer(part=b"")], "longer than"),
        ([vector(wire.TYPE_FLOAT32, 384), wire.Answer(part=bytes(4 * 385))], "longer than"),
        ([vector(wire.TYPE_FLOAT32, 384), wire.Answer(part=b"\xff" * 4 * 384)], "not finite"),
        ([wire.Answer(failure=wire.FAILURE_UNSPECIFIED)], "no known reason"),
        ([wire.Answer(failure=wire.FAILURE_FORGOTTEN)], "has not the adapter"),  # asked once
    ],
)
def test_an_answer_that_is_not_the_plans_is_refused(base, socket, answers, problem):
    plan = tiny.make_plan(base)
    assert sum(np.prod(shape) for _, shape in tuned_model(plan).layout) == 384
    odd = Odd()
    odd.answers = tuple(answers)
    server = grpc.server(futures.ThreadPoolExecutor(2))
    rpc.add_TrainerServicer_to_server(odd, server)  # type: ignore[no-untyped-call]  # generated
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    with pytest.raises(ModelError, match=problem):
        RemoteTrainer(socket).train(request(plan))
    server.stop(None).wait()


def test_nobody_at_the_socket_is_an_error_that_says_what_to_do(base, socket):
    with pytest.raises(ModelError, match="see whether it runs"):
        RemoteTrainer(socket, start_seconds=0.1).prepare(request(tiny.make_plan(base)))


def test_a_child_that_ends_at_once_is_not_waited_for(base, socket):
    process = TrainerProcess(["/bin/false"], {})
    with pytest.raises(ModelError, match="ended as it started"):
        RemoteTrainer(socket, process=process).prepare(request(tiny.make_plan(base)))
