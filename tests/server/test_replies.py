"""Replies are waited for until the deadline, and a process that stood still looks once more."""

import threading
import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedward.server.replies import collect
from fedward.simulations.grid import FIRST_NODE, LocalGrid


class Stalling:
    """A clock over whose first pause the process stands still for ``seconds``."""

    def __init__(self, go: threading.Event, seconds: float) -> None:
        self.now, self._go, self._seconds = 0.0, go, seconds

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self._go.set()
        self.now += self._seconds
        time.sleep(0.2)  # in which the site answers


def collected(seconds: float, *, answers: bool) -> int:
    """How many replies come from one site that answers while the coordinator stands still."""
    app, go, end = ClientApp(), threading.Event(), threading.Event()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (go if answers else end).wait(30)
        return Message(RecordDict({"c": ConfigRecord({"n": 1})}), reply_to=message)

    grid = LocalGrid({FIRST_NODE: lambda: app})
    letter = grid.create_message(RecordDict(), "train", FIRST_NODE, "1")
    try:
        return len(collect(grid, [letter], 60.0, Stalling(go, seconds)))
    finally:
        go.set()
        end.set()
        grid.close()


def test_what_came_while_the_process_stood_still_beyond_the_deadline_is_taken():
    assert collected(75.0, answers=True) == 1
    assert collected(1.0, answers=True) == 1


def test_beyond_the_deadline_nobody_is_waited_for():
    assert collected(75.0, answers=False) == 0
