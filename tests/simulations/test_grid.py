"""The in-process grid delivers like Flower's: replies by id, dead sites, nothing shared."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run

from fedward.simulations.grid import FIRST_NODE, LocalGrid

NODES = (FIRST_NODE, FIRST_NODE + 1, FIRST_NODE + 2)


def content(data: bytes = b"12345", **config: Any) -> RecordDict:
    array = Array(dtype="uint8", shape=(len(data),), stype="raw", data=data)
    return RecordDict({"parts": ArrayRecord({"x": array}), "letter": ConfigRecord(config)})


def echo(
    log: list[str] | None = None, *, wait: Callable[[], object] | None = None
) -> Callable[[], ClientApp]:
    """A site that answers with what it got, and with how often it has been asked."""
    count = iter(range(1, 1000))

    def build() -> ClientApp:
        app = ClientApp()
        log_here = [] if log is None else log
        log_here.append("built")

        @app.train()
        def train(message: Message, context: Context) -> Message:
            if wait is not None:
                wait()
            message.content.config_records["letter"]["count"] = next(count)
            return Message(message.content, reply_to=message)

        return app

    return build


@pytest.fixture
def make_grid():
    grids = []

    def make(factories=None, **options):
        grids.append(LocalGrid(factories or {node: echo() for node in NODES}, **options))
        return grids[-1]

    yield make
    for grid in grids:
        grid.close()


def ask(grid: LocalGrid, nodes: Sequence[int] = NODES, **config: Any) -> list[Message]:
    messages = [grid.create_message(content(**config), "train", node, "1") for node in nodes]
    return list(grid.send_and_receive(messages))


def test_each_message_gets_its_own_reply(make_grid):
    grid = make_grid()
    messages = [grid.create_message(content(n=n), "train", n, "1") for n in NODES]
    ids = list(grid.push_messages(messages))
    assert len(set(ids)) == 3
    found = list[Message]()
    while len(found) < 3:
        found += grid.pull_messages(ids)
    for reply in found:
        place = ids.index(reply.metadata.reply_to_message_id)
        assert reply.metadata.src_node_id == NODES[place]
        assert reply.content["letter"]["n"] == NODES[place]
    assert list(grid.pull_messages(ids)) == [], "a reply is there once"


def test_a_slow_site_does_not_hold_the_others_up(make_grid):
    gate = threading.Event()
    grid = make_grid({2: echo(wait=gate.wait), 3: echo()}, workers=2)
    ids = list(
        grid.push_messages([grid.create_message(content(), "train", n, "1") for n in (2, 3)])
    )
    found = list[Message]()
    while not found:
        found = list(grid.pull_messages(ids))
        time.sleep(0.001)
    assert [reply.metadata.src_node_id for reply in found] == [3]
    gate.set()


def test_what_a_site_changes_stays_with_the_site(make_grid):
    grid = make_grid()
    message = grid.create_message(content(n=1), "train", FIRST_NODE, "1")
    (reply,) = grid.send_and_receive([message])
    assert "count" not in message.content["letter"]
    assert reply.content["letter"]["count"] == 1


def test_a_killed_site_answers_nothing_and_comes_back_without_its_memory(make_grid):
    log = list[str]()
    grid = make_grid({FIRST_NODE: echo(log), FIRST_NODE + 1: echo()})
    ask(grid, (FIRST_NODE,))
    grid.kill(FIRST_NODE)
    assert list(grid.get_node_ids()) == [FIRST_NODE + 1]
    (reply,) = ask(grid, (FIRST_NODE,))
    assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
    grid.revive(FIRST_NODE)
    (reply,) = ask(grid, (FIRST_NODE,))
    assert not reply.has_error()
    assert log == ["built", "built"]


def test_a_fault_kills_before_the_answer(make_grid):
    log = list[str]()
    faults = iter([False, True])
    grid = make_grid({FIRST_NODE: echo(log)}, fault=lambda node, message: next(faults))
    assert not ask(grid, (FIRST_NODE,))[0].has_error()
    assert ask(grid, (FIRST_NODE,))[0].has_error()
    assert ask(grid, (FIRST_NODE,))[0].has_error(), "a dead site is not asked who kills it"


def test_a_watch_sees_both_directions(make_grid):
    seen = []
    grid = make_grid(watch=lambda message: seen.append(message.metadata.src_node_id))
    ask(grid, NODES[:1])
    assert seen == [1, FIRST_NODE]


def test_bytes_up_are_counted_once(make_grid):
    grid = make_grid()
    ask(grid, NODES[:1], secret=b"123")
    ask(grid, NODES[:1])
    assert grid.take_bytes_up(FIRST_NODE) == 5 + 3 + 5
    assert grid.take_bytes_up(FIRST_NODE) == 0
    assert grid.take_bytes_up(FIRST_NODE + 1) == 0


def test_a_bug_of_a_site_is_seen_where_its_reply_is_taken(make_grid):
    def bug():
        raise ZeroDivisionError

    grid = make_grid({FIRST_NODE: echo(wait=bug)})
    with pytest.raises(ZeroDivisionError):
        ask(grid, (FIRST_NODE,))


def test_the_grid_knows_its_run(make_grid):
    grid = make_grid()
    run = Run.create_empty(run_id=7)
    grid.set_run(run)
    assert grid.run is run
