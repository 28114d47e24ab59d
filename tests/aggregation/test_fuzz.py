"""Every decoder of bytes that a peer sends: a value or one kind of error, in bounded memory.

Inputs are noise, noise of the right kind, and valid messages with bytes changed, cut, repeated or
spliced. Whatever is accepted must be written back as the same bytes: one value has one encoding.
"""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedward.aggregation import shamir, wire
from fedward.aggregation.parameters import SessionParameters, Slot
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.errors import IdentityError, ProtocolError, SiteCode
from fedward.identity import Identity
from fedward.messages import Letter, open_letter, seal_letter
from tests.aggregation.rig import make_parameters, make_rig, make_roster

Decoder = Callable[[bytes], object]
SENDER = Identity(bytes(32))
MALFORMED = json.loads((Path(__file__).parent / "vectors" / "malformed.json").read_text())


def encode_released(data: bytes) -> bytes:
    return wire.encode_released(wire.decode_released(data))


def encode_envelopes(data: bytes) -> bytes:
    return wire.encode_envelopes(*wire.decode_envelopes(data))


AGAIN: dict[str, Callable[[bytes], bytes]] = {
    "hello": lambda data: wire.encode_hello(wire.decode_hello(data)),
    "hellos": lambda data: wire.encode_hellos(wire.decode_hellos(data)),
    "shares": lambda data: wire.encode_shares(wire.decode_shares(data)),
    "envelopes": encode_envelopes,
    "header": lambda data: wire.encode_header(wire.decode_header(data)),
    "survivors": lambda data: wire.encode_survivors(wire.decode_survivors(data)),
    "vote": lambda data: wire.encode_vote(wire.decode_vote(data)),
    "certificate": lambda data: wire.encode_certificate(wire.decode_certificate(data)),
    "released": encode_released,
    "complaint": lambda data: wire.encode_complaint(wire.decode_complaint(data)),
    "parameters": lambda data: SessionParameters.from_bytes(data).to_bytes(),
}
"""By kind of message: read it, then write what was read."""


def honest() -> dict[str, bytes]:
    """A valid message of each kind."""
    rig = make_rig(4, secrets="fuzz", gone={4: "R3"})
    rig.run()
    parameters = make_parameters(
        make_roster(range(4)),
        slots=(Slot(name="loss", clip=8.0),),
        noise=0.5,
        weights=((0, 1.0), (3, 0.25)),
    )
    return {
        "hello": rig.said["R0"][1],
        "hellos": rig.heard["R1"][1],
        "shares": rig.said["R1"][1],
        "envelopes": rig.heard["R2"][1],
        "header": rig.said["R2"][1],
        "survivors": rig.heard["R3"][1],
        "vote": rig.said["R3"][1],
        "certificate": rig.heard["R4"][1],
        "released": rig.said["R4"][1],
        "complaint": wire.encode_complaint(wire.Complaint(1, 2, bytes(32), bytes(64))),
        "parameters": parameters.to_bytes(),
    }


HONEST = honest()


@st.composite
def mangled(draw: st.DrawFn, original: bytes) -> bytes:
    """A valid message after up to four changes."""
    data = original
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 300)))
        put = draw(
            st.one_of(
                st.binary(max_size=8),
                st.sampled_from([b"\xff" * 4, b"\0" * 4, data[start:end] * 2, b"-1", b"1e999"]),
            )
        )
        data = data[:start] + put + data[end:]
    return data


KINDS = st.sampled_from(sorted(AGAIN))
MESSAGES = KINDS.flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.one_of(
            st.binary(max_size=700),
            st.binary(max_size=700).map(lambda body: HONEST[kind][:4] + body),
            mangled(HONEST[kind]),
        ),
    )
)


@pytest.mark.parametrize("kind", sorted(AGAIN))
def test_the_honest_messages_are_read(kind):
    """Control: otherwise the fuzzing would only see one refusal."""
    assert AGAIN[kind](HONEST[kind]) == HONEST[kind]


@settings(max_examples=600)
@given(MESSAGES)
def test_a_message_or_a_protocol_error(found):
    kind, data = found
    try:
        again = AGAIN[kind](data)
    except ProtocolError:
        return
    assert again == data


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["0x1p5000", "nan", "-inf", "0x0.0p+0", "uniform", "secagg/1", "00" * 32]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = sorted(json.loads(HONEST["parameters"]))


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
@example({"clip": "0x1p5000"})
@example({"slots": [["loss", "0x1p5000"]]})
@example({"run": "\ud800"})
@example({"sites": 2**64})
def test_parameters_with_other_values(changes):
    fields = json.loads(HONEST["parameters"]) | changes
    data = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    try:
        assert SessionParameters.from_bytes(data).to_bytes() == data
    except ProtocolError:
        return


@pytest.mark.parametrize(
    "data", [b"[" * 60_000, b'{"a":' * 10_000, b"9" * 60_000, b"\xff\xfe{", b""]
)
def test_json_that_breaks_parsers(data):
    with pytest.raises(ProtocolError):
        SessionParameters.from_bytes(data)


@given(
    st.dictionaries(
        st.integers(1, 9),
        st.one_of(st.binary(max_size=40), st.binary(min_size=33, max_size=33)),
        max_size=9,
    ),
    st.integers(1, 9),
)
def test_shares(shares, threshold):
    try:
        secret = shamir.join(shares, threshold)
    except ProtocolError:
        return
    assert len(secret) == 32


def letter_records(header: bytes, parts: dict[str, bytes]) -> RecordDict:
    """What a signer who has a member's key can send: any header under a good signature."""
    signature = SENDER.sign("fedward/1/site", header)
    arrays = {
        name: Array(dtype="uint8", shape=(len(data),), stype="raw", data=data)
        for name, data in parts.items()
    }
    records = RecordDict({"letter": ConfigRecord({"header": header, "signature": signature})})
    records["parts"] = ArrayRecord(arrays)
    return records


LETTER = Letter(
    action="hello",
    attempt=Attempt(run="r", round=1),
    site=1,
    code=SiteCode.DONE,
    parts={"message": b"abc"},
)
HEADER = json.loads(LETTER.header())


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from([*HEADER, "more"]), JSON, min_size=1, max_size=3))
@example({"action": []})
@example({"order": [True, 1, 1]})
@example({"order": [1.0, 1, 1]})
@example({"site": float("nan")})
@example({"run": ["r"]})
@example({"run": "\ud800"})
@example({"code": {}})
def test_letters_with_other_values(changes):
    fields: Any = HEADER | changes
    header = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    try:
        letter = open_letter(letter_records(header, {"message": b"abc"}), SENDER.public_key, "site")
    except IdentityError:
        return
    assert letter.header() == header
    assert [type(n) for n in (letter.site, *letter.attempt.order)] == [int] * 4
    assert type(letter.attempt.run) is type(letter.action) is str


@settings(max_examples=200)
@given(st.one_of(st.binary(max_size=300), mangled(LETTER.header())))
@example(b"[" * 60_000)
@example(b"9" * 60_000)
def test_headers_of_letters(header):
    records = letter_records(header, {"message": b"abc"})
    if header != LETTER.header():
        with pytest.raises(IdentityError):
            open_letter(records, SENDER.public_key, "site")


def test_the_honest_letter_is_read():
    assert open_letter(seal_letter(LETTER, SENDER, "site"), SENDER.public_key, "site") == LETTER
    assert canonical_json(HEADER) == LETTER.header()


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that a refused message made the process allocate."""
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", sorted(set(AGAIN) - {"parameters"}))
@pytest.mark.parametrize("body", [b"\xff" * 64, b"\xff" * 100_000], ids=["short", "long"])
def test_no_number_on_the_wire_sizes_memory(kind, body):
    data = HONEST[kind][:4] + body
    assert peak_of(lambda: AGAIN[kind](data)) < 12 * len(data) + 20_000


@pytest.mark.parametrize("changes", [{"words": 1 << 60}, {"sites": 1 << 60}, {"dropouts": 1 << 60}])
def test_no_parameter_sizes_memory(changes):
    data = canonical_json(json.loads(HONEST["parameters"]) | changes)
    assert peak_of(lambda: SessionParameters.from_bytes(data)) < 50_000


def test_an_allocation_would_be_noticed():
    """Negative control."""

    def work() -> None:
        raise ProtocolError(str(len(bytearray(1 << 20))))

    assert peak_of(work) > 1 << 20


@pytest.mark.parametrize("case", MALFORMED, ids=[case["why"] for case in MALFORMED])
def test_vectors_that_must_be_refused(case):
    with pytest.raises(ProtocolError):
        AGAIN[case["kind"]](bytes.fromhex(case["message"]))
