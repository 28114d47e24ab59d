"""A coordinator on the real wire that would fill a site's memory, or send it elsewhere."""

import gzip
import os
from collections.abc import Callable, Iterator, Mapping

import httpx
import pytest
from flwr.app import Array, ArrayRecord, Message, Metadata, RecordDict
from flwr.app.message.message import make_message
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
)

from fedward.client import codes, fleet
from fedward.messages import inflate
from fedward.server.coordinator_folder import CoordinatorFolder
from fedward.server.enrolment import AsgiApp, Receive, Scope, Send
from tests.server import office
from tests.server.tls import serving

pytestmark = pytest.mark.filterwarnings("ignore")  # Flower's own deprecations

Answer = Callable[[str, bytes], tuple[int, dict[bytes, bytes], Iterator[bytes]]]
"""Path and body of a request → status, headers and body."""


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorFolder:
    return office.make_coordinator(tmp_path_factory.mktemp("c") / "c")


@pytest.fixture(scope="module")
def where(coordinator: CoordinatorFolder, tmp_path_factory: pytest.TempPathFactory) -> fleet.Office:
    (site,) = office.enrol_sites(coordinator, tmp_path_factory.mktemp("s"), ["x"])
    return office.office_of(site)


def app_of(answer: Answer) -> AsgiApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            part = await receive()
            body, more = body + part.get("body", b""), part.get("more_body", False)
        status, headers, pieces = answer(scope["path"], body)
        given = list(headers.items())
        await send({"type": "http.response.start", "status": status, "headers": given})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


def asked(where: fleet.Office) -> PullObjectResponse:
    with fleet._open_client(where, fleet._load_key(where.key)) as client:
        return client.PullObject(PullObjectRequest(object_id="a"))


def test_an_answer_is_read_up_to_its_limit(coordinator, where):
    sizes = [fleet._MOST_ANSWER - 100]

    def answer(path: str, body: bytes) -> tuple[int, dict[bytes, bytes], Iterator[bytes]]:
        data = PullObjectResponse(object_content=bytes(sizes[-1])).SerializeToString()
        return 200, {}, (data[i : i + 100_000] for i in range(0, len(data), 100_000))

    with serving(app_of(answer), coordinator):
        assert len(asked(where).object_content) == sizes[0], "control"
        sizes.append(fleet._MOST_ANSWER + 1)
        with pytest.raises(httpx.RemoteProtocolError, match="more than"):
            asked(where)


def test_a_packed_answer_is_not_unpacked(coordinator, where):
    small = gzip.compress(bytes(100 << 20))
    assert len(small) < fleet._MOST_ANSWER
    packed = (200, {b"content-encoding": b"gzip"}, iter([small]))
    with (
        serving(app_of(lambda path, body: packed), coordinator),
        pytest.raises(httpx.RemoteProtocolError, match="packed"),
    ):
        asked(where)


def test_a_site_is_not_sent_elsewhere(coordinator, where):
    paths = list[str]()

    def answer(path: str, body: bytes) -> tuple[int, dict[bytes, bytes], Iterator[bytes]]:
        paths.append(path)
        return 307, {b"location": b"/elsewhere"}, iter(())

    with serving(app_of(answer), coordinator), pytest.raises(httpx.HTTPStatusError):
        asked(where)
    assert paths == ["/v1/fleet/pull-object"]


def message_of(data: bytes) -> Message:
    array = Array(dtype="uint8", shape=(len(data),), stype="raw", data=data)
    metadata = Metadata(
        run_id=1, message_id="", src_node_id=1, dst_node_id=1, reply_to_message_id="",
        group_id="", created_at=1.0, ttl=1.0, message_type="train",
    )  # fmt: skip
    return make_message(metadata, content=RecordDict({"parts": ArrayRecord({"a": array})}))


def fetch(
    coordinator: CoordinatorFolder,
    where: fleet.Office,
    message: Message,
    contents: Mapping[str, bytes],
    most: int,
) -> Message | None:
    """Fetch a message whose objects the coordinator gives as they are here."""

    def answer(path: str, body: bytes) -> tuple[int, dict[bytes, bytes], Iterator[bytes]]:
        if path.endswith("confirm-message-received"):
            return 200, {}, iter([ConfirmMessageReceivedResponse().SerializeToString()])
        content = contents[PullObjectRequest.FromString(body).object_id]
        given = PullObjectResponse(object_found=True, object_available=True, object_content=content)
        return 200, {}, iter([given.SerializeToString()])

    message.metadata.__dict__["_message_id"] = message.object_id
    with (
        serving(app_of(answer), coordinator),
        fleet._open_client(where, fleet._load_key(where.key)) as client,
    ):
        return fleet._fetch(client, Node(node_id=1), message, get_object_tree(message), most)


def contents_of(message: Message) -> dict[str, bytes]:
    return {key: item.deflate() for key, item in get_all_nested_objects(message).items()}


def test_a_message_is_fetched_up_to_its_limit(coordinator, where):
    message = message_of(bytes(range(256)) * 4000)
    contents = contents_of(message)
    size = sum(map(len, contents.values()))
    found = fetch(coordinator, where, message, contents, size)
    assert found is not None
    arrays = [given.content.array_records["parts"]["a"].data for given in (found, message)]
    assert arrays[0] == arrays[1]
    assert fetch(coordinator, where, message, contents, size - 1) is None


def test_a_piece_that_is_named_many_times_counts_many_times(coordinator, where):
    """As a file of zeros: a few bytes on the wire, any number in memory."""
    message = message_of(bytes(20 << 20))
    contents = contents_of(message)
    sent = sum(map(len, contents.values()))
    assert sent < 8 << 20
    assert fetch(coordinator, where, message, contents, 8 << 20) is None
    assert fetch(coordinator, where, message, contents, 21 << 20) is not None
    # The coordinator allows what came: of a masked vector no piece is like another.
    number = message.object_id
    assert inflate(number, contents, sent) is None
    honest = message_of(os.urandom(20 << 20))
    contents = contents_of(honest)
    assert inflate(honest.object_id, contents, sum(map(len, contents.values()))) is not None


def test_what_counts_as_a_library_s_error_is_said_once():
    assert set(codes.LIBRARY_ERRORS) < set(fleet._LIBRARY_ERRORS)
