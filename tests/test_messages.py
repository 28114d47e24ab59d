"""Letters: nothing in them can be changed, moved or replayed as something else."""

import dataclasses
import json

import pytest
from flwr.app import Array, ConfigRecord, RecordDict

from fedward.attempt import Attempt
from fedward.canonical import Json, canonical_json
from fedward.errors import IdentityError, SiteCode
from fedward.identity import Identity
from fedward.messages import Letter, countersign, open_letter, seal_letter

SENDER = Identity(bytes(32))
LETTER = Letter(
    action="hello",
    attempt=Attempt(run="r", round=2, attempt=3),
    site=4,
    code=SiteCode.DONE,
    parts={"message": b"abc", "empty": b""},
    lines=((3, "ab" * 32), (7, "cd" * 32)),
    receipt=countersign(SENDER, b"site", (3, "ab" * 32)),
)


def test_a_letter_comes_back_as_it_was():
    records = seal_letter(LETTER, SENDER, "site")
    assert open_letter(records, SENDER.public_key, "site") == LETTER


def test_a_letter_survives_flowers_wire_format():
    records = seal_letter(LETTER, SENDER, "site")
    children = {child.object_id: child for child in records.children.values()}
    again = RecordDict.inflate(records.deflate(), children)
    assert open_letter(again, SENDER.public_key, "site") == LETTER


def test_a_site_cannot_speak_as_the_coordinator():
    records = seal_letter(LETTER, SENDER, "site")
    with pytest.raises(IdentityError):
        open_letter(records, SENDER.public_key, "coordinator")


def test_another_key_is_refused():
    records = seal_letter(LETTER, SENDER, "site")
    with pytest.raises(IdentityError):
        open_letter(records, Identity(b"\1" * 32).public_key, "site")


def change_part(records):
    records["parts"]["message"] = Array(dtype="uint8", shape=(3,), stype="raw", data=b"abd")


def add_part(records):
    records["parts"]["more"] = Array(dtype="uint8", shape=(0,), stype="raw", data=b"")


def remove_part(records):
    del records["parts"]["empty"]


def pickle_part(records):
    records["parts"]["message"] = Array(
        dtype="uint8", shape=(3,), stype="numpy.ndarray", data=b"abc"
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
        add_part,
        remove_part,
        pickle_part,
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
