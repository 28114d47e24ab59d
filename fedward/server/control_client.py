"""The command line's side of the control service."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from fedward.errors import ConfigurationError, FedwardError, RoundError, Unreachable
from fedward.plan import Plan
from fedward.server import control_pb2 as wire
from fedward.server.control_pb2_grpc import ControlStub
from fedward.server.control_service import MESSAGE_BYTES
from fedward.server.coordinator_folder import CoordinatorFolder
from fedward.tuning.vector import Layout, layout_to_bytes

_SECONDS = 20.0

_ERRORS: Mapping[grpc.StatusCode, type[FedwardError]] = {
    grpc.StatusCode.NOT_FOUND: ConfigurationError,
    grpc.StatusCode.INVALID_ARGUMENT: ConfigurationError,
    grpc.StatusCode.FAILED_PRECONDITION: RoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RoundError,
}


class Control:
    """Calls to the coordinator that serves a folder; every answer is a plain dictionary.

    Args:
        folder: The coordinator's.
        stub: An open connection to it.
    """

    def __init__(self, folder: CoordinatorFolder, stub: ControlStub) -> None:
        self._folder, self._stub = folder, stub

    def start(self, name: str, plan: Plan, adapter: bytes, layout: Layout) -> dict[str, Any]:
        """Queue a run; the same run again changes nothing."""
        request = wire.StartRequest(
            name=name, plan=plan.to_json(), adapter=adapter, layout=layout_to_bytes(layout)
        )
        with self._errors():
            return _plain(self._stub.Start(request, timeout=_SECONDS, wait_for_ready=True))

    def list(self) -> list[dict[str, Any]]:
        """Every run, oldest first."""
        with self._errors():
            answer = self._stub.List(wire.ListRequest(), timeout=_SECONDS, wait_for_ready=True)
            return [_plain(run) for run in answer.runs]

    def call(self, verb: str, name: str) -> dict[str, Any]:
        """``Show``, ``Pause``, ``Resume`` or ``Abort`` one run."""
        calls = {
            "Show": self._stub.Show,
            "Pause": self._stub.Pause,
            "Resume": self._stub.Resume,
            "Abort": self._stub.Abort,
        }
        with self._errors():
            return _plain(
                calls[verb](wire.RunName(name=name), timeout=_SECONDS, wait_for_ready=True)
            )

    def watch(self, name: str) -> Iterator[dict[str, Any]]:
        """Every event of a run from the beginning, then live, until it ends."""
        with self._errors():
            for event in self._stub.Watch(wire.RunName(name=name), wait_for_ready=True):
                yield {**_plain(event), "facts": json.loads(event.facts)}

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            code = error.code()
            if code in _ERRORS:
                raise _ERRORS[code](error.details()) from error
            raise Unreachable(
                f"the coordinator of {self._folder.root} does not answer ({code.name.lower()}): "
                f"is fedward coordinator serve running?"
            ) from error


@contextlib.contextmanager
def open_control(folder: CoordinatorFolder) -> Iterator[Control]:
    """Connect to the coordinator that serves a folder.

    Raises:
        Unreachable: Nobody serves it (raised by the calls).
    """
    options = [
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
    ]
    with grpc.insecure_channel(f"unix:{folder.control_socket}", options=options) as channel:
        stub = ControlStub(channel)  # type: ignore[no-untyped-call]  # generated
        yield Control(folder, stub)


def _plain(message: wire.Run | wire.Event) -> dict[str, Any]:
    document: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return document
