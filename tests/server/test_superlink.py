"""Contracts with Flower's internals, over a real link: TLS, node authentication, file database.

A new minor version of Flower is taken when these hold.
"""

import contextlib
import datetime
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.corestate import sql_corestate
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from sqlalchemy import text

from fedward.client import fleet
from fedward.client.fleet import Office, stay_connected
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.errors import IdentityError
from fedward.server.fleet_api import FLEET_PATHS
from fedward.server.superlink import LinkGrid, admit_nodes, end_left_runs, open_state
from tests.server import office

pytestmark = pytest.mark.filterwarnings("ignore")  # Flower's own deprecations


class House:
    """A link with two member sites, and a grid over its database."""

    def __init__(self, root: Path) -> None:
        self.coordinator = office.make_coordinator(root / "coordinator")
        self.sites = office.enrol_sites(self.coordinator, root, ["a", "b"])
        self.state = open_state(self.coordinator.fleet_database)
        self.nodes = admit_nodes(self.state, office.fleet_keys(self.coordinator))

    @contextlib.contextmanager
    def online(
        self, app: ClientApp, *sites: SiteFolder, states: list[str] | None = None
    ) -> Iterator[threading.Event]:
        """Sites that answer with an app until the event is set."""
        stop, on_state = threading.Event(), (states or []).append
        threads = [
            threading.Thread(
                target=stay_connected, args=(app, office.office_of(site), stop, on_state)
            )
            for site in sites
        ]
        for thread in threads:
            thread.start()
        try:
            yield stop
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)
            assert not any(thread.is_alive() for thread in threads)

    @contextlib.contextmanager
    def grid(self, *, grace: float = 5.0) -> Iterator[LinkGrid]:
        grid = LinkGrid(self.state, grace=grace)
        try:
            yield grid
        finally:
            grid.close()

    def activate(self, site: int) -> FleetHttpClient:
        """A member that says hello and then nothing more; after good-bye, should it be online."""
        client = self.clients(site)
        with contextlib.suppress(httpx.HTTPStatusError):
            client.DeactivateNode(DeactivateNodeRequest(node_id=self.nodes[site]))
        key = public_key_to_bytes(fleet._load_key(self.sites[site].fleet_key).public_key())
        client.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=15))
        return client

    def wait_online(self, grid: LinkGrid, count: int) -> None:
        wait_for(lambda: len(set(grid.get_node_ids())) == count)

    def clients(self, site: int) -> FleetHttpClient:
        """A bare client with a member's node key."""
        where = office.office_of(self.sites[site])
        return fleet._open_client(where, fleet._load_key(where.key))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("house"))
    with office.serving(house.coordinator):
        yield house


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def until_pulled(grid: LinkGrid, number: str) -> list[Message]:
    found = list[Message]()
    while not found:
        found = list(grid.pull_messages([number]))
        time.sleep(0.02)
    return found


def record(data: bytes) -> RecordDict:
    array = Array(dtype="uint8", shape=(len(data),), stype="raw", data=data)
    return RecordDict({"parts": ArrayRecord({"a": array}), "c": ConfigRecord({"n": 1})})


def data_of(message: Message) -> bytes:
    return message.content.array_records["parts"]["a"].data


def echo(seen: list[int] | None = None) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: object) -> Message:
        if seen is not None:
            seen.append(os.getpid())
        return Message(record(data_of(message)[::-1]), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: object) -> Message:
        raise ValueError("CANARY-Mrs-Jane-Roe")

    return app


def letter(grid: LinkGrid, node: int, data: bytes, kind: str = "train") -> Message:
    return grid.create_message(record(data), kind, node, "1")


def test_rounds_go_through_one_process_and_leave_nothing_behind(house):
    seen: list[int] = []
    data = [os.urandom(100), os.urandom(5_300_000)]  # the second in two of Flower's pieces
    with house.online(echo(seen), *house.sites), house.grid() as grid:
        house.wait_online(grid, 2)
        for content in data:
            messages = [letter(grid, node, content) for node in house.nodes.values()]
            replies = list(grid.send_and_receive(messages, timeout=60))
            assert {reply.metadata.src_node_id for reply in replies} == set(house.nodes.values())
            for reply in replies:
                assert data_of(reply) == content[::-1]
    assert seen == [os.getpid()] * 4
    assert len(house.state.object_store) == 0
    assert (house.state.num_message_ins(), house.state.num_message_res()) == (0, 0)


def test_grids_side_by_side_each_get_their_own_replies(house):
    with house.grid() as one, house.grid() as two, house.online(echo(), house.sites[0]):
        house.wait_online(two, 1)
        asked = [(grid, letter(grid, house.nodes[0], data)) for grid, data in
                 ((one, b"ab"), (two, b"cd"))]  # fmt: skip
        numbers = [(grid, *grid.push_messages([message])) for grid, message in asked]
        found = [data_of(until_pulled(grid, number)[0]) for grid, number in numbers]
        assert found == [b"ba", b"dc"]
        one.close()  # ends its own run alone
        (reply,) = two.send_and_receive([letter(two, house.nodes[0], b"gh")], timeout=30)
        assert data_of(reply) == b"hg"


def test_pieces_of_an_adapter_are_neither_copied_into_the_file_at_once_nor_wiped(house):
    with house.state.session() as session:
        assert session.execute(text("PRAGMA page_size")).scalar() == 1 << 16
        assert session.execute(text("PRAGMA wal_autocheckpoint")).scalar() == 1 << 12
        assert session.execute(text("PRAGMA secure_delete")).scalar() == 0
        assert session.execute(text("PRAGMA journal_mode")).scalar() == "wal"


def test_an_error_of_a_site_is_a_fixed_code(house, caplog):
    caplog.set_level(logging.DEBUG)
    with house.online(echo(), house.sites[0]), house.grid() as grid:
        house.wait_online(grid, 1)
        message = letter(grid, house.nodes[0], b"x", "evaluate")
        (reply,) = grid.send_and_receive([message], timeout=30)
    assert (reply.error.code, reply.error.reason) == (2, "internal")
    assert "CANARY" not in caplog.text
    assert b"CANARY" not in house.coordinator.fleet_database.read_bytes()


def test_a_site_that_restarts_gets_its_message_again(house):
    with house.grid() as grid:
        client = house.activate(0)
        (number,) = grid.push_messages([letter(grid, house.nodes[0], b"x")])
        pulled = client.PullMessages(PullMessagesRequest(node=Node(node_id=house.nodes[0])))
        assert len(pulled.messages_list) == 1  # and now this process is gone, without a good-bye
        assert grid.pull_messages([number]) == []
        office.office_of(house.sites[0]).note.write_text(f'{{"node": {house.nodes[0]}}}')
        with house.online(echo(), house.sites[0]):
            (reply,) = until_pulled(grid, number)
    assert data_of(reply) == b"x"


def test_a_message_that_flower_has_dropped_is_sent_again(house):
    """Its second copy has no pieces, because the site has confirmed the first one meanwhile."""
    node = Node(node_id=house.nodes[0])
    with house.grid() as grid:
        client = house.activate(0)
        (number,) = grid.push_messages([letter(grid, house.nodes[0], b"x")])
        house.state.object_store.delete(number)
        assert not client.PullMessages(PullMessagesRequest(node=node)).messages_list

        def has_come() -> bool:
            assert not list(grid.pull_messages([number]))
            return bool(client.PullMessages(PullMessagesRequest(node=node)).messages_list)

        wait_for(has_come)


def test_a_site_that_stays_away_counts_as_unavailable_after_the_grace(house):
    client = house.activate(1)
    client.DeactivateNode(DeactivateNodeRequest(node_id=house.nodes[1]))
    with house.grid(grace=0.5) as grid:
        (number,) = grid.push_messages([letter(grid, house.nodes[1], b"x")])
        assert grid.pull_messages([number]) == []
        time.sleep(0.6)
        (reply,) = grid.pull_messages([number])
        assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
    assert len(house.state.object_store) == 0


@pytest.mark.slow
def test_a_client_reconnects_when_the_link_comes_back(tmp_path):
    house, states = House(tmp_path), list[str]()
    with house.online(echo(), house.sites[0], states=states), house.grid() as grid:
        for _ in range(2):
            with office.serving(house.coordinator):
                house.wait_online(grid, 1)
                message = letter(grid, house.nodes[0], b"ab")
                (reply,) = grid.send_and_receive([message], timeout=60)
                assert data_of(reply) == b"ba"


@pytest.mark.slow
def test_the_database_outlives_a_killed_engine_and_its_run_does_not(house):
    left = LinkGrid(house.state)  # killed: never closed
    left.push_messages([letter(left, house.nodes[0], b"old")])
    end_left_runs(house.state)
    house.activate(0).DeactivateNode(DeactivateNodeRequest(node_id=house.nodes[0]))
    with house.online(echo(), house.sites[0]), house.grid() as grid:
        house.wait_online(grid, 1)
        assert house.state.num_message_ins() == 0
        (reply,) = grid.send_and_receive([letter(grid, house.nodes[0], b"new")], timeout=30)
        assert data_of(reply) == b"wen"


def test_a_run_outlives_a_minute_without_a_word_and_a_clock_that_is_set(house, monkeypatch):
    def status(grid: LinkGrid) -> str:
        found = house.state.get_run_status({grid.run.run_id})
        return str(found[grid.run.run_id].status)

    def later() -> datetime.datetime:
        return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=365)

    with house.grid() as grid:
        monkeypatch.setattr(sql_corestate, "now", later)
        assert status(grid) == "running"
        house.state.stop_run(grid.run.run_id)
        assert status(grid) == "finished"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-nodes",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/get-fab",
        "/docs",
    ],
)
def test_an_outsider_with_the_ca_finds_nothing(house, path):
    url = house.coordinator.config().address + path
    assert httpx.post(url, content=b"", verify=str(house.coordinator.ca)).status_code == 404


def test_an_outsider_cannot_speak_for_a_node(house, tmp_path):
    stranger = SiteFolder.create(tmp_path / "s", SiteConfig(name="stranger"))
    where = office.office_of(house.sites[0])
    client = fleet._open_client(where, fleet._load_key(stranger.fleet_key))
    request = PullMessagesRequest(node=Node(node_id=house.nodes[0]))
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        client.PullMessages(request)
    assert not house.clients(0).PullMessages(request).messages_list  # the control


@pytest.mark.parametrize(
    ("body", "status"), [(b"\xff" * 9, 400), (PullObjectRequest().SerializeToString(), 401)]
)
def test_a_call_that_is_none_or_of_nobody_gets_a_bare_status(house, body, status):
    url = f"{house.coordinator.config().address}/v1/fleet/pull-object"
    answer = httpx.post(url, content=body, verify=str(house.coordinator.ca))
    assert (answer.status_code, answer.content) == (status, b"")


@pytest.mark.parametrize("path", sorted(FLEET_PATHS - {"/v1/fleet/push-object"}))
def test_a_stranger_cannot_make_it_parse_much(house, path):
    url = house.coordinator.config().address + path
    for size, status in ((1 << 17, 400), ((1 << 17) + 1, 413)):
        answer = httpx.post(url, content=b"\xff" * size, verify=str(house.coordinator.ca))
        assert answer.status_code == status


def reply_of(grid: LinkGrid, number: str) -> Message:
    reply = Message(record(b"y"), reply_to=grid._pending[number].message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return reply


def announced(house: House, reply: Message, tree: ObjectTree | None = None) -> PushMessagesResponse:
    return house.clients(0).PushMessages(
        PushMessagesRequest(
            node=Node(node_id=house.nodes[0]),
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree or get_object_tree(reply)],
            clientapp_runtime_list=[0.0],
        )
    )


def test_a_member_cannot_keep_the_next_letter_from_being_sent(house):
    """It knows the adapter, which is sent again; it announces it as a parent of something else."""
    data = os.urandom(1000)
    with house.grid() as grid:
        house.activate(0)
        first, second = (letter(grid, house.nodes[0], data) for _ in range(2))
        (number,) = grid.push_messages([first])
        house.state.object_store.delete(number)  # as when the site confirms it
        known = first.content.array_records["parts"]["a"].object_id
        wrong = ObjectTree(object_id=known, children=[ObjectTree(object_id="0" * 64)])
        reply = reply_of(grid, number)
        tree = ObjectTree(object_id=reply.object_id, children=[wrong])
        assert known in announced(house, reply, tree).objects_to_push
        with pytest.raises(ValueError, match="different children"):
            house.state.object_store.preregister(grid.run.run_id, get_object_tree(second))
        house.clients(0).DeactivateNode(DeactivateNodeRequest(node_id=house.nodes[0]))
        with house.online(echo(), house.sites[0]):
            (reply,) = grid.send_and_receive([second], timeout=30)
        assert data_of(reply) == data[::-1]
    assert len(house.state.object_store) == 0


def test_what_a_site_did_not_answer_goes_when_it_is_asked_again(house):
    with house.grid() as grid:
        house.activate(0)
        for _ in range(2):
            (number,) = grid.push_messages([letter(grid, house.nodes[0], os.urandom(9))])
            reply = reply_of(grid, number)
            assert announced(house, reply).objects_to_push  # none of which follows
            house.state.object_store.delete(number)  # as when the site confirms it
            assert len(house.state.object_store) == len(get_all_nested_objects(reply))
            assert len(grid._pending) == house.state.num_message_ins() == 1


def test_an_answer_that_was_cut_in_two_is_asked_for_again(house):
    """A site whose cable is cut in its upload has announced an answer that never becomes whole."""
    with house.grid() as grid:
        house.activate(0)
        (number,) = grid.push_messages([letter(grid, house.nodes[0], b"abc")])
        assert announced(house, reply_of(grid, number)).objects_to_push  # none of which follows
        assert list(grid.pull_messages([number])) == []
        assert grid._pending[number].reply is not None
        house.clients(0).DeactivateNode(DeactivateNodeRequest(node_id=house.nodes[0]))
        with house.online(echo(), house.sites[0]):
            (found,) = until_pulled(grid, number)
        assert data_of(found) == b"cba"
    assert len(house.state.object_store) == 0


def test_an_announced_piece_comes_in_its_session_alone(house):
    with house.grid() as grid:
        house.activate(0)
        (number,) = grid.push_messages([letter(grid, house.nodes[0], b"x")])
        reply = reply_of(grid, number)
        session = announced(house, reply).session_id
        (piece,) = reply.content.array_records["parts"]["a"].children.values()

        def push(session: str) -> bool:
            request = PushObjectRequest(
                node=Node(node_id=house.nodes[0]),
                run_id=grid.run.run_id,
                session_id=session,
                object_id=piece.object_id,
                object_content=piece.deflate(),
            )
            return bool(house.clients(0).PushObject(request).stored)

        with pytest.raises(httpx.HTTPStatusError, match="403"):
            push("")  # Flower would find the session, of whatever node
        assert push(session)


def test_no_piece_is_taken_that_no_reply_has_announced(house):
    node = Node(node_id=house.nodes[0])
    content = record(b"x").array_records["parts"]["a"].deflate()
    number = get_object_id(content)
    with house.grid() as grid:
        for session in ("", "none"):
            request = PushObjectRequest(
                node=node,
                run_id=grid.run.run_id,
                session_id=session,
                object_id=number,
                object_content=content,
            )
            with pytest.raises(httpx.HTTPStatusError, match="403"):
                house.clients(0).PushObject(request)
        asked = PullObjectRequest(node=node, run_id=grid.run.run_id, object_id=number)
        assert not house.clients(0).PullObject(asked).object_found


def test_one_node_cannot_answer_for_another(house):
    """Node b, authenticated as b, pushes a reply in a's name: Flower would take it."""
    with house.grid() as grid:
        for site in (0, 1):
            house.activate(site)
        message = letter(grid, house.nodes[0], b"for a")
        (number,) = grid.push_messages([message])
        forged = Message(record(b"by b"), reply_to=message)
        forged.metadata.__dict__["_message_id"] = forged.object_id
        assert forged.metadata.src_node_id == house.nodes[0]

        def push(site: int) -> None:
            house.clients(site).PushMessages(
                PushMessagesRequest(
                    node=Node(node_id=house.nodes[site]),
                    messages_list=[message_to_proto(remove_content_from_message(forged))],
                    message_object_trees=[get_object_tree(forged)],
                    clientapp_runtime_list=[0.0],
                )
            )

        with pytest.raises(httpx.HTTPStatusError, match="403"):
            push(1)
        grid._look({number: grid._pending[number]})
        assert grid._pending[number].reply is None
        push(0)  # the control: the same words from a itself
        grid._look({number: grid._pending[number]})
        assert grid._pending[number].reply is not None


def test_a_reply_of_garbage_is_an_error_not_a_crash(house):
    with house.grid() as grid:
        house.activate(0)
        message = letter(grid, house.nodes[0], b"x")
        (number,) = grid.push_messages([message])
        reply = Message(record(b"y"), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        grid._pending[number].reply = reply  # its objects never came
        (found,) = grid.pull_messages([number])
        assert found.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def test_a_database_that_is_none_is_refused(tmp_path):
    path = tmp_path / "x.sqlite"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 30)
    with pytest.raises(Exception, match="not a database"):
        open_state(path)


def test_a_key_that_is_none_is_refused(tmp_path, house):
    bad = tmp_path / "key"
    bad.write_bytes(b"no key")
    with pytest.raises(IdentityError, match="node key"):
        stay_connected(
            ClientApp(),
            Office(address="x:1", ca=bad, key=bad, note=tmp_path / "n"),
            threading.Event(),
        )


@pytest.mark.slow
def test_a_revoked_node_is_out_and_a_message_to_it_is_answered_at_once(tmp_path):
    house = House(tmp_path)
    keys = office.fleet_keys(house.coordinator)
    nodes = admit_nodes(house.state, {0: keys[0]})
    assert nodes == {0: house.nodes[0]}
    request = PullMessagesRequest(node=Node(node_id=house.nodes[1]))
    with office.serving(house.coordinator), pytest.raises(httpx.HTTPStatusError, match="401"):
        house.clients(1).PullMessages(request)
    with house.grid() as grid:
        (number,) = grid.push_messages([letter(grid, house.nodes[1], b"x")])
        (reply,) = grid.pull_messages([number])
        assert reply.has_error()
