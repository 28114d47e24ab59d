"""A Flower ``Grid`` within one process: the very ClientApps of deployment, without a wire.

A site is made by a factory, so that it can be killed (its memory is gone) and started again from
its own folder, as a real daemon would be.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from typing import Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

FIRST_NODE = 2
"""Flower's node 1 is the SuperLink; site i lives at node i + 2."""


class Fault(Protocol):
    """Decides about each message whether its site is killed before it answers."""

    def __call__(self, node: int, message: Message) -> bool:
        """True: the site dies now and stays away until :meth:`LocalGrid.revive`."""
        ...


Watch = Callable[[Message], None]
"""Sees every message and every reply on its way, before the receiver does."""


class OneProcessGrid(Grid):
    """What the grids of simulations share: one run, and messages that no link has to know."""

    def __init__(self) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self._run = Run.create_empty(run_id=1)

    def set_run(self, run: Run) -> None:
        """Remember which run this grid serves."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid serves."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class LocalGrid(OneProcessGrid):
    """Delivers messages to in-process sites and keeps their replies.

    Args:
        sites: Node id → factory of the site's ClientApp, called on first use and after a kill.
        workers: Sites that may work at the same time; 1 is deterministic and shares one model.
        fault: Kills sites; None kills nobody.
        watch: Sees everything that crosses; None watches nothing.
    """

    def __init__(
        self,
        sites: Mapping[int, Callable[[], ClientApp]],
        *,
        workers: int = 1,
        fault: Fault | None = None,
        watch: Watch | None = None,
    ) -> None:
        super().__init__()
        self._factories, self._fault = dict(sites), fault
        self._watch: Watch = watch or (lambda _: None)
        self._apps: dict[int, ClientApp] = {}
        self._contexts = {node: _context(node) for node in sites}
        self._dead: set[int] = set()
        self._numbers = itertools.count(1)
        self._replies: dict[str, Future[Message]] = {}
        self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="site")
        self._bytes_up: dict[int, int] = dict.fromkeys(sites, 0)

    def kill(self, node: int) -> None:
        """Let a site lose its memory and answer nothing until it is revived."""
        self._dead.add(node)
        self._apps.pop(node, None)

    def revive(self, node: int) -> None:
        """Start a killed site again from what it kept on disk."""
        self._dead.discard(node)

    def take_bytes_up(self, node: int) -> int:
        """Bytes of content that a node has sent since this was last asked."""
        sent, self._bytes_up[node] = self._bytes_up[node], 0
        return sent

    def close(self) -> None:
        """Stop the workers."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def get_node_ids(self) -> Iterable[int]:
        """Every node that is alive."""
        return [node for node in self._factories if node not in self._dead]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to their sites; returns the ids under which replies will be found."""
        ids = []
        for message in messages:
            number = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = number
            self._replies[number] = self._pool.submit(self._deliver, message)
            ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the replies that are there; an unexpected error of a site is raised here."""
        ready = [i for i in message_ids if i in self._replies and self._replies[i].done()]
        return [self._replies.pop(i).result() for i in ready]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, wait for every reply, pull."""
        ids = list(self.push_messages(messages))
        for number in ids:
            self._replies[number].exception(timeout)
        return self.pull_messages(ids)

    def _deliver(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node not in self._dead and self._fault is not None and self._fault(node, message):
            self.kill(node)
        if node in self._dead:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE), reply_to=message)
        if node not in self._apps:
            self._apps[node] = self._factories[node]()
        copy = make_message(deepcopy(message.metadata), content=deepcopy(message.content))
        self._watch(copy)
        reply = self._apps[node](message=copy, context=self._contexts[node])
        self._watch(reply)
        self._bytes_up[node] += _size(reply.content) if reply.has_content() else 0
        return reply


def _context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})


def _size(content: RecordDict) -> int:
    """Bytes of the arrays and byte strings of a message."""
    arrays = sum(len(a.data) for r in content.array_records.values() for a in r.values())
    configs = content.config_records.values()
    return arrays + sum(len(v) for c in configs for v in c.values() if isinstance(v, bytes))
