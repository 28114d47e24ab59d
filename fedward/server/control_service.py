"""The coordinator's control service: gRPC on a Unix socket that only its own user can open."""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedward.errors import ConfigurationError, FedwardError
from fedward.identity import Roster
from fedward.plan import from_json
from fedward.server import control_pb2 as wire
from fedward.server import control_pb2_grpc
from fedward.server.coordinator_folder import CoordinatorFolder
from fedward.server.engine import Engine
from fedward.server.members import open_members
from fedward.server.runs import NoSuchRun, Run, RunBook, RunState
from fedward.server.store import BEGINNING, EVERYBODY, ROUND_ENDS, Event, Phase, RunStore
from fedward.tuning.vector import layout_from_bytes

MESSAGE_BYTES = 1 << 30
"""Largest message of the control service: a start carries a whole adapter."""

_WATCH_SECONDS = 0.5
_WATCHERS = 8
"""Watches at the same time, so that there is always a thread for the other calls."""

_FINAL = {RunState.FINISHED, RunState.ABORTED}


class ControlService(control_pb2_grpc.ControlServicer):
    """Answers the control calls.

    Args:
        folder: The coordinator's.
        engine: The worker, for signs of life.
        stop: Ends the watches.
    """

    def __init__(self, folder: CoordinatorFolder, engine: Engine, stop: threading.Event) -> None:
        self._folder, self._engine, self._stop = folder, engine, stop
        self._book = RunBook(folder.runs)
        self._places = threading.BoundedSemaphore(_WATCHERS)

    def Start(self, request: wire.StartRequest, context: grpc.ServicerContext) -> wire.Run:
        """Queue a run."""
        try:
            plan, layout = from_json(request.plan), layout_from_bytes(request.layout)
            return self._shown(self._book.submit(request.name, plan, request.adapter, layout))
        except FedwardError as error:
            _refuse(context, error)

    def List(self, request: wire.ListRequest, context: grpc.ServicerContext) -> wire.RunList:
        """Every run."""
        return wire.RunList(runs=[self._shown(run) for run in self._book.all()])

    def Show(self, request: wire.RunName, context: grpc.ServicerContext) -> wire.Run:
        """One run."""
        try:
            return self._shown(self._book.get(request.name))
        except FedwardError as error:
            _refuse(context, error)

    def Watch(self, request: wire.RunName, context: grpc.ServicerContext) -> Iterator[wire.Event]:
        """Every event of a run, old and new, until it ends."""
        if not self._places.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_WATCHERS} watch already")
        try:
            yield from self._watch(request.name, context)
        except FedwardError as error:
            _refuse(context, error)
        finally:
            self._places.release()

    def _watch(self, name: str, context: grpc.ServicerContext) -> Iterator[wire.Event]:
        mark, roster = BEGINNING, self._roster()
        while context.is_active() and not self._stop.is_set():
            ended = self._book.state(name) in _FINAL
            with contextlib.closing(RunStore(self._folder.runs)) as store:
                events, mark = store.events_after(name, mark)
            for event in events:
                yield _event(event, roster)
            if ended:
                return
            self._stop.wait(_WATCH_SECONDS)

    def Pause(self, request: wire.RunName, context: grpc.ServicerContext) -> wire.Run:
        """Stop after the open round."""
        return self._change(request.name, RunState.PAUSED, context, "paused by the operator")

    def Resume(self, request: wire.RunName, context: grpc.ServicerContext) -> wire.Run:
        """Go on with a paused run."""
        try:
            if self._book.state(request.name) is RunState.RUNNING:
                return self._shown(self._book.get(request.name))
        except FedwardError as error:
            _refuse(context, error)
        return self._change(request.name, RunState.QUEUED, context, "")

    def Abort(self, request: wire.RunName, context: grpc.ServicerContext) -> wire.Run:
        """Stop for good."""
        return self._change(request.name, RunState.ABORTED, context, "aborted by the operator")

    def _change(
        self, name: str, state: RunState, context: grpc.ServicerContext, reason: str
    ) -> wire.Run:
        try:
            return self._shown(self._book.change(name, state, reason))
        except FedwardError as error:
            _refuse(context, error)

    def _shown(self, run: Run) -> wire.Run:
        """A run as people see it: running only with a fresh sign of life."""
        events, activity = self._events(run.name), self._engine.activity(run.name)
        stalled = run.state is RunState.RUNNING and activity is None
        committed = [event for event in events if event.phase in ROUND_ENDS]
        newest = json.loads(committed[-1].payload)["adapter"] if committed else ""
        roster = self._roster()
        last = max((event.attempt.order for event in events), default=None)
        left_out = [
            f"{_name(roster, event.site)}: {json.loads(event.payload)['reason']}"
            for event in events
            if event.phase is Phase.LEFT_OUT and event.attempt.order == last
        ]
        refused = [
            f"round {event.attempt.round}: {json.loads(event.payload)['reason']}"
            for event in events
            if event.phase is Phase.REFUSED
        ]
        asked = [
            _name(roster, site)
            for event in events
            if event.phase is Phase.INVITED and event.attempt.order == last
            for site in json.loads(event.payload)["sites"]
        ]
        return wire.Run(
            name=run.name,
            plan=run.plan.name,
            plan_hash=run.plan.hash().hex(),
            state="stalled" if stalled else run.state.value,
            activity=activity or "",
            reason="no sign of life from the round engine" if stalled else run.reason,
            committed=len(committed),
            rounds=run.plan.rounds.count,
            adapter=newest,
            changed=run.changed,
            left_out=left_out,
            refused=refused,
            asked=asked,
        )

    def _events(self, name: str) -> list[Event]:
        with contextlib.closing(RunStore(self._folder.runs)) as store:
            return store.events(name)

    def _roster(self) -> Roster:
        with open_members(self._folder) as members:
            return members.roster()


def _event(event: Event, roster: Roster) -> wire.Event:
    return wire.Event(
        round=event.attempt.round,
        attempt=event.attempt.attempt,
        phase=event.phase.value,
        site="" if event.site == EVERYBODY else _name(roster, event.site),
        facts=event.payload.decode(),
    )


def _name(roster: Roster, site: int) -> str:
    names = {member.id: member.name for member in roster.members}
    return names.get(site, f"site {site}")


def _refuse(context: grpc.ServicerContext, error: FedwardError) -> NoReturn:
    if isinstance(error, NoSuchRun):
        code = grpc.StatusCode.NOT_FOUND
    elif isinstance(error, ConfigurationError):
        code = grpc.StatusCode.INVALID_ARGUMENT
    else:
        code = grpc.StatusCode.FAILED_PRECONDITION
    context.abort(code, str(error))
    raise AssertionError("abort raises")


class Health:
    """``grpc.health.v1``: ``""`` while the engine lives, ``link`` while the public port answers.

    Args:
        folder: The coordinator's.
        engine: The worker.
    """

    def __init__(self, folder: CoordinatorFolder, engine: Engine) -> None:
        self._folder, self._engine = folder, engine
        self.servicer = health.HealthServicer()

    def look(self) -> None:
        """Find out how things are and remember it for those who ask."""
        self._set("", self._engine.activity() is not None)
        self._set("link", self._link_answers())

    def _link_answers(self) -> bool:
        config = self._folder.config()
        host = config.listen if config.listen not in {"0.0.0.0", "::"} else "127.0.0.1"  # noqa: S104
        try:
            with socket.create_connection((host, config.port), timeout=1):
                return True
        except OSError:
            return False

    def _set(self, service: str, good: bool) -> None:
        status = health_pb2.HealthCheckResponse
        self.servicer.set(service, status.SERVING if good else status.NOT_SERVING)


def control_server(
    socket_path: Path, service: ControlService, health: health.HealthServicer
) -> grpc.Server:
    """Start the server on a Unix socket (mode 0600).

    Raises:
        ConfigurationError: The path is too long for a socket, or it cannot be bound.
    """
    server = grpc.server(
        ThreadPoolExecutor(max_workers=4 + _WATCHERS, thread_name_prefix="control"),
        options=[
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
        ],
    )
    control_pb2_grpc.add_ControlServicer_to_server(service, server)  # type: ignore[no-untyped-call]  # generated
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    socket_path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{socket_path}")
    except RuntimeError as error:
        raise ConfigurationError(
            f"{socket_path}: no socket can be made here; use a folder with a shorter path"
        ) from error
    finally:
        os.umask(before)
    server.start()
    return server
