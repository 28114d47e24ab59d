"""Every decoder reads what its encoder wrote and refuses all else with one kind of error."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward.aggregation import wire
from fedward.errors import ProtocolError

IDS = st.integers(0, 2**32 - 1)


def raw(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


def rows(*columns: st.SearchStrategy[bytes]) -> st.SearchStrategy[tuple[Any, ...]]:
    """Tuples ordered by their first element, each once."""
    lists = st.lists(st.tuples(IDS, *columns), max_size=5, unique_by=lambda row: row[0])
    return lists.map(lambda found: tuple(sorted(found, key=lambda row: row[0])))


HELLO = st.builds(wire.Hello, IDS, raw(32), raw(32), raw(32), raw(64))
SEALED = rows(raw(82), raw(32), raw(32), raw(64)).map(lambda r: tuple(wire.Sealed(*x) for x in r))
ENVELOPES = rows(raw(32), raw(82), raw(32), raw(32), raw(64))
HEADERS = rows(raw(32), raw(64)).map(lambda found: tuple(wire.Header(*row) for row in found))
VOTES = rows(raw(64)).map(lambda found: tuple(wire.Vote(*row) for row in found))
KINDS = st.sampled_from(sorted(wire._KINDS.values()))
DECODERS = [
    wire.decode_hello,
    wire.decode_hellos,
    wire.decode_shares,
    wire.decode_envelopes,
    wire.decode_header,
    wire.decode_survivors,
    wire.decode_vote,
    wire.decode_certificate,
    wire.decode_released,
    wire.decode_complaint,
]


@given(HELLO)
def test_hello(hello):
    assert wire.decode_hello(wire.encode_hello(hello)) == hello


@given(rows(raw(32), raw(32), raw(32), raw(64)))
def test_hellos(found):
    hellos = tuple(wire.Hello(*row) for row in found)
    assert wire.decode_hellos(wire.encode_hellos(hellos)) == hellos


@given(IDS, raw(32), raw(32), raw(32), SEALED)
def test_shares(site, cb, hb, hs, sealed):
    shares = wire.Shares(site, cb, hb, hs, sealed)
    assert wire.decode_shares(wire.encode_shares(shares)) == shares


@given(rows(), ENVELOPES)
def test_envelopes(ids, found):
    cohort = tuple(row[0] for row in ids)
    envelopes = tuple(wire.Envelope(*row) for row in found)
    assert wire.decode_envelopes(wire.encode_envelopes(cohort, envelopes)) == (cohort, envelopes)


@given(HEADERS, VOTES)
def test_headers_and_votes(headers, votes):
    assert wire.decode_survivors(wire.encode_survivors(headers)) == headers
    assert wire.decode_certificate(wire.encode_certificate(votes)) == votes
    for header in headers:
        assert wire.decode_header(wire.encode_header(header)) == header
    for vote in votes:
        assert wire.decode_vote(wire.encode_vote(vote)) == vote


@given(IDS, rows(raw(33)))
def test_released(site, shares):
    released = wire.Released(site, shares)
    assert wire.decode_released(wire.encode_released(released)) == released


@given(IDS, IDS, raw(32), raw(64))
def test_complaint(site, dealer, key, signature):
    complaint = wire.Complaint(site, dealer, key, signature)
    assert wire.decode_complaint(wire.encode_complaint(complaint)) == complaint


def attempt(decoder: Callable[[bytes], object], data: bytes) -> bool:
    """Either a value or a ProtocolError: any other exception fails the test."""
    try:
        decoder(data)
    except ProtocolError:
        return False
    return True


@given(st.sampled_from(DECODERS), st.binary(max_size=600))
def test_noise(decoder, data):
    assert not attempt(decoder, data) or data[:3] == b"SA1"


@given(st.sampled_from(DECODERS), KINDS, st.binary(max_size=900))
def test_noise_of_the_right_kind(decoder, kind, data):
    attempt(decoder, kind + data)


@given(rows(raw(32), raw(64)), st.integers(1, 99))
def test_cut_off_and_padded(found, count):
    data = wire.encode_survivors(tuple(wire.Header(*row) for row in found))
    assert not attempt(wire.decode_survivors, data + bytes(count))
    if len(data) - count > 4:
        assert not attempt(wire.decode_survivors, data[:-count])


def test_an_id_twice_or_out_of_order():
    one, two = wire.Vote(1, bytes(64)), wire.Vote(2, bytes(64))
    for votes in ([one, one], [two, one]):
        with pytest.raises(ProtocolError, match="ascending"):
            wire.decode_certificate(wire.encode_certificate(votes))


def test_a_count_that_promises_more_than_comes():
    """No allocation follows a number on the wire: only the bytes that came count."""
    data = wire._KINDS["envelopes"] + (2**32 - 1).to_bytes(4, "big")
    with pytest.raises(ProtocolError, match="cut off"):
        wire.decode_envelopes(data)


def test_too_many_records():
    vote = (0).to_bytes(4, "big") + bytes(64)
    with pytest.raises(ProtocolError, match="up to 65536"):
        wire.decode_certificate(wire._KINDS["certificate"] + vote * (wire.MAX_SITES + 1))
