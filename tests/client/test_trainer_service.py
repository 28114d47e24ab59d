"""The trainer's side of the socket: it takes what the plan says, and says nothing of the data."""

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from fedward.client import trainer_pb2 as wire
from fedward.client import trainer_pb2_grpc as rpc
from fedward.client.remote_trainer import OPTIONS
from fedward.client.trainer import LocalTrainer
from fedward.client.trainer_service import TrainerService, serve
from fedward.errors import ConfigurationError, DataError, PolicyRefusal, UncoveredParameters
from fedward.plan import Plan
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import layout_to_bytes
from tests.simulations import tiny

ROOT = Path(__file__).parent.parent.parent
CANARY = "CANARY-Mrs-Roe"


def make(plan: Plan, dataset: str, on_step: Callable[[int], None]) -> LocalTrainer:
    return LocalTrainer(tiny.make_records("a", 4), key=tiny.key("a"), on_step=on_step)


@pytest.fixture
def plan(base):
    return tiny.make_plan(base)


@pytest.fixture
def sockets(tmp_path):
    folder = tmp_path / "sockets"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def start(sockets):
    """Serve trainers that a test makes; gives a stub."""
    stack = []

    def begin(make: Callable[..., LocalTrainer]) -> rpc.TrainerStub:
        server = serve(sockets / "t.sock", make)
        channel = grpc.insecure_channel(f"unix:{sockets / 't.sock'}", options=OPTIONS)
        stack.extend([channel.close, lambda: server.stop(None).wait()])
        return rpc.TrainerStub(channel)  # type: ignore[no-untyped-call]  # generated

    yield begin
    for end in stack:
        end()


def asked(plan: Plan, /, *parts: bytes, **changes: Any) -> Iterator[wire.Asked]:
    """A request; left as it is, an honest one for round 1."""
    tuned = tuned_model(plan)
    given: dict[str, Any] = {
        "plan": plan.to_json(),
        "run": "r",
        "round": 1,
        "session": 1,
        "attempt": 1,
        "layout": layout_to_bytes(tuned.layout),
        "adapter_bytes": len(tuned.start),
    }
    yield wire.Asked(task=wire.Task(**(given | changes)))
    for part in parts or (tuned.start,):
        yield wire.Asked(adapter=part)


def kinds(answers: Iterator[wire.Answer]) -> list[str | None]:
    """What is answered; a slow machine has more signs of life between."""
    found = [answer.WhichOneof("kind") for answer in answers]
    return [kind for kind in found if kind != "progress"]


def failure(answers: Iterator[wire.Answer]) -> str:
    """The one failure that an answer ends in."""
    *rest, last = answers
    assert last.WhichOneof("kind") == "failure"
    assert all(answer.WhichOneof("kind") == "progress" for answer in rest)
    return str(wire.Failure.Name(last.failure))


def test_the_generated_code_is_that_of_the_proto_file(tmp_path):
    pytest.importorskip("grpc_tools", reason="the generator is a tool of development")
    outs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    name = "fedward/client/trainer"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outs, f"{name}.proto"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for ending in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
        assert (tmp_path / f"{name}{ending}").read_text() == (ROOT / f"{name}{ending}").read_text()


def test_what_each_call_answers(plan, start):
    stub = start(make)
    assert kinds(stub.Prepare(asked(plan))) == ["done"]
    assert kinds(stub.Train(asked(plan))) == ["vector", "part", "vector"]
    assert failure(stub.Evaluate(asked(plan))) == "FAILURE_DATA"  # it keeps no held-out records
    assert stub.Status(wire.StatusRequest()).activity == wire.ACTIVITY_IDLE


def test_an_adapter_is_kept_under_its_name_for_one_training(plan, start):
    stub = start(make)
    assert kinds(stub.Prepare(asked(plan, keep=b"a"))) == ["done"]
    named = [*asked(plan, kept=b"a")][:1]  # no part follows
    assert kinds(stub.Train(iter(named))) == ["vector", "part", "vector"]
    assert failure(stub.Train(iter(named))) == "FAILURE_FORGOTTEN"
    assert kinds(stub.Prepare(asked(plan, keep=b"a"))) == ["done"]
    assert failure(stub.Train(iter([*asked(plan, kept=b"b")][:1]))) == "FAILURE_FORGOTTEN"
    assert kinds(stub.Prepare(asked(plan, keep=b"a"))) == ["done"]
    tuner = dataclasses.replace(plan.tuner, arguments={**plan.tuner.arguments, "r": 1})
    other = dataclasses.replace(plan, tuner=tuner)
    named = [*asked(other, kept=b"a", adapter_bytes=len(tuned_model(plan).start))][:1]
    assert failure(stub.Train(iter(named))) == "FAILURE_FORGOTTEN", "of another plan's size"


def test_only_the_owner_reaches_the_socket(plan, sockets, start):
    start(make)
    assert (sockets / "t.sock").stat().st_mode & 0o777 == 0o600
    sockets.chmod(0o755)
    with pytest.raises(ConfigurationError, match="others on this machine"):
        serve(sockets / "u.sock", make)


def test_a_path_that_no_socket_can_have_is_explained(tmp_path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir(mode=0o700)
    with pytest.raises(ConfigurationError, match="at most 107 bytes"):
        serve(folder / "t.sock", make)


@pytest.mark.parametrize(
    ("parts", "changes", "expected"),
    [
        ((), {"adapter_bytes": 1 << 40}, "FAILURE_MODEL"),
        ((b"x",), {}, "FAILURE_REQUEST"),
        ((b"x" * 3_000_000,), {}, "FAILURE_REQUEST"),
        ((), {"layout": b"[]"}, "FAILURE_MODEL"),
        ((), {"layout": b"{"}, "FAILURE_MODEL"),
        ((), {"plan": b"{}"}, "FAILURE_PLAN"),
        ((), {"round": 0}, "FAILURE_PLAN"),
        ((), {"run": ""}, "FAILURE_PLAN"),
    ],
)
def test_a_request_that_does_not_fit_its_plan_is_refused(plan, start, parts, changes, expected):
    stub = start(make)
    assert failure(stub.Train(asked(plan, *parts, **changes))) == expected
    assert kinds(stub.Prepare(asked(plan))) == ["done"], "and the next one is served"


def test_the_size_is_refused_before_the_adapter_is_read(plan, start):
    """A peer that announces too much is not listened to: nothing is taken into memory."""
    read = threading.Event()

    def endless() -> Iterator[wire.Asked]:
        yield next(asked(plan, adapter_bytes=1 << 40))
        for _ in range(1 << 20):
            yield wire.Asked(adapter=b"x" * (1 << 20))
        read.set()

    assert failure(start(make).Train(endless())) == "FAILURE_MODEL"
    assert not read.is_set()


@pytest.mark.parametrize("first", [[], [wire.Asked(adapter=b"x")], [wire.Asked()]])
def test_a_request_starts_with_its_task(start, first):
    assert failure(start(make).Train(iter(first))) == "FAILURE_REQUEST"


def test_a_message_above_the_limit_never_reaches_the_trainer(plan, start):
    with pytest.raises(grpc.RpcError) as caught:
        list(start(make).Train(asked(plan, b"x" * (5 << 20))))
    assert "RESOURCE_EXHAUSTED" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DataError(CANARY), "FAILURE_DATA"),
        (UncoveredParameters(CANARY), "FAILURE_PRIVACY"),
        (ValueError(CANARY), "FAILURE_LIBRARY"),
        (KeyError(CANARY), "FAILURE_LIBRARY"),
        (type("OtherError", (Exception,), {})(CANARY), "FAILURE_LIBRARY"),
    ],
)
def test_no_text_of_an_error_crosses_the_socket(plan, start, caplog, error, expected):
    def fails(plan: Plan, dataset: str, on_step: Callable[[int], None]) -> LocalTrainer:
        raise error

    answers = start(fails).Train(asked(plan))
    assert failure(answers) == expected
    assert CANARY not in f"{answers.details()}{answers.trailing_metadata()}"
    if expected == "FAILURE_LIBRARY":  # half of all library messages quote the record
        assert CANARY not in caplog.text
        assert type(error).__name__ in caplog.text


def test_a_second_task_waits_and_a_cancelled_one_ends_at_its_next_step(base):
    """The one that is cancelled gives nothing; the one behind it is not touched by that."""
    plan = tiny.make_plan(base, rounds=tiny.make_rounds(steps=3))
    reached, go_on = threading.Event(), threading.Event()

    def slow(plan: Plan, dataset: str, on_step: Callable[[int], None]) -> LocalTrainer:
        def step(number: int) -> None:
            reached.set()
            assert go_on.wait(10)
            on_step(number)

        return LocalTrainer(tiny.make_records("a", 4), on_step=step)

    class Context:
        def add_callback(self, callback: Callable[[], None]) -> bool:
            return True

    service, context = TrainerService(slow, patience=0.05), cast("Any", Context())
    first: list[wire.Answer] = []
    thread = threading.Thread(target=lambda: first.extend(service.Train(asked(plan), context)))
    thread.start()
    assert reached.wait(20)
    assert service.Status(wire.StatusRequest(), context).activity == wire.ACTIVITY_TRAINING
    assert failure(service.Train(asked(plan), context)) == "FAILURE_BUSY"
    service.Cancel(wire.CancelRequest(), context)
    go_on.set()
    thread.join(10)
    assert failure(iter(first)) == "FAILURE_CANCELLED"
    assert kinds(service.Train(asked(plan), context))[-1] == "vector"


def test_each_data_source_has_a_trainer_of_its_own(plan, start):
    made: list[str] = []

    def named(plan: Plan, dataset: str, on_step: Callable[[int], None]) -> LocalTrainer:
        made.append(dataset)
        return make(plan, dataset, on_step)

    stub = start(named)
    for dataset in ("notes", "letters", "notes", "letters"):
        assert kinds(stub.Prepare(asked(plan, dataset=dataset))) == ["done"]
    assert made == ["notes", "letters"]


def test_a_trainer_serves_only_while_what_it_was_made_of_stays_the_same(plan, sockets):
    states, made = [b"1", b"1", b"2", b"2"], list[str]()

    def counted(plan: Plan, dataset: str, on_step: Callable[[int], None]) -> LocalTrainer:
        made.append(dataset)
        return make(plan, dataset, on_step)

    def admit(plan: Plan, dataset: str, approved: bytes) -> bytes:
        if dataset != "notes" or approved != b"hash":
            raise PolicyRefusal(["not these"])
        return states.pop(0)

    server = serve(sockets / "u.sock", counted, admit)
    with grpc.insecure_channel(f"unix:{sockets / 'u.sock'}", options=OPTIONS) as channel:
        stub = rpc.TrainerStub(channel)  # type: ignore[no-untyped-call]  # generated
        for _ in range(4):
            answers = stub.Prepare(asked(plan, dataset="notes", source=b"hash"))
            assert kinds(answers) == ["done"]
        assert len(made) == 2
        for wrong in ({"dataset": "other"}, {"source": b"other"}):
            given = {"dataset": "notes", "source": b"hash"} | wrong
            assert failure(stub.Prepare(asked(plan, **given))) == "FAILURE_PLAN"
    server.stop(None).wait()


def test_an_agent_that_goes_away_stops_the_training(plan, base, start):
    rounds = tiny.make_rounds(steps=2000)
    long = tiny.make_plan(base, rounds=rounds, privacy=tiny.NAKED)
    steps: list[int] = []

    def counted(plan: Plan, dataset: str, on_step: Callable[[int], None]) -> LocalTrainer:
        def step(number: int) -> None:
            on_step(number)
            steps.append(number)

        return LocalTrainer(tiny.make_records("a", 4), on_step=step)

    stub = start(counted)
    answers = stub.Train(asked(long))
    assert next(answer.progress.step for answer in answers if answer.progress.step) == 1
    answers.cancel()
    assert kinds(stub.Train(asked(plan)))[-1] == "vector", "the next task has its turn"
    assert steps[-1] == 1
    assert len(steps) < 2000
