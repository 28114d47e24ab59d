"""Flower's grid over a bad network: letters wait for their site, get lost, late or doubled.

As in deployment a letter waits until its site asks for it. A site that starts again gets what it
had not answered, three times at most; the same letter is answered alike.
"""

import itertools
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import numpy as np
from flwr.app import Message
from flwr.app.message.message import make_message

from fedward.messages import MESSAGE_TYPES
from fedward.simulations.faults.clock import VirtualClock
from fedward.simulations.faults.schedule import SITES, Kind
from fedward.simulations.grid import OneProcessGrid

_DELIVERIES = 3
_ACTIONS = {kind: action for action, kind in MESSAGE_TYPES.items()}


@dataclass(kw_only=True)
class _Pending:
    message: Message
    deliveries: int = 0


Fate = Callable[[int, str, int], dict[Kind, float]]
"""What happens to a letter (site, action, round), and for how many seconds."""

Answer = Callable[[int, Message], Message | None]
"""Lets a site answer; None if it is down or dies."""


class BadNetwork(OneProcessGrid):
    """The grid of one laboratory; site i is node i + 2.

    Args:
        clock: Virtual time.
        rng: Draws the delays.
        fate: Asked once for every letter.
        answer: See :data:`Answer`.
        there: Whether a site would be seen online.
        lateness: Seconds that the site's last answer took.
    """

    def __init__(
        self,
        clock: VirtualClock,
        rng: np.random.Generator,
        *,
        fate: Fate,
        answer: Answer,
        there: Callable[[int], bool],
        lateness: Callable[[int], float],
    ) -> None:
        super().__init__()
        self._clock, self._rng, self._fate = clock, rng, fate
        self._answer, self._there, self._lateness = answer, there, lateness
        self._numbers = itertools.count(1)
        self._pending: dict[str, _Pending] = {}
        self._replies: dict[str, Message] = {}
        self._cut_until: dict[int, float] = {}
        self._busy_until: dict[int, float] = {}
        self.stage, self.round = "", 0
        """The exchange that was asked for last."""

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are online and can be reached."""
        return [node for node in self._nodes() if self._reachable(node - 2)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Put letters on their way."""
        numbers = list[str]()
        for message in messages:
            number = str(next(self._numbers))
            numbers.append(number)
            message.metadata.__dict__["_message_id"] = number
            self._pending[number] = _Pending(message=message)
            site, action = message.metadata.dst_node_id - 2, _ACTIONS[message.metadata.message_type]
            self.stage, self.round = action, int(message.metadata.group_id)
            fate = self._fate(site, action, self.round)
            if Kind.CUT in fate:
                self.cut(site, fate[Kind.CUT])
            if Kind.LOST in fate:
                continue
            if Kind.UNHEARD in fate:
                self._send(number, message, heard=False)
                continue
            if Kind.TWICE in fate:
                self._send(number, message, heard=False, wait=fate[Kind.TWICE])
            self._send(number, message, wait=fate.get(Kind.LATE, 0.0))
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the replies that have arrived."""
        ready = [number for number in sorted(message_ids, key=int) if number in self._replies]
        for number in ready:
            self._pending.pop(number, None)
        return [self._replies.pop(number) for number in ready]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, wait, pull; the round engine never does it so."""
        numbers = list(self.push_messages(messages))
        self._clock.sleep(timeout or 0.0)
        return self.pull_messages(numbers)

    def forget(self) -> None:
        """The coordinator's process is gone: nobody waits for what is on its way."""
        self._pending.clear()
        self._replies.clear()

    def cut(self, site: int, seconds: float) -> None:
        """Cut a site's cable for a while."""
        self._cut_until[site] = self._clock.monotonic() + seconds

    def started(self, site: int) -> None:
        """A site has started: what it had been given and not answered comes again."""
        for number, pending in list(self._pending.items()):
            if pending.message.metadata.dst_node_id - 2 == site and number not in self._replies:
                self._send(number, pending.message)

    def _nodes(self) -> Iterable[int]:
        return range(2, 2 + SITES)

    def _reachable(self, site: int) -> bool:
        return self._there(site) and self._cut_until.get(site, 0.0) <= self._clock.monotonic()

    def _send(
        self, number: str, message: Message, *, heard: bool = True, wait: float = 0.0
    ) -> None:
        delay = wait + float(self._rng.uniform(0.01, 0.3))
        self._clock.after(delay, partial(self._arrive, number, message, heard))

    def _arrive(self, number: str, message: Message, heard: bool) -> None:
        """A letter is at its site, if the site can be reached and has time."""
        site, now = message.metadata.dst_node_id - 2, self._clock.monotonic()
        later = max(self._cut_until.get(site, 0.0), self._busy_until.get(site, 0.0))
        if later > now:
            self._clock.after(later - now, partial(self._arrive, number, message, heard))
            return
        pending = self._pending.get(number)
        if not self._there(site) or (pending and pending.deliveries >= _DELIVERIES):
            return
        if pending:
            pending.deliveries += 1
        copy = make_message(deepcopy(message.metadata), content=message.content)
        reply = self._answer(site, copy)
        took = self._lateness(site)
        self._busy_until[site] = now + took
        if reply is not None and heard:
            delay = took + float(self._rng.uniform(0.01, 0.3))
            self._clock.after(delay, partial(self._come_back, number, site, reply))

    def _come_back(self, number: str, site: int, reply: Message) -> None:
        left = self._cut_until.get(site, 0.0) - self._clock.monotonic()
        if left > 0:
            self._clock.after(left, partial(self._come_back, number, site, reply))
        elif number in self._pending:
            self._replies[number] = reply
