"""The messages of ``secagg/1`` as bytes: fixed layouts, strict decoders.

A message is four bytes that name its kind, a fixed head and records of one fixed size; how many
records there are follows from its length. A decoder refuses every length but the exact one, ids
out of order and ids twice, and allocates nothing before that.

======================  ====================================  =================================
kind                    head                                  record
======================  ====================================  =================================
hello (R0, to tally)    one hello, no records                 site 4, cpk 32, spk 32, r 32, sig 64
hellos (R1, to site)    none                                  one hello
shares (R1, to tally)   site 4, cb 32, own hb 32, own hs 32   holder 4, e 82, hb 32, hs 32, sig 64
envelopes (R2, to site) number of ids 4, ids 4 each           dealer 4, cb 32, e 82, hb 32, hs 32,
                                                              sig 64
header (R2, to tally)   one header, no records                site 4, hy 32, sig 64
survivors (R3, to site) none                                  one header
vote (R3, to tally)     one vote, no records                  site 4, sig 64
certificate (R4)        none                                  one vote
released (R4, to tally) site 4                                dealer 4, share 33
complaint (to tally)    one complaint, no records             site 4, dealer 4, key 32, sig 64
======================  ====================================  =================================
"""

import itertools
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fedward.aggregation.shamir import SHARE_BYTES
from fedward.errors import ProtocolError

MAX_SITES = 1 << 16
"""Records that any message may have."""

ENVELOPE_BYTES = 2 * SHARE_BYTES + 16

_HELLO = struct.Struct(">I32s32s32s64s")
_SEALED = struct.Struct(f">I{ENVELOPE_BYTES}s32s32s64s")
_SHARES = struct.Struct(">I32s32s32s")
_ENVELOPE = struct.Struct(f">I32s{ENVELOPE_BYTES}s32s32s64s")
_HEADER = struct.Struct(">I32s64s")
_VOTE = struct.Struct(">I64s")
_SHARE = struct.Struct(f">I{SHARE_BYTES}s")
_SITE = struct.Struct(">I")
_COMPLAINT = struct.Struct(">II32s64s")


class Hello(NamedTuple):
    """R0: a site's fresh keys, bound to the parameters by its signature."""

    site: int
    envelope_key: bytes
    mask_key: bytes
    nonce: bytes
    signature: bytes

    def record(self) -> bytes:
        """The bytes that ``sid`` binds: I ‖ cpk ‖ spk ‖ r ‖ sig."""
        return _HELLO.pack(*self)


class Sealed(NamedTuple):
    """R1: one holder's sealed shares, with the commitments to them."""

    holder: int
    envelope: bytes
    seed_share_commitment: bytes
    key_share_commitment: bytes
    signature: bytes


class Shares(NamedTuple):
    """R1: everything that one dealer hands out."""

    site: int
    seed_commitment: bytes
    seed_share_commitment: bytes
    key_share_commitment: bytes
    sealed: tuple[Sealed, ...]


class Envelope(NamedTuple):
    """R2: sealed shares on their way from a dealer to the site that reads this."""

    dealer: int
    seed_commitment: bytes
    envelope: bytes
    seed_share_commitment: bytes
    key_share_commitment: bytes
    signature: bytes


class Header(NamedTuple):
    """R2: the signed hash of a masked input."""

    site: int
    input_hash: bytes
    signature: bytes


class Vote(NamedTuple):
    """R3: a site's signature of the survivor set."""

    site: int
    signature: bytes


class Released(NamedTuple):
    """R4: one share of each dealer, of its seed or of its key as the survivor set says."""

    site: int
    shares: tuple[tuple[int, bytes], ...]


class Complaint(NamedTuple):
    """In place of R2: a dealer's envelope that does not hold, and the key that shows it."""

    site: int
    dealer: int
    key: bytes
    signature: bytes


def encode_hello(hello: Hello) -> bytes:
    """Write a hello."""
    return _message("hello", hello.record())


def decode_hello(data: bytes) -> Hello:
    """Read a hello.

    Raises:
        ProtocolError: Another length or kind.
    """
    return Hello(*_HELLO.unpack(_single("hello", data, _HELLO)))


def encode_hellos(hellos: Iterable[Hello]) -> bytes:
    """Write the hellos of a cohort, ordered by site."""
    return _message("hellos", *(hello.record() for hello in hellos))


def decode_hellos(data: bytes) -> tuple[Hello, ...]:
    """Read the hellos of a cohort.

    Raises:
        ProtocolError: Another length or kind, or ids not ascending.
    """
    rows = _rows("hellos", _body("hellos", data), _HELLO)
    return tuple(Hello(*row) for row in rows)


def encode_shares(shares: Shares) -> bytes:
    """Write a dealer's shares, ordered by holder."""
    return _message("shares", _SHARES.pack(*shares[:4]), *(_SEALED.pack(*s) for s in shares.sealed))


def decode_shares(data: bytes) -> Shares:
    """Read a dealer's shares.

    Raises:
        ProtocolError: Another length or kind, or holders not ascending.
    """
    head, body = _split("shares", _body("shares", data), _SHARES.size)
    rows = _rows("shares", body, _SEALED)
    site, seed, own_seed_share, own_key_share = _SHARES.unpack(head)
    sealed = tuple(Sealed(*row) for row in rows)
    return Shares(site, seed, own_seed_share, own_key_share, sealed)


def encode_envelopes(cohort: Sequence[int], envelopes: Iterable[Envelope]) -> bytes:
    """Write the cohort and one site's envelopes, both ordered by id."""
    ids = struct.pack(f">I{len(cohort)}I", len(cohort), *cohort)
    return _message("envelopes", ids, *(_ENVELOPE.pack(*e) for e in envelopes))


def decode_envelopes(data: bytes) -> tuple[tuple[int, ...], tuple[Envelope, ...]]:
    """Read the cohort and one site's envelopes.

    Raises:
        ProtocolError: Another length or kind, or ids not ascending.
    """
    head, body = _split("envelopes", _body("envelopes", data), _SITE.size)
    ids, body = _split("envelopes", body, _SITE.size * int(_SITE.unpack(head)[0]))
    cohort = tuple(row[0] for row in _rows("envelopes", ids, _SITE))
    return cohort, tuple(Envelope(*row) for row in _rows("envelopes", body, _ENVELOPE))


def encode_header(header: Header) -> bytes:
    """Write a masked input's header."""
    return _message("header", _HEADER.pack(*header))


def decode_header(data: bytes) -> Header:
    """Read a masked input's header.

    Raises:
        ProtocolError: Another length or kind.
    """
    return Header(*_HEADER.unpack(_single("header", data, _HEADER)))


def encode_survivors(headers: Iterable[Header]) -> bytes:
    """Write the survivors' headers, ordered by site."""
    return _message("survivors", *(_HEADER.pack(*header) for header in headers))


def decode_survivors(data: bytes) -> tuple[Header, ...]:
    """Read the survivors' headers.

    Raises:
        ProtocolError: Another length or kind, or ids not ascending.
    """
    return tuple(Header(*row) for row in _rows("survivors", _body("survivors", data), _HEADER))


def encode_vote(vote: Vote) -> bytes:
    """Write a vote."""
    return _message("vote", _VOTE.pack(*vote))


def decode_vote(data: bytes) -> Vote:
    """Read a vote.

    Raises:
        ProtocolError: Another length or kind.
    """
    return Vote(*_VOTE.unpack(_single("vote", data, _VOTE)))


def encode_certificate(votes: Iterable[Vote]) -> bytes:
    """Write a certificate, ordered by site."""
    return _message("certificate", *(_VOTE.pack(*vote) for vote in votes))


def decode_certificate(data: bytes) -> tuple[Vote, ...]:
    """Read a certificate.

    Raises:
        ProtocolError: Another length or kind, or ids not ascending (so no vote counts twice).
    """
    return tuple(Vote(*row) for row in _rows("certificate", _body("certificate", data), _VOTE))


def encode_released(released: Released) -> bytes:
    """Write released shares, ordered by dealer."""
    return _message(
        "released", _SITE.pack(released.site), *(_SHARE.pack(*row) for row in released.shares)
    )


def decode_released(data: bytes) -> Released:
    """Read released shares; the layout has room for one share of a dealer, never for both.

    Raises:
        ProtocolError: Another length or kind, or dealers not ascending.
    """
    head, body = _split("released", _body("released", data), _SITE.size)
    rows = _rows("released", body, _SHARE)
    return Released(_SITE.unpack(head)[0], tuple((row[0], row[1]) for row in rows))


def encode_complaint(complaint: Complaint) -> bytes:
    """Write a complaint."""
    return _message("complaint", _COMPLAINT.pack(*complaint))


def decode_complaint(data: bytes) -> Complaint:
    """Read a complaint.

    Raises:
        ProtocolError: Another length or kind.
    """
    return Complaint(*_COMPLAINT.unpack(_single("complaint", data, _COMPLAINT)))


_KINDS = {
    "hello": b"SA1h",
    "hellos": b"SA1H",
    "shares": b"SA1s",
    "envelopes": b"SA1E",
    "header": b"SA1y",
    "survivors": b"SA1Y",
    "vote": b"SA1v",
    "certificate": b"SA1V",
    "released": b"SA1r",
    "complaint": b"SA1c",
}


def _message(kind: str, *parts: bytes) -> bytes:
    return b"".join((_KINDS[kind], *parts))


def _body(kind: str, data: bytes) -> bytes:
    """What follows the four bytes that name the kind."""
    if data[:4] != _KINDS[kind]:
        raise ProtocolError(f"expected a {kind!r} message of secagg/1, got another kind")
    return data[4:]


def _split(kind: str, body: bytes, size: int) -> tuple[bytes, bytes]:
    if len(body) < size:
        raise ProtocolError(f"a {kind!r} message is cut off: {len(body)} of {size} bytes")
    return body[:size], body[size:]


def _single(kind: str, data: bytes, layout: struct.Struct) -> bytes:
    body = _body(kind, data)
    if len(body) != layout.size:
        raise ProtocolError(f"a {kind!r} message has {layout.size} bytes, not {len(body)}")
    return body


def _rows(kind: str, body: bytes, layout: struct.Struct) -> list[tuple[Any, ...]]:
    """Records of one size, each starting with an id, in strictly ascending order of the ids."""
    count, rest = divmod(len(body), layout.size)
    if rest or count > MAX_SITES:
        raise ProtocolError(
            f"a {kind!r} message needs up to {MAX_SITES} records of {layout.size} bytes, "
            f"not {len(body)} bytes"
        )
    rows: list[tuple[Any, ...]] = list(layout.iter_unpack(body))
    if any(one[0] >= two[0] for one, two in itertools.pairwise(rows)):
        raise ProtocolError(f"a {kind!r} message must name each site once, in ascending order")
    return rows
