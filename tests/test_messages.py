"""Letters: nothing in them can be changed, moved or replayed as something else."""

import dataclasses
import json

import pytest
from flwr.app import Array, ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message.message import make_message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedward.attempt import Attempt
from fedward.canonical import Json, canonical_json
from fedward.errors import IdentityError, SiteCode
from fedward.identity import Identity
from fedward.messages import (
    Letter,
    countersign,
    inflate,
    open_letter,
    seal_letter,
    seal_letters,
)

SENDER = Identity(bytes(32))
LONG = bytes(range(250)) * 300
LETTER = Letter(
    action="hello",
    attempt=Attempt(run="r", round=2, attempt=3),
    site=4,
    code=SiteCode.DONE,
    parts={"message": b"abc", "empty": b"", "words": LONG},
    lines=((3, "ab" * 32), (7, "cd" * 32)),
    receipt=countersign(SENDER, b"site", (3, "ab" * 32)),
)


def message_of(records: RecordDict) -> Message:
    metadata = Metadata(
        run_id=1, message_id="", src_node_id=1, dst_node_id=1, reply_to_message_id="",
        group_id="", created_at=1.0, ttl=1.0, message_type="train",
    )  # fmt: skip
    return make_message(metadata, content=records)


def test_a_letter_comes_back_as_it_was():
    records = seal_letter(LETTER, SENDER, "site")
    assert open_letter(records, SENDER.public_key, "site") == LETTER


def test_a_letter_survives_flowers_wire_format():
    records = seal_letter(LETTER, SENDER, "site")
    message = message_of(records)
    contents = {n: item.deflate() for n, item in get_all_nested_objects(message).items()}
    assert len(contents) == 6, "message, records, letter; array record, array and its one piece"
    again = inflate(message.object_id, contents, sum(map(len, contents.values())))
    assert again is not None
    assert open_letter(again.content, SENDER.public_key, "site") == LETTER
    assert inflate(message.object_id, contents, len(LONG) - 1) is None


def test_a_letter_without_long_parts_is_three_objects():
    letter = dataclasses.replace(LETTER, parts={"message": b"abc"})
    message = message_of(seal_letter(letter, SENDER, "site"))
    assert len(get_all_nested_objects(message)) == 3


def test_letters_sealed_together_are_the_same_as_alone():
    letters = [dataclasses.replace(LETTER, site=site) for site in (4, 5)]
    together = seal_letters(letters, SENDER, "site")
    alone = [seal_letter(letter, SENDER, "site") for letter in letters]
    assert [r.object_id for r in together] == [r.object_id for r in alone]
    assert together[0]["parts"]["words"] is together[1]["parts"]["words"]
    equal = [dataclasses.replace(LETTER, parts={"words": bytes(list(LONG))}) for _ in letters]
    changed = dataclasses.replace(LETTER, parts={"words": LONG + b"x"})
    for letter, records in zip([*equal, changed], seal_letters([*equal, changed], SENDER, "site"),
                               strict=True):  # fmt: skip
        assert open_letter(records, SENDER.public_key, "site") == letter


def test_a_site_cannot_speak_as_the_coordinator():
    records = seal_letter(LETTER, SENDER, "site")
    with pytest.raises(IdentityError):
        open_letter(records, SENDER.public_key, "coordinator")


def test_another_key_is_refused():
    records = seal_letter(LETTER, SENDER, "site")
    with pytest.raises(IdentityError):
        open_letter(records, Identity(b"\1" * 32).public_key, "site")


def change_part(records):
    records["letter"]["part.message"] = b"abd"


def change_array(records):
    data = LONG[1:] + b"x"
    records["parts"]["words"] = Array(dtype="uint8", shape=(len(data),), stype="raw", data=data)


def add_part(records):
    records["letter"]["part.more"] = b""


def add_array(records):
    records["parts"]["message"] = Array(dtype="uint8", shape=(0,), stype="raw", data=b"")


def hide_part(records):
    records["parts"]["message"] = Array(dtype="uint8", shape=(3,), stype="raw", data=b"abc")
    records["letter"]["part.message"] = b"abd"  # nobody signed this one


def remove_part(records):
    del records["letter"]["part.empty"]


def remove_array(records):
    del records["parts"]


def retype_part(records):
    records["letter"]["part.message"] = "abc"


def pickle_array(records):
    records["parts"]["words"] = Array(
        dtype="uint8", shape=(len(LONG),), stype="numpy.ndarray", data=LONG
    )


def change_header(records):
    header = records["letter"]["header"].replace(b'"site":4', b'"site":5')
    records["letter"]["header"] = header


def remove_header(records):
    records["letter"] = ConfigRecord()


def grow_header(records):
    records["letter"]["header"] = b" " * (1 << 17)


@pytest.mark.parametrize(
    "change",
    [
        change_part,
        change_array,
        add_part,
        add_array,
        hide_part,
        remove_part,
        remove_array,
        retype_part,
        pickle_array,
        change_header,
        remove_header,
        grow_header,
    ],
)
def test_every_change_is_noticed(change):
    records = seal_letter(LETTER, SENDER, "site")
    change(records)
    with pytest.raises(IdentityError):
        open_letter(records, SENDER.public_key, "site")


def with_field(name: str, value: Json) -> bytes:
    return canonical_json({**json.loads(LETTER.header()), name: value})


BAD_LINES: list[Json] = [None, [[]], [1], [[0, "a"]], [["1", "a"]], [[1, 2]]]
BAD_LINES += [[[2, "a"], [1, "b"]], [[1 << 63, "a"]]]


@pytest.mark.parametrize(
    "header",
    [
        *(b"", b"[]", b"{}", b"null", b'{"order":[1]}', b"\xff"),
        *(with_field("lines", value) for value in BAD_LINES),
        *(with_field("receipt", value) for value in (1, {}, {"seq": 1}, {"seq": 0})),
        with_field("receipt", {"seq": 0, "signature": ""}),
        with_field("receipt", {"seq": 1, "signature": 2}),
        with_field("receipt", {"seq": 1, "signature": "", "more": 1}),
    ],
)
def test_a_signed_but_malformed_header_is_refused(header):
    config = ConfigRecord({"header": header, "signature": SENDER.sign("fedward/1/site", header)})
    with pytest.raises(IdentityError):
        open_letter(RecordDict({"letter": config}), SENDER.public_key, "site")


@pytest.mark.parametrize(
    ("coordinator", "site", "head"),
    [(b"\1" * 32, b"site", "ab"), (b"\0" * 32, b"other", "ab"), (b"\0" * 32, b"site", "cd")],
)
def test_a_receipt_is_for_one_line_of_one_site(coordinator, site, head):
    receipt = countersign(SENDER, b"site", (3, "ab"))
    receipt.check(SENDER.public_key, b"site", "ab")
    for wrong in (receipt, dataclasses.replace(receipt, seq=4)):
        with pytest.raises(IdentityError):
            wrong.check(Identity(coordinator).public_key, site, head)
    with pytest.raises(IdentityError, match="not hex"):
        dataclasses.replace(receipt, signature="x").check(SENDER.public_key, b"site", "ab")


def test_a_missing_part_is_named():
    with pytest.raises(IdentityError, match="'adapter'"):
        LETTER.part("adapter")
