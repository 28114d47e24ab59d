"""The signed letters between coordinator and sites, carried as the content of Flower messages.

Flower's node authentication signs no content, so every letter carries its sender's own Ed25519
signature over action, attempt, site, code, ledger lines, receipt and the SHA-256 of each part.

A site's answer names the newest line of its ledger; the coordinator's next letter brings a receipt
for it. The receipt signs the line's hash without telling it: a site whose disk was rolled back can
neither check the receipt nor answer with the hash that belongs to it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_type_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import DecodeError

from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.errors import ConfigurationError, IdentityError, InvalidValue, SiteCode
from fedward.identity import Identity, verify

SESSION_ACTIONS = ("hello", "shares", "masked", "consistency", "unmask")
"""The exchanges of one session of secure aggregation, in order."""

MESSAGE_TYPES = {
    "task": "train",
    "second": "train.second",
    **{action: f"train.{action}" for action in SESSION_ACTIONS},
    "evaluate": "evaluate",
}
"""Everything a coordinator can ask of a site, with the Flower message type that carries it."""

Sender = Literal["coordinator", "site"]

Line = tuple[int, str]
"""A line of a site's ledger: its number from 1 (0: before the first) and its hash in hex."""

_LINES = 1 << 63
_HEADER_LIMIT = 1 << 16
_SMALL = 1 << 16  # a part of more bytes is an array, which Flower sends in pieces
_PART = "part."  # before the names of all others, which lie beside the header
_RECEIPT = "fedward/1/receipt"


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The coordinator's signature that it has seen a line of a site's ledger.

    Args:
        seq: The line's number, 1 or more.
        signature: Over the site's public key, the number and the line's hash, in hex.
    """

    seq: int
    signature: str

    def __post_init__(self) -> None:
        """Check every limit."""
        if type(self.seq) is not int or not 1 <= self.seq < _LINES:
            raise InvalidValue("seq", self.seq, "1 to 2^63 - 1")
        if type(self.signature) is not str:
            raise InvalidValue("signature", self.signature, "hex digits")

    def check(self, coordinator: bytes, site: bytes, head: str) -> None:
        """Check that this is the coordinator's receipt for a line of one's own.

        Args:
            coordinator: The coordinator's public key.
            site: The site's public key.
            head: The hash of the site's line ``seq``.

        Raises:
            IdentityError: It is for another line, another site or not the coordinator's.
        """
        try:
            signature = bytes.fromhex(self.signature)
        except ValueError as error:
            raise IdentityError("a receipt's signature is not hex") from error
        verify(coordinator, _RECEIPT, signature, site, *_line_fields((self.seq, head)))


def countersign(identity: Identity, site: bytes, line: Line) -> Receipt:
    """The coordinator's receipt for a line of the ledger of the site with this public key."""
    signature = identity.sign(_RECEIPT, site, *_line_fields(line))
    return Receipt(seq=line[0], signature=signature.hex())


def _line_fields(line: Line) -> tuple[bytes, bytes]:
    return line[0].to_bytes(8, "big"), line[1].encode()


@dataclass(frozen=True, kw_only=True)
class Letter:
    """One message of a round, in either direction.

    Args:
        action: One of :data:`MESSAGE_TYPES`.
        attempt: The run, round, session and attempt it belongs to.
        site: The roster id of the site it goes to or comes from.
        code: A site's answer; None in the coordinator's letters.
        parts: Named payloads.
        lines: In a site's answer: the newest line of its ledger, and the one that the coordinator's
            receipt is for; ascending, none of number 0.
        receipt: In the coordinator's letters: for the newest line of this site that it has seen.
    """

    action: str
    attempt: Attempt
    site: int
    code: SiteCode | None = None
    parts: Mapping[str, bytes] = field(default_factory=dict)
    lines: tuple[Line, ...] = ()
    receipt: Receipt | None = None

    def __post_init__(self) -> None:
        """Check what a signed header may hold."""
        if type(self.action) is not str or self.action not in MESSAGE_TYPES:
            raise InvalidValue("action", self.action, f"one of {', '.join(MESSAGE_TYPES)}")
        if type(self.site) is not int:
            raise InvalidValue("site", self.site, "a whole number")
        numbers = [seq for seq, _ in self.lines]
        plain = all(type(seq) is int and type(head) is str for seq, head in self.lines)
        if not plain or numbers != sorted({seq for seq in numbers if 0 < seq < _LINES}):
            raise InvalidValue("lines", self.lines, "ascending numbers from 1 with their hashes")

    def part(self, name: str) -> bytes:
        """A part by name.

        Raises:
            IdentityError: The sender left it out.
        """
        if name not in self.parts:
            raise IdentityError(f"a {self.action!r} letter needs the part {name!r}")
        return self.parts[name]

    def header(self) -> bytes:
        """The bytes that are signed; each part is hashed once."""
        return self._header

    @cached_property
    def _header(self) -> bytes:
        return _header_of(self, lambda data: hashlib.sha256(data).hexdigest())


def _header_of(letter: Letter, hashed: Callable[[bytes], str]) -> bytes:
    receipt = letter.receipt
    return canonical_json(
        {
            "action": letter.action,
            "run": letter.attempt.run,
            "order": letter.attempt.order,
            "site": letter.site,
            "code": letter.code,
            "lines": letter.lines,
            "receipt": None if receipt is None else vars(receipt),
            "parts": {name: hashed(data) for name, data in letter.parts.items()},
        }
    )


def seal_letter(letter: Letter, identity: Identity, sender: Sender) -> RecordDict:
    """Sign a letter and put it into the records of a Flower message."""
    return _sealed(letter, letter.header(), identity, sender, _to_array)


def seal_letters(letters: Sequence[Letter], identity: Identity, sender: Sender) -> list[RecordDict]:
    """As :func:`seal_letter`, for letters with parts in common: each is hashed and cut once."""
    hashed = _once(lambda data: hashlib.sha256(data).hexdigest())
    array = _once(_to_array)
    return [_sealed(one, _header_of(one, hashed), identity, sender, array) for one in letters]


_T = TypeVar("_T")


def _once(make: Callable[[bytes], _T]) -> Callable[[bytes], _T]:
    """Make something of each object once; equal bytes in two objects are two."""
    made = dict[int, tuple[bytes, _T]]()  # with the bytes, so that no other object gets their id

    def get(data: bytes) -> _T:
        if id(data) not in made:
            made[id(data)] = data, make(data)
        return made[id(data)][1]

    return get


def _sealed(
    letter: Letter,
    header: bytes,
    identity: Identity,
    sender: Sender,
    array: Callable[[bytes], Array],
) -> RecordDict:
    signature = identity.sign(f"fedward/1/{sender}", header)
    config, arrays = ConfigRecord({"header": header, "signature": signature}), ArrayRecord()
    for name, data in letter.parts.items():
        if len(data) > _SMALL:
            arrays[name] = array(data)  # its constructor would make another array of the data
        else:
            config[_PART + name] = data
    records = RecordDict({"letter": config})
    if arrays:  # Flower stores and sends each record by itself
        records["parts"] = arrays
    return records


def parts_of(records: RecordDict) -> dict[str, bytes]:
    """The parts that a letter's records hold, still unchecked.

    Raises:
        IdentityError: An array among them is more than bytes, or a part is there twice.
    """
    config = records.config_records.get("letter", ConfigRecord())
    arrays = records.array_records.get("parts", ArrayRecord())
    small = {
        name.removeprefix(_PART): data
        for name, data in config.items()
        if name.startswith(_PART) and isinstance(data, bytes)
    }
    if small.keys() & arrays.keys():
        raise IdentityError("a letter has two parts of one name")
    return small | {name: _from_array(array) for name, array in arrays.items()}


def open_letter(records: RecordDict, public_key: bytes, sender: Sender) -> Letter:
    """Check the signature and every part of a letter, then read it.

    Raises:
        IdentityError: The signature does not hold, a part is missing, extra or altered, or the
            header is malformed.
    """
    header, signature = _signed_bytes(records)
    verify(public_key, f"fedward/1/{sender}", signature, header)
    parts = parts_of(records)
    try:
        fields = json.loads(header)
        round_number, session, attempt = fields["order"]
        receipt = fields["receipt"]
        letter = Letter(
            action=fields["action"],
            attempt=Attempt(
                run=fields["run"], round=round_number, session=session, attempt=attempt
            ),
            site=fields["site"],
            code=None if fields["code"] is None else SiteCode(fields["code"]),
            parts=parts,
            lines=tuple((seq, head) for seq, head in fields["lines"]),
            receipt=None if receipt is None else Receipt(**receipt),
        )
        same = letter.header() == header
    except (ValueError, KeyError, TypeError, RecursionError, ConfigurationError) as error:
        raise IdentityError("a signed letter is malformed") from error
    if not same:
        raise IdentityError("a letter's parts are not the ones its sender signed")
    return letter


def _signed_bytes(records: RecordDict) -> tuple[bytes, bytes]:
    """Header and signature of a letter, still unchecked."""
    config = records.config_records.get("letter", ConfigRecord())
    header, signature = config.get("header"), config.get("signature")
    if not isinstance(header, bytes) or not isinstance(signature, bytes):
        raise IdentityError("a message without a signed letter")
    if len(header) > _HEADER_LIMIT:
        raise IdentityError(f"a letter's header has {len(header)} bytes, at most {_HEADER_LIMIT}")
    return header, signature


def _to_array(data: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype="raw", data=data)


def _from_array(array: Array) -> bytes:
    if array.stype != "raw" or array.dtype != "uint8" or tuple(array.shape) != (len(array.data),):
        raise IdentityError("a letter's part is not a plain byte string")
    return bytes(array.data)


_MALFORMED = (ArithmeticError, AssertionError, AttributeError, DecodeError, LookupError,
              MemoryError, RuntimeError, TypeError, ValueError)  # fmt: skip
"""What Flower raises when it reads bytes that somebody made up."""


def inflate(number: str, contents: Mapping[str, bytes], most: int) -> Message | None:
    """Put a Flower message together from its objects.

    Args:
        number: The message's id.
        contents: Its objects by their ids, as they came.
        most: Most bytes of its arrays: one may name the same piece many times, so that a small
            message would fill the memory.

    Returns:
        A message with content; None where the objects are none, or make too large a message.
    """
    try:
        arrays = dict[str, InflatableObject]()
        for name, content in contents.items():
            if get_object_type_from_object_content(content) == Array.__qualname__:
                arrays[name] = array = _array(content, contents, most)
                most -= len(array.data)
        message = inflate_object_from_contents(number, dict(contents), objects=arrays)
    except _MALFORMED:
        return None
    return message if isinstance(message, Message) and message.has_content() else None


def _array(content: bytes, contents: Mapping[str, bytes], most: int) -> Array:
    """An array from its object and those of its pieces, which are copied once.

    Raises:
        ValueError: It has more than ``most`` bytes, or its pieces are none.
    """
    _, children, _ = get_object_head_values_from_object_content(content)
    fields = json.loads(get_object_body(content, Array))
    names = [children[number] for number in fields["arraychunk_ids"]]
    if sum(len(contents[name]) for name in names) > most:
        raise ValueError(f"an array of more than {most} bytes")
    bodies = {name: memoryview(contents[name])[_body_start(contents[name]) :] for name in children}
    data = b"".join(bodies[name] for name in names)
    return Array(fields["dtype"], tuple(fields["shape"]), fields["stype"], data)


def _body_start(piece: bytes) -> int:
    if get_object_type_from_object_content(piece) != ArrayChunk.__qualname__:
        raise ValueError("a piece of an array is another object")
    return piece.index(HEAD_BODY_DIVIDER) + 1
